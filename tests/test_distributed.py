"""Adapters over packed weights under DistributedDataParallel: what is sent and what is not."""

from __future__ import annotations

import copy
import os

import fastpeft
import plug
import pytest
import tiny
import torch
from fastpeft import LoRA, QLoRALinear
from fastpeft.attach import adapter_parameters
from fastpeft.patterns import is_quantized
from tiny import one_thread  # noqa: F401
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

MARK = "_ddp_params_and_buffers_to_ignore"


def packed(model: nn.Module) -> set[str]:
    """Names of the buffers that quantised layers have now."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if is_quantized(module)
        for key, buffer in module._buffers.items()
        if buffer is not None
    }


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("order", ["quantize, attach", "attach, quantize"])
def test_names_follow_what_is_attached(format, order):
    model = tiny.llama()
    assert not hasattr(model, MARK)
    for step in order.split(", "):
        if step == "attach":
            fastpeft.attach(model, LoRA(r=2, target_modules="all-linear"))
        else:
            fastpeft.quantize(model, format)
        assert set(getattr(model, MARK, ())) == packed(model)
    assert len(packed(model)) >= 14 and any("base_layer" in name for name in packed(model))
    assert packed(model) <= {name for name, _ in model.named_buffers()}
    other = copy.deepcopy(model)
    fastpeft.detach(model)
    assert set(getattr(model, MARK)) == packed(model)
    assert not any("base_layer" in name for name in getattr(model, MARK))
    assert set(getattr(other, MARK)) == packed(other) != packed(model)  # the copy speaks for itself


def test_detach_takes_back_what_attach_said():
    model = nn.Sequential(QLoRALinear(64, 64, r=2), nn.Linear(64, 8))
    model.register_buffer("own", torch.ones(2))
    setattr(model, MARK, ["own"])
    fastpeft.attach(model, LoRA(r=2, target_modules=["1"]))
    assert set(getattr(model, MARK)) == packed(model) | {"own"}
    fastpeft.attach(model, LoRA(r=2, target_modules=["1"]), "second")
    fastpeft.detach(model, "default")
    assert set(getattr(model, MARK)) == packed(model) | {"own"}
    fastpeft.detach(model)
    assert getattr(model, MARK) == ["own"]
    dense = tiny.llama()
    fastpeft.attach(dense, LoRA(r=2))
    assert not hasattr(dense, MARK)


@pytest.mark.parametrize("format", [None, "nf4"])
def test_ddp_sends_no_packed_byte(group, format):
    model = plug.build("llama", format).train()
    fastpeft.attach(model, LoRA(r=4))
    wrapped = DistributedDataParallel(model)
    assert wrapped.parameters_to_ignore >= packed(model)
    sent = {id(buffer) for buffer in wrapped.modules_buffers}
    assert sent.isdisjoint(id(dict(model.named_buffers())[name]) for name in packed(model))
    assert sent == {id(b) for n, b in model.named_buffers() if n not in packed(model)} and sent
    loss = wrapped(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
    loss.backward()
    for parameter in adapter_parameters(model, "default").values():
        assert parameter.grad is not None


def train(rank: int, meeting: str, folder: str) -> None:
    """One of two processes: other text each, and on rank 1 other packed bytes in one layer."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = plug.build("llama", "nf4").train()
    codes = model.model.layers[0].mlp.up_proj.codes
    codes.bitwise_xor_(rank)
    before = codes.clone()
    torch.manual_seed(rank)  # DDP makes the starts alike
    fastpeft.attach(model, LoRA(r=4))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(fastpeft.param_groups(model, lr=1e-2))
    text = tiny.tokens(seed=rank)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(input_ids=text, labels=text).loss.backward()
        optimizer.step()
    assert torch.equal(codes, before)
    fastpeft.save_adapter(model, os.path.join(folder, str(rank)))
    distributed.destroy_process_group()


def test_two_processes_train_one_adapter(tmp_path):
    """Each keeps its packed bytes; the adapters stay the same, bit for bit."""
    torch.multiprocessing.spawn(train, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    one, two = (tmp_path / rank / "adapter_model.safetensors" for rank in ("0", "1"))
    assert one.read_bytes() == two.read_bytes()
    model = plug.build("llama", "nf4")
    fastpeft.load_adapter(model, tmp_path / "0")
    with fastpeft.disabled(model):
        base = tiny.logits(model)
    assert not torch.equal(tiny.logits(model), base)
