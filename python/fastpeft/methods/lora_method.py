"""LoRA as a method: which layers it goes to, and how its files differ from what trains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..patterns import pattern_value, places
from .layers import layer_method
from .lora import LoRALinear
from .lora_config import LoRA
from .lora_init import is_anchored
from .method import register_method


def _add(layer: nn.Module, config: LoRA, name: str, module_name: str) -> LoRALinear:
    wrapped = layer if isinstance(layer, LoRALinear) else LoRALinear(layer)
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
            A, B = (factor.detach() for factor in adapter.factors())
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


_LAYERS = layer_method("lora", LoRA, "LORA", wrapper=LoRALinear, add=_add, mergeable=True)
register_method(replace(_LAYERS, tensors=_tensors))
