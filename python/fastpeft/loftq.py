"""LoftQ over a model that was quantised before the adapter came, as while loading."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastpeft.attach import named
from fastpeft.errors import AdapterError, StateError, refuse
from fastpeft.methods.lora import LoRALinear
from fastpeft.methods.lora_dora import is_at_start, restart
from fastpeft.methods.lora_init import compensate
from fastpeft.patterns import places
from fastpeft.quant.frozen import QuantizedLinear


def loftq(model: nn.Module, weights: Mapping[str, Tensor], name: str | None = None) -> list[str]:
    """Start the factors of a LoRA adapter from what quantising lost: scaling * B A is the best
    approximation of its rank to W - dequantised(W) (Li et al. 2023, one iteration).

    Where the dense model is at hand, `LoRA(init_lora_weights="loftq")` before `quantize` does the
    same. Layers that are dense are left alone.

    Args:
        model: quantised, with a fresh LoRA adapter (its B is zero).
        weights: {plain module name + ".weight": the dense weight [N, K]}, as a checkpoint has them
            (a Conv1D's transposed); anything with [] and `in`, one is read at a time.
        name: which adapter; None means the only one.

    Returns:
        Plain names of the layers that were started.

    Raises:
        AdapterError: no such adapter, a weight that is missing or of another shape;
        StateError: no quantised layer holds the adapter, or it was trained. Nothing is changed
        then.
    """
    _, name = named(model, name)
    found = {}
    for place in places(model):
        layer = place.wrapper(LoRALinear)
        if layer is not None and name in layer.adapters:
            if isinstance(layer.base_layer, QuantizedLinear):
                found[place.name] = layer
    if not found or any(bool(layer.adapters[name].lora_B.weight.any()) for layer in found.values()):
        raise refuse(
            StateError,
            f"adapter '{name}'",
            "one that was trained" if found else "no LoRA on a quantised layer",
            "a fresh LoRA over quantised layers",
            "Call loftq() right after attach().",
        )
    for module, layer in found.items():
        _check(weights, module, (layer.out_features, layer.in_features))
    for module, layer in found.items():
        adapter, base = layer.adapters[name], layer.base_layer
        is_new = adapter.use_dora and is_at_start(adapter, base)
        compensate(adapter, weights[f"{module}.weight"], base)
        if is_new:
            restart(adapter, base)
    return list(found)


def _check(weights: Mapping[str, Tensor], module: str, shape: tuple[int, int]) -> None:
    key = f"{module}.weight"
    got = list(weights[key].shape) if key in weights else "no such weight"
    if got != list(shape):
        raise refuse(
            AdapterError,
            f"weights['{key}']",
            f"{got}",
            f"the dense weight {list(shape)}",
            "Give the weights that the model was quantised from.",
        )
