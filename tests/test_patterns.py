"""Which modules are meant: the same ones peft would take, for every way of saying it."""

from __future__ import annotations

import warnings

import fastpeft
import pytest
import tiny
import torch
from fastpeft import LoRA
from fastpeft.attach import adapter_parameters
from fastpeft.errors import ConfigError
from fastpeft.patterns import DEFAULT_TARGETS, find_targets, layer_index, places
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import one_thread  # noqa: F401
from torch import nn

WAYS = {
    "default": ("llama", {}),
    "default gpt2": ("gpt2", {}),
    "default qwen2": ("qwen2", {}),
    "suffix": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dotted suffix": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "same last name": ("gpt2", {"target_modules": ["c_proj"]}),
    "full name": ("llama", {"target_modules": ["model.layers.1.self_attn.k_proj"]}),
    "regex": ("llama", {"target_modules": r".*\.layers\.[1-9]\..*(up|down)_proj"}),
    "regex is a full match": ("llama", {"target_modules": r".*\.1\.self_attn\..*"}),
    "exclude list": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    ),
    "exclude regex": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*v_proj"},
    ),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "all-linear exclude": (
        "qwen2",
        {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]},
    ),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "layers pattern": (
        "llama",
        {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "layers pattern list": (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
    ),
    "full name beats layers": (
        "llama",
        {
            "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
            "layers_to_transform": [1],
        },
    ),
    "lm_head by name": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "saved module is no target": (
        "llama",
        {"target_modules": r".*(q_proj|lm_head)", "modules_to_save": ["lm_head"]},
    ),
    "rank pattern": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3, "proj": 5},
            "alpha_pattern": {r".*\.0\..*": 4, "up_proj": 64},
        },
    ),
    "first pattern wins": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {r"self_attn\.q_proj": 3, "q_proj": 7, "q": 1},
            "use_rslora": True,
        },
    ),
}


def peft_layers(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, float]]:
    """{name: (rank, scaling)} as peft does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in wrapped.named_modules()
        if isinstance(m, LoraLayer)
    }


@pytest.mark.parametrize("way", list(WAYS))
def test_same_modules_ranks_and_scalings_as_peft(way):
    name, options = WAYS[way]
    expected = peft_layers(tiny.MODELS[name](), LoraConfig(r=6, lora_alpha=24, **options))
    model = tiny.MODELS[name]()
    fastpeft.attach(model, LoRA(r=6, lora_alpha=24, **options), "a")
    found = {
        place.name: (w.adapters["a"].r, w.adapters["a"].scaling)
        for place in places(model)
        if (w := place.wrapper(fastpeft.LoRALinear)) is not None
    }
    assert found == expected and found


def test_resolved_targets_say_the_same_again():
    """What "all-linear" became is stored as names that mean exactly those modules."""
    model = tiny.llama()
    model.extra = nn.Linear(4, 4)
    model.extra_head = nn.Sequential(nn.Linear(4, 4))  # "0" would also match a layer
    fastpeft.attach(model, LoRA(r=2, target_modules="all-linear"))
    targets = fastpeft.adapters(model)["default"].target_modules
    assert "extra" in targets and "lm_head" not in targets and targets == sorted(targets)
    again = [p.name for p in find_targets(model, fastpeft.adapters(model)["default"])]
    first = [k.split(".lora_A")[0] for k in adapter_parameters(model, "default") if "lora_A" in k]
    assert again == first


def test_second_adapter_sees_the_bare_model():
    """Plain names do not change when something is attached."""
    model = tiny.gpt2()
    names = [p.name for p in places(model)]
    assert names == [k for k, _ in model.named_modules() if k]
    fastpeft.attach(model, LoRA(target_modules="all-linear", modules_to_save=["ln_f"]), "a")
    assert [p.name for p in places(model)] == names
    fastpeft.attach(model, LoRA(target_modules="all-linear"), "b")
    a, b = adapter_parameters(model, "a"), adapter_parameters(model, "b")
    assert [k for k in a if "lora_" in k] == list(b)


def test_default_rows_are_known_and_unknown_models_are_told():
    assert {"llama", "gpt2", "qwen2", "bert", "t5"} <= DEFAULT_TARGETS.keys()
    model = nn.Sequential()
    model.add_module("dense_in", nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="target_modules: got None.*no default row.*dense_in"):
        fastpeft.attach(model, LoRA())


def test_no_match_shows_near_names():
    model = tiny.llama()
    for targets, near in (
        (["q_prj", "mlp.upproj"], "q_proj"),
        (r".*\.q_prox", "q_proj"),
        ("c_attn", "_proj"),
    ):
        with pytest.raises(ConfigError, match=rf"target_modules: got .*at least one.*{near}"):
            fastpeft.attach(model, LoRA(target_modules=targets))
    with pytest.raises(ConfigError, match="Look at exclude_modules, layers_to_transform too"):
        fastpeft.attach(
            model, LoRA(target_modules=["q_proj"], layers_to_transform=[9], exclude_modules=["x"])
        )
    with pytest.raises(ConfigError, match="all-linear.*no linear layer that is not excluded"):
        fastpeft.attach(model, LoRA(target_modules="all-linear", exclude_modules=".*"))


def test_one_unused_name_of_a_list_is_a_warning():
    model = tiny.llama()
    with pytest.warns(UserWarning, match="'c_attn' matches no module. Near names"):
        fastpeft.attach(model, LoRA(target_modules=["q_proj", "c_attn"]))


def test_multihead_attention_is_left_alone():
    """It reads out_proj.weight and never calls the layer: an adapter there would do nothing."""
    model = nn.TransformerEncoderLayer(16, 2, 32)
    fastpeft.attach(model, LoRA(target_modules="all-linear"))
    assert fastpeft.adapters(model)["default"].target_modules == ["linear1", "linear2"]
    with pytest.raises(ConfigError, match=r"'self_attn.out_proj'.*outside nn.MultiheadAttention"):
        fastpeft.attach(model, LoRA(target_modules=["out_proj"]), "b")


def test_layer_index():
    assert layer_index("model.layers.12.mlp.experts.3.up_proj") == 12
    assert layer_index("model.layers.12.mlp.experts.3.up_proj", "experts") == 3
    assert layer_index("lm_head") is None and layer_index("model.h.1.fc", ["layers"]) is None


def test_shared_modules_are_one_place():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "third": nn.Linear(4, 4)})
    assert [p.name for p in places(model)] == ["first", "third"]
    assert [k for k, _ in torch.nn.Module.named_modules(model) if k] == ["first", "third"]
