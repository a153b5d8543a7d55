"""Bottleneck adapters in models: places, training, unplugging, company. Configuration:
test_bottleneck_config.py; the `adapters` library's files: test_bottleneck_files.py.
"""

from __future__ import annotations

import copy
import io as streams

import bottleneck_models as models
import fastpeft
import pytest
import tiny
import torch
from fastpeft import Bottleneck, LoRA
from fastpeft.attach import adapter_parameters
from fastpeft.errors import ConfigError
from fastpeft.methods import adapter as adapter_module
from fastpeft.methods.adapter_sites import find_layers
from fastpeft.report import missing_gradients
from tiny import one_thread  # noqa: F401
from torch import nn
from torch.nn import functional as F

PRESETS = {
    "pfeiffer": Bottleneck.pfeiffer,
    "houlsby": Bottleneck.houlsby,
    "parallel": Bottleneck.parallel,
    "between": Bottleneck.between_attention_and_ffn,
}
ARCHS = ("llama", "gpt2", "bert", "t5")
FORMATS = (None, "nf4", "int8")


# ---- places


def _captured(model: nn.Module, layers) -> dict:
    """First inputs and outputs of every module the sites name, and of the layers."""
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(module, args, kwargs, output):
        first = args[0] if args else kwargs["hidden_states"]
        seen[module] = (first, output[0] if isinstance(output, tuple) else output)

    every = {name: module for name, module in model.named_modules()}
    for layer in layers:
        for module in [every[layer.name], *(p.module for p in layer.modules.values())]:
            if not isinstance(module, nn.ModuleList):
                module.register_forward_hook(hook, with_kwargs=True)
    models.logits(model)
    return {name: seen[module] for name, module in every.items() if module in seen}


@pytest.mark.parametrize("arch", models.BY_CONFIG)
def test_rows_name_the_sums_of_the_model(arch):
    """stream + tap, normed as the row says, is what the next sub-layer reads or the layer gives."""
    model = models.by_config(arch)
    layers = find_layers(model)
    assert len(layers) == (4 if model.config.is_encoder_decoder else 2)
    seen = _captured(model, layers)
    for layer in layers:
        slots = [slot for slot in ("attention", "cross", "output") if layer.site(slot)]
        sites = [layer.site(slot) for slot in slots]
        if not sites[-1].joins:
            stream = seen[f"{layer.name}.{sites[0].stream}"][0]
            total = stream + sum(seen[f"{layer.name}.{site.tap}"][1] for site in sites)
            torch.testing.assert_close(total, seen[layer.name][1])
            continue
        for site, following in zip(sites, [*sites[1:], None], strict=True):
            h, norm = seen[f"{layer.name}.{site.tap}"][1], layer.modules.get(site.norm)
            stream = seen[f"{layer.name}.{site.stream}"][0]
            with torch.no_grad():
                if norm is None:
                    total = stream + h
                elif layer.row.sandwich:
                    total = stream + norm.module(h)
                else:
                    total = norm.module(stream + h)
            after = (
                seen[layer.name][1]
                if following is None
                else seen[f"{layer.name}.{following.stream}"][0]
            )
            torch.testing.assert_close(total.reshape(after.shape), after)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arch", models.BY_CONFIG)
def test_every_model_takes_every_preset_and_gives_it_back(arch, preset):
    model = models.by_config(arch)
    before, base = tiny.fingerprint(model), models.logits(model)
    models.shaken(model, PRESETS[preset](reduction_factor=4))
    assert not torch.equal(models.logits(model), base)
    with fastpeft.disabled(model):
        assert torch.equal(models.logits(model), base)
    fastpeft.detach(model)
    assert torch.equal(models.logits(model), base)
    tiny.assert_same(before, tiny.fingerprint(model))


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(4, 4)


def test_models_without_a_row_are_refused():
    with pytest.raises(ConfigError, match="no layer of a known kind .it has _Block"):
        fastpeft.attach(nn.Sequential(nn.ModuleList([_Block()])), Bottleneck())


def test_a_factor_between_layer_and_sum_is_another_model():
    import transformers

    config = transformers.GraniteConfig(**{**models._DECODER, "residual_multiplier": 0.5})
    with pytest.raises(ConfigError, match="GraniteDecoderLayer"):
        fastpeft.attach(transformers.GraniteForCausalLM(config), Bottleneck())


# ---- training


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arch", ARCHS)
def test_twenty_steps_lower_the_loss_and_change_the_adapter_alone(arch, preset, format, tmp_path):
    model = models.build(arch, format)
    base = models.logits(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    fastpeft.attach(model, PRESETS[preset](reduction_factor=4), "a")
    started = {key: p.detach().clone() for key, p in adapter_parameters(model, "a").items()}
    optimizer = torch.optim.AdamW(fastpeft.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = models.loss(model)
        value.backward()
        assert missing_gradients(model) == []
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.05, losses
    ended = adapter_parameters(model, "a")
    assert all(not torch.equal(p, started[key]) for key, p in ended.items())
    trained = models.logits(model)
    with fastpeft.disabled(model):
        assert torch.equal(models.logits(model), base)
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.detach(model)
    assert torch.equal(models.logits(model), base)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    again = models.build(arch, format)
    fastpeft.load_adapter(again, tmp_path, "other")
    assert torch.equal(models.logits(again), trained)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # dropout
    models.loss(model.train()).backward()
    assert missing_gradients(model) == []
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("format", (None, "nf4"))
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_do_not_depend_on_checkpointing(arch, preset, format):
    model = models.shaken(
        models.build(arch, format), PRESETS[preset](reduction_factor=4, dropout=0.1)
    )
    model.config.use_cache = False
    plain = _gradients(model)
    for reentrant in (True, False):
        tiny.checkpoint_activations(model, reentrant)
        for ours, exact in zip(_gradients(model), plain, strict=True):
            # an encoder's output is read by every decoder layer: its gradients add in another order
            slack = models.rounding(exact) if model.config.is_encoder_decoder else 0.0
            assert (ours - exact).abs().max().item() <= slack
        model.gradient_checkpointing_disable()


def _plain(x, down, down_bias, up, up_bias, activation="gelu", scaling=1.0, residual=None):
    acts = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
    }
    out = scaling * F.linear(acts[activation](F.linear(x, down, down_bias)), up, up_bias)
    return out if residual is None else out + residual


@pytest.mark.parametrize("case", [c for c in models.CASES if c.startswith(("llama", "bert"))])
def test_gradients_are_those_of_the_formula(case, monkeypatch):
    model = models.base_of(case)
    fastpeft.load_adapter(model, models.FOLDER / case)

    def gradients():
        model.zero_grad()
        models.loss(model).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    ours = gradients()
    monkeypatch.setattr(adapter_module, "bottleneck", _plain)
    for mine, exact in zip(ours, gradients(), strict=True):
        # 1e-5: two backward passes of float32 over some 30 layers
        assert (mine - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-7


# ---- with other adapters, other dtypes, in copies


def test_attaching_and_quantising_commute():
    first, second = models.build("opt", "nf4"), models.build("opt")
    models.shaken(first, Bottleneck.houlsby(reduction_factor=4))
    models.shaken(second, Bottleneck.houlsby(reduction_factor=4))
    fastpeft.quantize(second, "nf4", threshold=None)
    assert torch.equal(models.logits(first), models.logits(second))


@pytest.mark.parametrize("arch", ("llama", "opt", "t5"))
def test_lora_and_bottleneck_share_a_model_in_any_order(arch):
    def lora(model):
        fastpeft.attach(model, LoRA(r=2, target_modules="all-linear"), "l")
        tiny.shake(adapter_parameters(model, "l").values(), std=0.1)

    outputs = []
    for order in ("lb", "bl"):
        model = models.build(arch)
        before, base = tiny.fingerprint(model), models.logits(model)
        for word in order:
            lora(model) if word == "l" else models.shaken(model, Bottleneck.houlsby(4), "b")
        fastpeft.activate(model, ["l", "b"])
        outputs.append(models.logits(model))
        fastpeft.activate(model, "b")
        only = models.logits(model)
        fastpeft.detach(model, "l")
        assert torch.equal(models.logits(model), only)
        fastpeft.detach(model, "b")
        assert torch.equal(models.logits(model), base)
        tiny.assert_same(before, tiny.fingerprint(model))
    assert torch.equal(*outputs)


def test_two_adapters_stack_in_the_order_of_activation():
    model = models.build("llama")
    for seed, name in enumerate(("a", "b")):
        fastpeft.attach(model, Bottleneck.pfeiffer(4), name)
        tiny.shake(adapter_parameters(model, name).values(), seed=seed)
    fastpeft.activate(model, "a")
    alone = models.logits(model)
    fastpeft.activate(model, ["a", "b"])
    both = models.logits(model)
    fastpeft.activate(model, ["b", "a"])
    assert not torch.equal(both, alone) and not torch.equal(both, models.logits(model))
    fastpeft.detach(model, "b")
    assert torch.equal(models.logits(model), alone)


def test_an_adapter_of_norms_and_a_bottleneck_share_a_layer():
    """modules_to_save replaces the very modules that the seats stand around."""
    for arch, norm in (("llama", "post_attention_layernorm"), ("bert", "output.LayerNorm")):
        model = models.build(arch)
        before = tiny.fingerprint(model)
        lora = LoRA(r=2, target_modules="all-linear", modules_to_save=[norm])
        models.shaken(model, Bottleneck.pfeiffer(4, original_ln_after=arch == "llama"), "b")
        alone = models.logits(model)
        fastpeft.attach(model, lora, "n")
        fastpeft.activate(model, ["b", "n"])
        assert torch.equal(models.logits(model), alone)
        tiny.shake([p for k, p in adapter_parameters(model, "n").items() if norm in k])
        assert not torch.equal(models.logits(model), alone)
        fastpeft.detach(model, "b")
        fastpeft.detach(model, "n")
        tiny.assert_same(before, tiny.fingerprint(model))


def test_copies_and_pickles_are_independent():
    model = models.shaken(models.build("bert"), Bottleneck.pfeiffer(4, original_ln_after=False))
    expected = models.logits(model)
    stream = streams.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    others = [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    tiny.shake(adapter_parameters(model, "a").values(), seed=9)
    assert not torch.equal(models.logits(model), expected)
    assert all(torch.equal(models.logits(other), expected) for other in others)
    fastpeft.detach(others[0])
    assert torch.equal(models.logits(others[0]), models.logits(models.build("bert")))


def test_nothing_is_kept_after_a_pass():
    from fastpeft.methods.adapter_seats import adapted

    model = models.shaken(
        models.build("bert"), Bottleneck.parallel(4, mh_adapter=True, original_ln_after=False)
    )
    _gradients(model)
    models.logits(model)
    for _, seat in adapted(model):
        assert seat.box.stream is None and seat.box.result is None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_bases_keep_float32_adapters(dtype):
    model = models.build("llama").to(dtype)
    models.shaken(model, Bottleneck.houlsby(4, scaling="learned", ln_before=True))
    assert all(p.dtype == torch.float32 for p in adapter_parameters(model, "a").values())
    models.loss(model).backward()
    assert missing_gradients(model) == []
    half = models.logits(model)
    exact = models.logits(model.float())
    assert half.dtype == dtype
    assert (half.float() - exact).abs().max() < 30 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast():
    model = models.shaken(models.build("gpt2"), Bottleneck.pfeiffer(4))
    exact = models.logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = models.logits(model).float()
        models.loss(model).backward()
    assert missing_gradients(model) == []
    assert (half - exact).abs().max() < 0.2 * exact.abs().max()


def test_generation_with_the_cache_equals_generation_without():
    model = models.shaken(models.build("llama"), Bottleneck.pfeiffer(4))
    ids = models.inputs_of(model)["input_ids"][:1]
    common = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    first = model.generate(ids, use_cache=True, **common)
    assert torch.equal(first, model.generate(ids, use_cache=False, **common))


def test_torch_compile_without_a_graph_break():
    model = models.shaken(models.build("llama"), Bottleneck.pfeiffer(4))
    layer, x = model.model.layers[0], torch.randn(2, 5, 32)
    position = model.model.rotary_emb(x, torch.arange(5)[None])
    with torch.no_grad():
        expected = layer(x, position_embeddings=position)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        out = compiled(x, position_embeddings=position)
    torch.testing.assert_close(out, expected)
