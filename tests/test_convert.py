"""quantize: what is converted, what is left and why, and what it costs on the way."""

from __future__ import annotations

import weakref

import fastpeft
import pytest
import tiny
import torch
from fastpeft import Linear4bit, Linear8bit, LoRA
from fastpeft.errors import ConfigError, FormatError, StateError
from fastpeft.patterns import is_linear, is_quantized, places
from tiny import one_thread  # noqa: F401
from torch import nn


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """{plain name: [out, in] weight} of the linear layers."""
    found = {}
    for place in places(model):
        if is_linear(place.module):
            weight = place.module.weight.detach()
            found[place.name] = (weight.t() if hasattr(place.module, "nf") else weight).clone()
    return found


@pytest.mark.parametrize("name", list(tiny.MODELS))
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("nf4", {}),
        ("nf4", {"blocksize": 32, "double_quant": False}),
        ("int8", {"threshold": None}),
        ("int8", {"threshold": 0.0}),
    ],
)
def test_every_linear_layer_becomes_its_own_quantised_self(name, format, options):
    model = tiny.MODELS[name]()
    dense, biases = weights(model), {k: v.clone() for k, v in model.state_dict().items()}
    report = fastpeft.quantize(model, format, **options)
    assert report.format == format
    assert report.converted == [k for k in dense if k != "lm_head"]
    options.pop("threshold", None)
    for place in places(model):
        if place.name not in report.converted:
            continue
        layer = place.module
        assert isinstance(layer, Linear8bit if format == "int8" else Linear4bit)
        expected = fastpeft.quantize_tensor(dense[place.name], format, **options)
        assert torch.equal(layer.dequantize(), expected.dequantize())
        assert (layer.bias is None) == (f"{place.name}.bias" not in biases)
        if layer.bias is not None:
            assert torch.equal(layer.bias, biases[f"{place.name}.bias"])
            assert not layer.bias.requires_grad
    assert isinstance(model.lm_head, nn.Linear)
    assert report.bytes_before > report.bytes_after == fastpeft.memory(model).total


@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_outputs_are_those_of_the_dequantised_model(name):
    """A dense model with the dequantised weights computes the same."""
    model, dense = tiny.MODELS[name](), tiny.MODELS[name]()
    fastpeft.quantize(model, "nf4")
    exact = {p.name: p.module.dequantize() for p in places(model) if is_quantized(p.module)}
    for place in places(dense):
        if place.name in exact:
            transposed = hasattr(place.module, "nf")
            weight = exact[place.name]
            place.module.weight.data.copy_(weight.t() if transposed else weight)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(dense), atol=5e-6, rtol=5e-6)


def test_report_says_what_is_left_and_why():
    model = tiny.llama(tied=True)
    model.conv = nn.Conv1d(3, 4, 2)
    model.table = nn.Parameter(torch.ones(4))
    model.square = nn.Module()
    model.square.w = nn.Parameter(torch.ones(4, 4))

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model.odd = Odd(4, 4)
    report = fastpeft.quantize(model, skip=["mlp", "layers.1.self_attn.q_proj"])
    assert report.skipped == {
        **{
            f"model.layers.{i}.mlp.{k}_proj": "'mlp' is in skip"
            for i in (0, 1)
            for k in ("gate", "up", "down")
        },
        "model.layers.1.self_attn.q_proj": "'layers.1.self_attn.q_proj' is in skip",
        "lm_head": "it shares its weight with 'model.embed_tokens'",
        "odd": "its class Odd has a forward of its own",
        "model.embed_tokens.weight": "embedding",
        "conv.weight": "convolution",
        "square.w": "a parameter of Module, no linear layer",
    }
    assert len(report.converted) == 7
    text = str(report)
    assert "converted" in text and "left dense: odd" in text and f"{report.bytes_after:,}" in text


def test_untied_head_is_quantised_when_it_is_not_skipped():
    model = tiny.llama()
    report = fastpeft.quantize(model, skip=())
    assert report.converted[-1] == "lm_head" and isinstance(model.lm_head, Linear4bit)
    assert torch.isfinite(tiny.logits(model)).all()


def test_experts_in_3d_parameters_are_reported_loudly():
    model = tiny.mixtral()
    with pytest.warns(
        UserWarning, match=r"2 parameters of 3 or more dimensions stay dense.*experts"
    ):
        report = fastpeft.quantize(model)
    left = [k for k, why in report.skipped.items() if "3-D parameter" in why]
    assert len(left) == 2 and all("experts" in k for k in left)
    assert all("experts" not in k for k in report.converted)
    assert torch.isfinite(tiny.logits(model)).all()


@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_dense_layers_are_freed_one_by_one(name):
    """When a layer is done nothing holds its dense weight any more: the peak stays low."""
    model = tiny.MODELS[name]()
    alive = {p.name: weakref.ref(p.module.weight) for p in places(model) if is_linear(p.module)}
    seen = []

    def check(done: int, total: int, layer: str) -> None:
        seen.append((done, total, layer))
        assert alive[layer]() is None, layer

    report = fastpeft.quantize(model, progress=check)
    count = len(report.converted)
    assert seen == [(i + 1, count, layer) for i, layer in enumerate(report.converted)]


def test_hooks_and_mode_move_to_the_new_layer():
    model = tiny.llama().train()
    calls = []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, args, out: calls.append(type(m)))
    fastpeft.quantize(model)
    tiny.logits(model)
    assert calls == [Linear4bit] and all(m.training for m in model.modules())


def test_threshold_reaches_the_layers():
    for threshold in (None, 0.0, 6.0):
        model = tiny.llama()
        fastpeft.quantize(model, "int8", threshold=threshold)
        assert model.model.layers[0].mlp.up_proj.threshold == threshold


# ---- refusals


def test_quantised_models_are_refused():
    model = tiny.llama()
    fastpeft.quantize(model)
    before = tiny.fingerprint(model)
    with pytest.raises(StateError, match=r"model: got 14 quantised layers \('model.layers.0"):
        fastpeft.quantize(model, "int8")
    fastpeft.attach(model, LoRA())
    with pytest.raises(StateError, match="It is quantised already"):
        fastpeft.quantize(model)
    fastpeft.detach(model)
    tiny.assert_same(before, tiny.fingerprint(model))


def test_bitsandbytes_layers_are_refused():
    model = tiny.llama()
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    model.model.layers[1].self_attn.q_proj = layer
    assert layer.weight.dtype == torch.uint8
    with pytest.raises(StateError, match=r"another library's quantised weights.*from_bitsandbytes"):
        fastpeft.quantize(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


def test_meta_weights_are_refused_before_anything_changes():
    model = tiny.llama()
    model.model.layers[1].mlp.down_proj.to("meta")
    before = [id(m) for m in model.modules()]
    with pytest.raises(StateError, match="'model.layers.1.mlp.down_proj': got a weight on meta"):
        fastpeft.quantize(model)
    assert [id(m) for m in model.modules()] == before


@pytest.mark.parametrize("format", ["fp4", "nf5", None])
def test_formats_that_cannot_be_made(format):
    with pytest.raises(ConfigError, match=rf"format: got {format!r}, expected 'nf4' or 'int8'"):
        fastpeft.quantize(tiny.llama(), format)


@pytest.mark.parametrize("blocksize", [48, 16, 8192, "64"])
def test_bad_blocksizes_change_nothing(blocksize):
    model = tiny.llama()
    before = tiny.fingerprint(model)
    with pytest.raises(FormatError, match="blocksize: got .*power of two in 32"):
        fastpeft.quantize(model, blocksize=blocksize)
    tiny.assert_same(before, tiny.fingerprint(model))


def test_not_finite_weights_are_refused_by_name():
    model = tiny.llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        fastpeft.quantize(model)


def test_saved_modules_stay_dense_and_quantised_ones_cannot_be_saved():
    model = tiny.llama()
    fastpeft.attach(model, LoRA(modules_to_save=["lm_head"]))
    report = fastpeft.quantize(model, skip=())
    assert report.skipped["lm_head"] == "it is trained whole (modules_to_save)"
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp': got a quantised layer"):
        fastpeft.attach(model, LoRA(modules_to_save=["mlp"]), "b")


def test_what_the_models_code_reads_stays_dense():
    """T5's FFN asks its second layer for weight.dtype: quantised, the model would not run."""
    from plug import build, logits

    model = build("t5")
    report = fastpeft.quantize(model, "nf4")
    wo = [name for name in report.skipped if name.endswith(".wo")]
    assert len(wo) == 4 and all("keeps it dense" in report.skipped[name] for name in wo)
    assert any(name.endswith(".wi") for name in report.converted)
    assert torch.isfinite(logits(model)).all()
