"""LoRA's options and names: defaults, and what is refused with which words."""

from __future__ import annotations

import warnings

import fastpeft
import pytest
from fastpeft import Linear4bit, LoRA, LoRALinear, QLoRALinear
from fastpeft.methods import METHODS, method_of, register_method
from torch import nn

K, N = 96, 64


@pytest.mark.parametrize(
    "name", ["", "a.b", "a/b", "a\\b", "..", None, 3, "keys", "forward", "training", "a\0"]
)
def test_adapter_names(name):
    layer = LoRALinear(nn.Linear(K, N))
    with pytest.raises(fastpeft.AdapterError, match="name: got .*expected a non-empty word"):
        layer.add_adapter(name)
    assert not layer.adapters


def test_refused_adapters():
    layer = LoRALinear.from_linear(nn.Linear(K, N), name="poems")
    with pytest.raises(fastpeft.AdapterError, match="'poems', expected a new name.*Taken"):
        layer.add_adapter("poems")
    with pytest.raises(fastpeft.AdapterError, match="'poem', .*Did you mean 'poems'"):
        layer.set_active("poem")
    with pytest.raises(fastpeft.AdapterError, match="'law', expected one of .*Add it first"):
        layer.merge("law")
    with pytest.raises(fastpeft.AdapterError, match="each name once"):
        layer.set_active(("poems", "poems"))
    with pytest.raises(fastpeft.ConfigError, match="base_layer: got Conv2d"):
        LoRALinear(nn.Conv2d(1, 1, 1))
    with pytest.raises(fastpeft.ConfigError, match="base_layer: got LoRALinear"):
        LoRALinear(layer)
    with pytest.raises(fastpeft.StateError, match="It is quantised already"):
        QLoRALinear.from_linear(Linear4bit(K, N))
    for r in (0, -1, 1.5, True, None):
        with pytest.raises(fastpeft.ConfigError, match="r: got .*, expected an integer >= 1"):
            layer.add_adapter("b", r=r)
    with pytest.warns(UserWarning, match=rf"r: got 65, expected at most min\(in, out\) = {N}"):
        layer.add_adapter("b", r=65)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.add_adapter("c", r=N)


BAD_OPTIONS = [
    ({"r": 0}, "r: got 0, expected an integer >= 1"),
    ({"r": "8"}, "r: got '8'"),
    ({"lora_alpha": 0}, "lora_alpha: got 0, expected a positive number"),
    ({"lora_alpha": float("nan")}, "lora_alpha: got nan"),
    ({"lora_dropout": 1.0}, r"lora_dropout: got 1.0, expected a number in \[0, 1\)"),
    ({"lora_dropout": -0.1}, "lora_dropout: got -0.1"),
    ({"bias": "some"}, r"bias: got 'some', expected one of \('none', 'all', 'lora_only'\)"),
    ({"init_lora_weights": "corda"}, "init_lora_weights: got 'corda'"),
    ({"use_rslora": 1}, "use_rslora: got 1, expected True or False"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: got 0"),
    ({"alpha_pattern": {"q_proj": -2}}, r"alpha_pattern\['q_proj'\]: got -2"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern: got .*expected {name or regular"),
    ({"target_modules": []}, r"target_modules: got \[\], expected a list of names, or one text"),
    ({"target_modules": ""}, "target_modules: got ''"),
    (
        {"modules_to_save": "lm_head"},
        "modules_to_save: got 'lm_head', expected a list of names, or",
    ),
    ({"layers_to_transform": [-1]}, r"layers_to_transform: got \[-1\]"),
]


@pytest.mark.parametrize("options, message", BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_config_refusals(options, message):
    with pytest.raises(fastpeft.ConfigError, match=message):
        LoRA(**options)


def test_config_defaults_and_registry():
    config = LoRA()
    assert (config.r, config.lora_alpha, config.bias, config.target_modules) == (
        8,
        16,
        "none",
        None,
    )
    assert method_of(config) is METHODS["lora"]
    with pytest.raises(fastpeft.ConfigError, match="'lora' is registered already"):
        register_method(METHODS["lora"])
    with pytest.raises(fastpeft.ConfigError, match="config: got dict, expected one of .*LoRA"):
        method_of({})
