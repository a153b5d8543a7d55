"""IA3: vectors on keys, values and FFN, on every base; files and outputs are peft's."""

from __future__ import annotations

import json

import fastpeft
import pytest
import tiny
import torch
from fastpeft import IA3, LoRA
from fastpeft.attach import adapter_parameters
from fastpeft.errors import AdapterError, ConfigError, StateError
from plug import (
    FORMATS,
    assert_checkpoints,
    assert_round_trip,
    assert_unplugs,
    build,
    logits,
    shake,
)

MODELS = ["llama", "gpt2", "bert", "t5"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_file_and_unplugging(name, format, tmp_path):
    assert_unplugs(lambda: build(name, format), IA3())
    assert_round_trip(lambda: build(name, format), IA3(), tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_starts_as_the_base(name):
    model = build(name)
    bare = logits(model)
    fastpeft.attach(model, IA3())
    assert torch.equal(logits(model), bare)  # times one is exact
    for vector in adapter_parameters(model, "default").values():
        assert torch.equal(vector, torch.ones_like(vector))


def test_formula():
    """float64: the FFN's vector scales what goes in, the others what comes out."""
    layer = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    (w, b), (v, c) = ((m.weight.detach(), m.bias.detach()) for m in layer)
    fastpeft.attach(layer, IA3(["0", "1"], ["1"], init_ia3_weights=False))
    first, second = adapter_parameters(layer, "default").values()
    assert first.shape == (5, 1) and second.shape == (1, 5)
    inner = (x @ w.T + b) * first.double().T
    expected = (inner * second.double()) @ v.T + c
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_checkpointing():
    assert_checkpoints(lambda: build("llama", "nf4"), IA3())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_peft_loads_ours(name, tmp_path):
    import peft

    model = tiny.MODELS[name]()
    fastpeft.attach(model, IA3(modules_to_save=["ln_f" if name == "gpt2" else "model.norm"]))
    shake(model)
    fastpeft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.MODELS[name](), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_we_load_pefts(name, tmp_path):
    import peft

    theirs = peft.get_peft_model(
        tiny.MODELS[name](), peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    model = fastpeft.load_adapter(tiny.MODELS[name](), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=2e-6, rtol=1e-5)
    assert not torch.equal(logits(model), logits(tiny.MODELS[name]()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beside_lora_in_any_order(name):
    """The vector is around the LoRA, whoever came first; each can go alone."""
    outputs = []
    lora = LoRA(r=2, target_modules="all-linear", init_lora_weights=False)
    for order in ("li", "il"):
        model = build(name)
        bare, before = logits(model), tiny.fingerprint(model)
        for letter in order:
            torch.manual_seed(4)
            fastpeft.attach(model, lora if letter == "l" else IA3(), letter)
        shake(model, "i")
        fastpeft.activate(model, ["l", "i"])
        outputs.append(logits(model))
        fastpeft.activate(model, "l")
        outputs.append(logits(model))
        for letter in order:
            fastpeft.detach(model, letter)
        assert torch.equal(logits(model), bare)
        tiny.assert_same(before, tiny.fingerprint(model))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_several_multiply():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    x = torch.randn(2, 4)
    bare = model(x)
    factor = torch.ones(3)
    for name in "ab":
        fastpeft.attach(model, IA3(["0"], init_ia3_weights=False), name)
        factor = factor * adapter_parameters(model, name)["0.ia3_l"].flatten()
    fastpeft.activate(model, ["a", "b"])
    torch.testing.assert_close(model(x), bare * factor)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match=r"feedforward_modules: got \['x'\], expected some of"):
        IA3(["q_proj"], ["x"])
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="target_modules: got None.*model_type None"):
        fastpeft.attach(layer, IA3())
    model = build("llama")
    fastpeft.attach(model, IA3())
    fastpeft.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rope_trick": 3}))
    with pytest.raises(AdapterError, match="'rope_trick'.*got 3, expected null"):
        fastpeft.load_adapter(build("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="layers 0 to 1, the adapter on this model 0 to 2"):
        fastpeft.load_adapter(tiny.llama(layers=3), tmp_path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unmerge(name, format):
    """Beside a LoRA on the same layers, which is off meanwhile."""
    model = build(name, format)
    fastpeft.attach(model, LoRA(r=2, target_modules="all-linear"), "lora")
    fastpeft.attach(model, IA3(), "a")
    shake(model, "a", 0.3)
    before, scaled = tiny.fingerprint(model), logits(model)
    with fastpeft.disabled(model):
        bare = logits(model)
    report = fastpeft.merge(model, "a")
    assert report.errors and report.worst[1] < 1e-6
    torch.testing.assert_close(logits(model), scaled, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(bare, scaled, atol=1e-3)
    fastpeft.unmerge(model)
    tiny.assert_same(before, tiny.fingerprint(model))
    assert torch.equal(logits(model), scaled)
    if format is None or name == "t5":  # T5 keeps its wo dense
        with pytest.raises(StateError, match="requantize"):
            fastpeft.merge(model, "a", requantize=True)
        assert torch.equal(logits(model), scaled)
        return
    report = fastpeft.merge(model, "a", requantize=True)
    assert all(0 <= error < 0.2 for error in report.errors.values()) and report.worst[1] > 1e-3
    fastpeft.unmerge(model)
    assert torch.equal(logits(model), scaled)
