"""LoRA as a method: which layers it goes to, and how its files differ from what trains."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, refuse
from ..patterns import find_targets, pattern_value, places
from .layers import layer_method
from .lora import LoRALinear
from .lora_config import LoRA
from .lora_embedding import LoRAEmbedding
from .lora_init import is_anchored
from .method import register_method


def _add(layer: nn.Module, config: LoRA, name: str, module_name: str) -> LoRALinear:
    if isinstance(layer, LoRALinear):
        wrapped = layer
    else:
        wrapped = (LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear)(layer)
    wrapped.add_adapter(
        name,
        pattern_value(config.rank_pattern, module_name, config.r),
        pattern_value(config.alpha_pattern, module_name, config.lora_alpha),
        config.lora_dropout,
        config.use_rslora,
        config.init_lora_weights,
        config.lora_bias,
        use_dora=config.use_dora,
    )
    return wrapped


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """{plain name: tensor} of a file: an anchored pair of factors is stored as one LoRA."""
    found: dict[str, Tensor] = dict(_LAYERS.parameters(model, name))
    for place in places(model):
        layer = place.wrapper(LoRALinear)
        adapter = layer.adapters[name] if layer is not None and name in layer.adapters else None
        if adapter is not None and adapter.anchor_A is not None:
            # No place to load into, and any attempt to is an error.
            with torch.inference_mode():
                A, B = adapter.factors()
            found |= {f"{place.name}.lora_A.weight": A, f"{place.name}.lora_B.weight": B}
    return found


def written(config: LoRA) -> dict[str, Any]:
    """Fields of adapter_config.json that are not the config's own: with an anchor the file holds
    twice the rank, at the same scaling, and starts from nothing but itself.
    """
    if not is_anchored(config.init_lora_weights):
        return {"init_lora_weights": True} if config.init_lora_weights == "loftq" else {}
    factor = math.sqrt(2) if config.use_rslora else 2
    return {
        "init_lora_weights": True,
        "r": 2 * config.r,
        "lora_alpha": config.lora_alpha * factor,
        "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
        "alpha_pattern": {key: alpha * factor for key, alpha in config.alpha_pattern.items()},
    }


def _refuse_tied(model: nn.Module, config: LoRA) -> None:
    """ConfigError if a target shares its weight, or its whole module, with another one."""
    owners: dict[int, list[str]] = {}
    chosen, found = find_targets(model, config), list(places(model))
    parents = [model, *(place.module for place in found)]
    seats = Counter(id(child) for parent in parents for child in parent._modules.values())
    for place in found:
        for parameter in place.module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(place.name)
    for place in chosen:
        weight = place.module._parameters.get("weight")
        others = [name for name in owners.get(id(weight), ()) if name != place.name]
        is_shared = isinstance(place.module, nn.Embedding) and seats[id(place.chain[0][2])] > 1
        if others or is_shared:
            raise refuse(
                ConfigError,
                f"target module '{place.name}'",
                f"tied to '{others[0]}'" if others else "used in several places",
                "a module with a weight of its own",
                "An adapter would change one of the two uses, and merging would part them. Name "
                "other modules, or untie them first (a clone of the weight for one of them, and "
                "tie_word_embeddings=False in the config).",
            )


def _attach(model: nn.Module, config: LoRA, name: str) -> LoRA:
    if config.target_modules is not None:
        _refuse_tied(model, config)
    return _LAYERS.attach(model, config, name)


_LAYERS = layer_method("lora", LoRA, "LORA", wrapper=LoRALinear, add=_add, mergeable=True)
register_method(replace(_LAYERS, attach=_attach, tensors=_tensors))
