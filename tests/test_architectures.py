"""Model families: quantise, adapt the default targets, adapt every linear layer. A family is a row
of a table, in the package and here."""

from __future__ import annotations

import warnings

import fastpeft
import plug
import pytest
import tiny
import torch
import transformers
from fastpeft import LoRA
from fastpeft.attach import adapter_parameters
from fastpeft.errors import ConfigError
from fastpeft.experts import expert_parameters
from fastpeft.patterns import (
    DEFAULT_TARGETS,
    default_targets,
    is_quantized,
    linear_places,
    output_names,
    places,
)
from tiny import one_thread  # noqa: F401
from torch import nn

SMALL_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# model_type: what differs from the sizes of `plug.by_config`
DECODERS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "opt": {},
    "mixtral": SMALL_EXPERTS,
    "qwen2_moe": SMALL_EXPERTS,
    "gpt_oss": {**SMALL_EXPERTS, "sliding_window": 4},
}
ENCODERS = {
    "roberta": {},
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
}
FAMILIES = [*DECODERS, "gpt2", "bert", *ENCODERS, "t5"]
# Layers with a LoRA by default, of two blocks: 4. Other where q, k and v are made at once, and with
# encoder, decoder and cross attention.
COUNTS = {"gpt2": 2, "gpt_neox": 2, "phi3": 2, "t5": 12}
WITH_EXPERTS = ("mixtral", "qwen2_moe", "gpt_oss")


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


def bare(name: str) -> nn.Module:
    """A tiny model of the family, in eval mode."""
    if name in DECODERS:
        return plug.by_config(name, **DECODERS[name])
    if name not in ENCODERS:
        return plug.MODELS[name]()
    sizes = {} if name == "distilbert" else {"hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4} if sizes else {}
    sizes |= {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64, "num_labels": 3}
    config = transformers.AutoConfig.for_model(name, **sizes, **ENCODERS[name])
    kind = transformers.AutoModelForSequenceClassification
    return tiny._seeded(lambda c: kind.from_config(c), config)


def quantized(name: str) -> nn.Module:
    """The same in NF4, heads left dense."""
    model = bare(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="quantize: ")  # read in a test of its own
        fastpeft.quantize(model, "nf4", skip=("lm_head", "classifier", "pre_classifier"))
    return model


def adapted(model: nn.Module) -> set[str]:
    """Plain names of the layers with a LoRA."""
    keys = adapter_parameters(model, "default")
    return {key.split(".lora_")[0] for key in keys if ".lora_A" in key}


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


@pytest.mark.parametrize("build", [bare, quantized])
def test_default_targets_train(name, build):
    """The loss falls, the adapter alone changes, and it sits on every layer of the row's names."""
    model = build(name)
    words = DEFAULT_TARGETS[model.config.model_type]
    wanted = {p.name for p in linear_places(model) if last(p.name) in words}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said where nothing was asked for
        plug.assert_trains_alone(model, LoRA(r=4), lr=2e-2, least=0.05)
    assert adapted(model) == wanted
    assert len(wanted) == COUNTS.get(name, 4)


@pytest.mark.parametrize("build", [bare, quantized])
def test_every_linear_layer(name, build):
    """The output layer alone is left out; each adapter learns; unplugged, all is back."""
    model = build(name)
    base, before = plug.logits(model), tiny.fingerprint(model)
    wanted = {p.name for p in linear_places(model)} - output_names(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fastpeft.attach(model, LoRA(r=4, target_modules="all-linear"))
    assert len([w for w in said if "expert weights" in str(w.message)]) == (name in WITH_EXPERTS)
    assert adapted(model) == wanted
    assert torch.equal(plug.logits(model), base)
    plug.shake(model, std=0.1)
    plug.loss(model).backward()
    for key, parameter in adapter_parameters(model, "default").items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    assert not torch.equal(plug.logits(model), base)
    fastpeft.detach(model)
    assert torch.equal(plug.logits(model), base)
    tiny.assert_same(before, tiny.fingerprint(model))


def test_quantize_accounts_for_every_matrix(name):
    """Converted, or skipped with a reason; experts loudly."""
    model = bare(name)
    matrices = {
        f"{place.name}.{key}": place.name
        for place in places(model)
        for key, parameter in place.module._parameters.items()
        if parameter is not None and parameter.dim() >= 2
    }
    experts = expert_parameters(model)
    assert bool(experts) == (name in WITH_EXPERTS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = fastpeft.quantize(model, "nf4")
    spoken = [str(w.message) for w in said if "quantize: " in str(w.message)]
    assert len(spoken) == bool(experts)
    if experts:
        assert f"{len(experts)} parameters" in spoken[0] and next(iter(experts)) in spoken[0]
    for key, module in matrices.items():
        told = (module in report.converted) + (module in report.skipped or key in report.skipped)
        assert told == 1, key
    for key in experts:
        assert "experts?" in report.skipped[key]
    for place in linear_places(model):
        assert is_quantized(place.module) == (place.name in report.converted)
    assert report.converted and report.bytes_after < report.bytes_before
    text = str(report)
    assert all(f"left dense: {key}" in text for key in report.skipped)
    for place in linear_places(model):
        why = report.skipped.get(place.name, "")
        dense = any(words in why for words in ("'lm_head' is in skip", "shares its", "its weight"))
        assert dense == (place.name not in report.converted), why


def test_adapters_travel_between_formats(name, tmp_path):
    """Saved over the dense model, loaded over the quantised one: the same values."""
    model, other = bare(name), quantized(name)
    fastpeft.attach(model, LoRA(r=4))
    plug.shake(model)
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(other, tmp_path)
    own, found = (adapter_parameters(m, "default") for m in (model, other))
    assert list(own) == list(found)
    assert all(torch.equal(own[key], found[key]) for key in own)


# ---- experts


def test_attach_says_which_experts_get_nothing():
    model = bare("mixtral")
    words = r"target_modules: 4 expert weights \(model.layers.0.mlp.experts.gate_up_proj, .*frozen"
    with pytest.warns(UserWarning, match=words) as said:
        fastpeft.attach(model, LoRA(r=2, target_modules="all-linear"), "all")
    assert said[0].filename == __file__  # it points at the caller
    count = sum(p.numel() for p in expert_parameters(model).values())
    assert f"{count:,} numbers" in str(said[0].message)
    with pytest.warns(UserWarning, match="target_modules: 2 expert weights"):
        fastpeft.attach(model, LoRA(r=2, target_modules=["q_proj", "down_proj"]), "named")
    with pytest.warns(UserWarning, match="target_modules: 2 expert weights"):
        fastpeft.attach(model, LoRA(r=2, target_modules=r".*layers\.1\..*proj"), "pattern")
    fastpeft.activate(model, ["all", "named", "pattern"])
    assert not any(p.requires_grad for p in expert_parameters(model).values())
    with pytest.raises(ConfigError, match="gate_up_proj.*to match at least one linear layer"):
        fastpeft.attach(model, LoRA(r=2, target_modules=["gate_up_proj"]), "nothing else")


# ---- the table of default targets


# what a config needs and has no default for
UNSET = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}


@pytest.mark.parametrize("kind", sorted(DEFAULT_TARGETS))
def test_rows_name_linear_layers_of_their_model(kind):
    """Built by the family's own config with its default sizes, on meta: no memory."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no model_type {kind!r}")
    config = transformers.AutoConfig.for_model(kind, **UNSET.get(kind, {}))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    names = {last(place.name) for place in linear_places(model)}
    found = default_targets(model)
    assert set(found) <= names, sorted(names)
    assert found == list(DEFAULT_TARGETS[kind]) or kind == "vit" and len(found) == 2
