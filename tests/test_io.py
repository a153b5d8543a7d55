"""Adapter folders, both ways with peft itself: what one saves the other loads and computes the
same.

"The same" is the error rule of compare.py: float64 peft is the exact value, float32 peft the
yardstick.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import fastpeft
import pytest
import tiny
import torch
from compare import assert_close
from fastpeft import LoRA
from fastpeft.attach import adapter_parameters, state_of
from fastpeft.errors import AdapterError
from fastpeft.io import LAYOUTS
from fastpeft.patterns import is_quantized, places
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401
from torch import nn

# The options hold the names of several architectures.
pytestmark = pytest.mark.filterwarnings("ignore:target_modules. .* matches no module")

OPTIONS = {
    "default": {"target_modules": None},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {r".*\.1\..*(c_attn|q_proj)": 2, "c_proj": 3, "up_proj": 6},
        "alpha_pattern": {r".*\.0\..*": 8, "down_proj": 64},
    },
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "lora_bias": {"target_modules": "all-linear", "lora_bias": True},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.3},
    "layers": {"target_modules": ["mlp.c_proj", "o_proj"], "layers_to_transform": [1]},
    "head": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
}


def shaken_peft(name: str, options: dict, base: nn.Module | None = None) -> PeftModel:
    """A peft model with random adapter weights."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on Conv1D and tied heads
        model = get_peft_model(
            base or tiny.MODELS[name](), LoraConfig(r=4, lora_alpha=8, **options)
        )
    tiny.shake((p for p in model.parameters() if p.requires_grad), std=0.1)
    return model.eval()


def load_peft(name: str, folder: Path, base: nn.Module | None = None) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base or tiny.MODELS[name](), folder).eval()


def save_peft(model: PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """Logits equal to float32 rounding; `theirs` is a float64 model afterwards."""
    plain = tiny.logits(theirs)
    assert_close(tiny.logits(ours), tiny.logits(theirs.double()), plain, name="logits")


def dequantised(model: nn.Module, name: str) -> nn.Module:
    """A dense model with the exact weights of the quantised one."""
    dense = tiny.MODELS[name]()
    exact = {p.name: p.module.dequantize() for p in places(model) if is_quantized(p.module)}
    for place in places(dense):
        if place.name in exact:
            transposed = hasattr(place.module, "nf")
            weight = exact[place.name]
            place.module.weight.data.copy_(weight.t() if transposed else weight)
    return dense


@pytest.fixture(params=list(tiny.MODELS))
def name(request) -> str:
    return request.param


@pytest.fixture(params=list(OPTIONS))
def options(request) -> dict:
    return OPTIONS[request.param]


# ---- with peft, both ways


def test_peft_loads_what_we_save(name, options, tmp_path):
    model = tiny.MODELS[name]()
    bare = tiny.logits(model)
    fastpeft.attach(model, LoRA(r=4, lora_alpha=8, **options), "poems")
    tiny.shake(adapter_parameters(model, "poems").values(), std=0.1)
    folder = fastpeft.save_adapter(model, tmp_path / "a")
    theirs = load_peft(name, folder)
    assert not torch.allclose(tiny.logits(theirs), bare, atol=1e-2)
    assert_same_model(model, theirs)


def test_we_load_what_peft_saves(name, options, tmp_path):
    theirs = shaken_peft(name, options)
    save_peft(theirs, tmp_path)
    model = tiny.MODELS[name]()
    bare = tiny.logits(model)
    fastpeft.load_adapter(model, tmp_path, "law")
    assert fastpeft.adapters(model).active == ("law",)
    assert not torch.allclose(tiny.logits(model), bare, atol=1e-2)
    assert_same_model(model, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_over_a_quantised_base(name, format, tmp_path):
    """Ours over NF4 or int8 = peft over the dense model of exactly those weights, both ways."""
    options = OPTIONS["patterns"]
    model = tiny.MODELS[name]()
    fastpeft.quantize(model, format, threshold=None)
    fastpeft.attach(model, LoRA(r=4, lora_alpha=8, **options))
    tiny.shake(adapter_parameters(model, "default").values(), std=0.1)
    folder = fastpeft.save_adapter(model, tmp_path / "ours")
    assert_same_model(model, load_peft(name, folder, dequantised(model, name)))

    fastpeft.detach(model)
    theirs = shaken_peft(name, options, dequantised(model, name))
    save_peft(theirs, tmp_path / "theirs")
    fastpeft.load_adapter(model, tmp_path / "theirs")
    assert_same_model(model, theirs)


def test_same_keys_and_shapes_as_peft(name, options, tmp_path):
    """And the same config where both write a field; target_modules sorted."""
    save_peft(shaken_peft(name, options), tmp_path / "theirs")
    model = tiny.MODELS[name]()
    fastpeft.attach(model, LoRA(r=4, lora_alpha=8, **options))
    fastpeft.save_adapter(model, tmp_path / "ours")
    ours, theirs = (
        load_file(tmp_path / k / "adapter_model.safetensors") for k in ("ours", "theirs")
    )
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    with safe_open(tmp_path / "ours/adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours, theirs = (
        json.loads((tmp_path / k / "adapter_config.json").read_text()) for k in ("ours", "theirs")
    )
    assert ours["target_modules"] == sorted(ours["target_modules"])
    assert ours["inference_mode"] is True and ours["peft_type"] == "LORA"
    assert ours.keys() < theirs.keys()
    if options["target_modules"] == "all-linear":  # peft lists full names, ours are shorter
        del ours["target_modules"]
    theirs["target_modules"] = sorted(theirs["target_modules"])
    differ = {k for k in ours if ours[k] != theirs[k]}
    assert differ <= {"base_model_name_or_path"}, {k: (ours[k], theirs[k]) for k in differ}
    if "base_model_name_or_path" in differ:
        assert not ours["base_model_name_or_path"] and not theirs["base_model_name_or_path"]


def test_trained_adapter_continues_the_same(tmp_path):
    """Save after two steps, load, train on: the same losses as without the interruption."""

    def steps(model: nn.Module, count: int) -> list[float]:
        optimizer = torch.optim.SGD(fastpeft.param_groups(model, lr=0.5))
        losses = []
        for _ in range(count):
            value = tiny.loss(model)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    model = tiny.llama()
    fastpeft.quantize(model)
    fastpeft.attach(model, LoRA(r=4, target_modules="all-linear", modules_to_save=["lm_head"]))
    before = steps(model, 2)
    folder = fastpeft.save_adapter(model, tmp_path)
    after = steps(model, 3)
    assert after[-1] < before[0]
    again = tiny.llama()
    fastpeft.quantize(again)
    fastpeft.load_adapter(again, folder)
    assert steps(again, 3) == after


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_over_a_bfloat16_base(name, tmp_path):
    """float32 adapters on a bfloat16 base. Two yardsticks: peft with its branch in float32, as it
    does by default, and in bfloat16, as the fused operator does."""
    model = tiny.MODELS[name]().bfloat16()
    fastpeft.attach(model, LoRA(r=4, target_modules="all-linear"))
    parameters = adapter_parameters(model, "default").values()
    assert {p.dtype for p in parameters} == {torch.float32}
    tiny.shake(parameters, std=0.1)
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16().float()
    folder = fastpeft.save_adapter(model, tmp_path)
    plain = []
    for wide in (True, False):
        base = tiny.MODELS[name]().bfloat16()
        theirs = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=wide).eval()
        plain.append(tiny.logits(theirs))
    assert_close(tiny.logits(model), tiny.logits(theirs.double()), plain, name="logits")


# ---- our own round trip


def test_round_trip_is_exact_and_the_name_is_free(name, tmp_path):
    model = tiny.MODELS[name]()
    fastpeft.attach(model, LoRA(r=4, **OPTIONS["patterns"]), "one")
    tiny.shake(adapter_parameters(model, "one").values())
    logits, config = tiny.logits(model), fastpeft.adapters(model)["one"]
    values = {k: v.clone() for k, v in adapter_parameters(model, "one").items()}
    fastpeft.save_adapter(model, tmp_path)
    state = torch.get_rng_state()
    fastpeft.load_adapter(model, tmp_path, "two")
    assert torch.equal(torch.get_rng_state(), state)  # loading draws no random number
    assert torch.equal(tiny.logits(model), logits)
    loaded = adapter_parameters(model, "two")
    assert loaded.keys() == values.keys()
    assert all(torch.equal(values[k], loaded[k]) for k in values)
    assert all(p.requires_grad for p in loaded.values())
    assert fastpeft.adapters(model)["two"].rank_pattern == config.rank_pattern
    fastpeft.load_adapter(model, tmp_path, "three", trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(tiny.logits(model), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_files_become_float32_adapters(dtype, tmp_path):
    """float16 adapters cannot be trained with a gradient scaler; the values are exact in
    float32.
    """
    folder = saved(tmp_path)
    change(folder, lambda t: {k: v.to(dtype) for k, v in t.items()})
    model = tiny.llama()
    fastpeft.load_adapter(model, folder)
    for key, parameter in adapter_parameters(model, "default").items():
        stored = load_file(folder / "adapter_model.safetensors")[f"base_model.model.{key}"]
        assert parameter.dtype == torch.float32 and torch.equal(parameter, stored.float())


def test_changed_weights_change_the_logits(tmp_path):
    folder = saved(tmp_path)
    model = tiny.llama()
    fastpeft.load_adapter(model, folder, "a")
    change(
        folder,
        lambda t: {k: v * 1.5 if ".1.self_attn.v_proj.lora_B" in k else v for k, v in t.items()},
    )
    fastpeft.load_adapter(model, folder, "b")
    b = tiny.logits(model)
    fastpeft.activate(model, "a")
    assert not torch.allclose(tiny.logits(model), b, atol=1e-3)


def test_read_me_of_the_user_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    card = saved(tmp_path / "new") / "README.md"
    assert "library_name: peft" in card.read_text()


def test_saving_again_replaces_whole_files(tmp_path, monkeypatch):
    """A crash while writing leaves the old file and no rubbish."""
    folder = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    model = tiny.llama()
    fastpeft.attach(model, LoRA(r=2))

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        fastpeft.save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    fastpeft.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != before[
        "adapter_model.safetensors"
    ]
    (folder / "ordinary").touch()
    for path in folder.iterdir():  # as readable as any other file
        assert path.stat().st_mode == (folder / "ordinary").stat().st_mode


def test_pickle_is_read_only_when_asked(tmp_path):
    folder = saved(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        AdapterError, match="only adapter_model.bin, a pickle.*allow_pickle_weights_only"
    ):
        fastpeft.load_adapter(tiny.llama(), folder)
    model = tiny.llama()
    fastpeft.load_adapter(model, folder, allow_pickle_weights_only=True)
    assert not torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_unset_and_harmless_fields_of_newer_files_are_tolerated(tmp_path):
    folder = saved(tmp_path)
    config(
        folder,
        use_something_new=False,
        nothing=None,
        empty={},
        revision="main",
        megatron_core="megatron.core",
        qalora_group_size=16,
        auto_mapping={"base_model_class": "X", "parent_library": "os"},
        init_lora_weights="eva",
        modules_to_save=[],
        rank_pattern=None,
    )
    model = tiny.llama()
    fastpeft.load_adapter(model, folder)
    assert fastpeft.adapters(model)["default"].init_lora_weights is True


def test_every_layout_belongs_to_a_method():
    from fastpeft.methods import METHODS

    assert set(LAYOUTS) <= {m.peft_type for m in METHODS.values()}


# ---- helpers


def saved(folder: Path, **options) -> Path:
    """A folder with a llama adapter in it."""
    model = tiny.llama()
    fastpeft.attach(model, LoRA(**{"r": 4, **options}))
    tiny.shake(adapter_parameters(model, "default").values())
    assert state_of(model) is not None
    return fastpeft.save_adapter(model, folder)


def change(folder: Path, how) -> None:
    """Rewrite the tensors of a folder."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v.contiguous() for k, v in how(tensors).items()}, path, metadata={"format": "pt"})


def config(folder: Path, **fields) -> None:
    """Set fields of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
