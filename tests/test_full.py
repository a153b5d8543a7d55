"""Full fine-tuning: every parameter trains in place, and the base still comes back bit for bit."""

from __future__ import annotations

import copy

import fastpeft
import pytest
import tiny
import torch
from fastpeft import Full, LoRA
from fastpeft.errors import AdapterError, ConfigError, StateError
from fastpeft.methods.full_optimizer import MasterAdamW, make_optimizer, memory_plan
from plug import assert_checkpoints, assert_round_trip, assert_unplugs, build, logits, loss, shake
from torch import nn

MODELS = ["llama", "gpt2", "bert", "t5"]


def train(model, optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_everything_trains_and_comes_back(name):
    model = build(name)
    before, bare = tiny.fingerprint(model), logits(model)
    fastpeft.attach(model, Full())
    assert all(p.requires_grad for p in model.parameters())
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = make_optimizer(fastpeft.param_groups(model, lr=1e-3), Full(), lr=1e-3)
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0] - 0.05, losses
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, start[k])}
    assert moved >= {k for k, p in model.named_parameters() if p.grad is not None}
    trained = logits(model)
    with fastpeft.disabled(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), trained) and not torch.equal(trained, bare)
    fastpeft.detach(model)
    tiny.assert_same(before, tiny.fingerprint(model))
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("name", MODELS)
def test_file_and_unplugging(name, tmp_path):
    assert_unplugs(lambda: build(name), Full(), std=0.1)
    assert_round_trip(lambda: build(name), Full(), tmp_path, std=0.1)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2"])
def test_tied_weights_stay_tied(name, tmp_path):
    model = tiny.MODELS[name]()
    fastpeft.attach(model, Full())
    optimizer = make_optimizer(fastpeft.param_groups(model, lr=1e-2), Full(), lr=1e-2)
    train(model, optimizer, 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with fastpeft.disabled(model):
        pass
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    fastpeft.save_adapter(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)  # without this package
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_checkpointing():
    assert_checkpoints(lambda: build("llama"), Full(), std=0.0)


def test_a_file_is_a_model_whatever_else_is_attached(tmp_path):
    """Saved while switched off, with a LoRA on the model: plain names, the trained values."""
    model = build("llama")
    fastpeft.attach(model, Full(), "whole")
    shake(model, "whole", 0.1)
    trained = logits(model)
    fastpeft.attach(model, LoRA(r=2, init_lora_weights=False), "lora")
    fastpeft.save_adapter(model, tmp_path, "whole")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), trained)
    assert not (tmp_path / "adapter_config.json").exists()


def test_several_sets_of_weights():
    model = build("gpt2")
    bare, seen = logits(model), {}
    for index, name in enumerate("abc"):
        fastpeft.attach(model, Full(), name)
        assert torch.equal(logits(model), bare)  # each starts from the base
        tiny.shake(model.parameters(), 0.1, seed=index)
        seen[name] = logits(model)
    for name in "bacb":
        fastpeft.activate(model, name)
        assert torch.equal(logits(model), seen[name])
    with pytest.raises(StateError, match="full adapters: got a, b, expected one active"):
        fastpeft.activate(model, ["a", "b"])
    fastpeft.detach(model, "b")
    assert torch.equal(logits(model), bare)
    fastpeft.activate(model, "c")
    twin = copy.deepcopy(model)
    fastpeft.detach(twin, "a")
    fastpeft.detach(twin, "c")
    assert torch.equal(logits(twin), bare) and torch.equal(logits(model), seen["c"])


def test_buffers_come_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    mean = model[1].running_mean.clone()
    fastpeft.attach(model, Full())
    model(torch.randn(8, 4))
    assert not torch.equal(model[1].running_mean, mean)
    fastpeft.detach(model)
    assert torch.equal(model[1].running_mean, mean) and int(model[1].num_batches_tracked) == 0


def test_a_plain_module_round_trip(tmp_path):
    model, other = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval() for _ in range(2))
    fastpeft.attach(model, Full())
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(other, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), other(x))


# ---- the optimizer and what it costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", [None, False])
def test_memory_plan_is_what_a_step_takes(dtype, master):
    model, config = build("llama").to(dtype), Full(float32_master=master)
    plan = memory_plan(model, config)
    fastpeft.attach(model, config)
    optimizer = make_optimizer(fastpeft.param_groups(model, lr=1e-3), config, lr=1e-3)
    train(model, optimizer, 1)
    parameters = list(model.parameters())
    assert plan["weights"] == sum(p.nbytes for p in parameters)
    assert plan["gradients"] == sum(p.grad.nbytes for p in parameters)
    inner = getattr(optimizer, "inner", optimizer)
    moments = [s[k] for s in inner.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert plan["optimizer states"] == sum(m.nbytes for m in moments)
    own = {id(p) for p in parameters}
    held = [m for g in getattr(optimizer, "masters", ()) for m in g if id(m) not in own]
    assert plan["master weights"] == sum(m.nbytes for m in held)
    assert plan["snapshot"] == plan["weights"]


def test_memory_plan_of_8_bit_states():
    pytest.importorskip("bitsandbytes")
    model, config = build("llama").bfloat16(), Full("adamw_8bit")
    fastpeft.attach(model, config)
    optimizer = make_optimizer(fastpeft.param_groups(model, lr=1e-3), config, lr=1e-3)
    losses = train(model, optimizer, 3)
    assert losses[-1] < losses[0]
    kinds = ("state1", "state2", "absmax1", "absmax2")  # the maps are shared by all parameters
    held = [s[k] for s in optimizer.state.values() for k in kinds if k in s]
    plan = memory_plan(model, config)
    assert plan["optimizer states"] == sum(t.nbytes for t in held)
    assert plan["master weights"] == 0


def test_master_weights_are_adamw_in_float32():
    """16-bit weights follow, rounded, what torch's AdamW does to their float32 copies; small steps
    are not lost."""
    torch.manual_seed(2)
    weight = torch.randn(7, 5).bfloat16()
    ours, exact = nn.Parameter(weight.clone()), nn.Parameter(weight.float())
    lost = nn.Parameter(weight.clone())
    options = dict(lr=1e-3, weight_decay=0.1)
    optimizers = MasterAdamW([ours], **options), torch.optim.AdamW([exact], **options)
    plain = torch.optim.AdamW([lost], **options)
    for step in range(60):
        gradient = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        gradient = gradient.abs()
        ours.grad, exact.grad, lost.grad = gradient, gradient.float(), gradient.clone()
        for optimizer in (*optimizers, plain):
            optimizer.step()
    torch.testing.assert_close(optimizers[0].masters[0][0], exact, atol=1e-7, rtol=1e-6)
    assert torch.equal(ours, optimizers[0].masters[0][0].bfloat16())
    assert (lost - exact).abs().mean() > 5 * (ours - exact).abs().mean()


def test_optimizer_resumes_and_obeys_a_scheduler():
    runs = []
    for cut in (False, True):
        model = build("llama").bfloat16()
        optimizer = MasterAdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        for step in range(4):
            if cut and step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = MasterAdamW(model.parameters(), lr=7.0)
                optimizer.load_state_dict(saved)
                schedule.optimizer = optimizer
            train(model, optimizer, 1)
            schedule.step()
            assert optimizer.inner.param_groups[0]["lr"] > optimizer.param_groups[0]["lr"]
        runs.append(logits(model))
    assert torch.equal(*runs)


# ---- refusals


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantised_base_is_refused(format):
    model = build("llama", format)
    before = tiny.fingerprint(model)
    with pytest.raises(ConfigError, match=f"Full: got a quantised base.*{format}.*a dense"):
        fastpeft.attach(model, Full())
    tiny.assert_same(before, tiny.fingerprint(model))


def test_without_a_snapshot_it_stays():
    model = build("gpt2")
    fastpeft.attach(model, Full(snapshot=False))
    shake(model, std=0.1)
    trained = logits(model)
    for leave in (
        lambda: fastpeft.detach(model),
        lambda: fastpeft.activate(model, None),
        lambda: fastpeft.disabled(model).__enter__(),
    ):
        with pytest.raises(StateError, match=r"Full\(snapshot=False\).*Load the base model anew"):
            leave()
    assert fastpeft.adapters(model).active == ("default",)
    assert torch.equal(logits(model), trained)
    with pytest.raises(ConfigError, match="snapshot: got False beside another"):
        fastpeft.attach(model, Full(), "second")


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="optimizer: got 'sgd', expected one of"):
        Full("sgd")
    with pytest.raises(ConfigError, match="float32_master: got True with optimizer 'adamw_8bit'"):
        Full("adamw_8bit", float32_master=True)
    with pytest.raises(ConfigError, match="got a parameter on meta"):
        fastpeft.attach(nn.Linear(2, 2, device="meta"), Full())
    model = build("llama")
    fastpeft.attach(model, Full())
    fastpeft.save_adapter(model, tmp_path)
    with pytest.raises(StateError, match="method 'full', which has no merge"):
        fastpeft.merge(model)
    with pytest.raises(AdapterError, match="missing keys|It is another model's folder"):
        fastpeft.load_adapter(build("gpt2"), tmp_path)
    with pytest.raises(AdapterError, match="missing keys.*layers 0 to 1.*0 to 2"):
        fastpeft.load_adapter(tiny.llama(layers=3), tmp_path)
    with pytest.raises(AdapterError, match=r"got shape \[128, 64\], expected \[128, 32\]"):
        fastpeft.load_adapter(tiny.llama(hidden=32), tmp_path)


def test_quantised_meanwhile():
    model = build("llama")
    fastpeft.attach(model, Full())
    fastpeft.quantize(model, "nf4")
    with pytest.raises(StateError, match="parameters are others than at attach.*Do not quantise"):
        fastpeft.detach(model)


def test_on_a_gpu(cuda):
    """The base waits in host memory and comes back bit for bit; the fused step runs there."""
    model = build("llama").to(cuda, torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    fastpeft.attach(model, Full())
    optimizer = make_optimizer(fastpeft.param_groups(model, lr=1e-3), Full(), lr=1e-3)
    ids = tiny.tokens().to(cuda)
    losses = []
    for _ in range(20):
        value = model(ids, labels=ids).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.05
    fastpeft.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
