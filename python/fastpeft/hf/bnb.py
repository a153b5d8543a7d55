"""From bitsandbytes to our layers, bit for bit, without bitsandbytes' kernels."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fastpeft.errors import ConfigError, FormatError, StateError, refuse
from fastpeft.patterns import is_quantized, places
from fastpeft.quant.frozen import QuantizedLinear
from fastpeft.quant.linear import Linear4bit, Linear8bit
from fastpeft.quant.tensor import QuantizedTensor

from .folder import config_of, load_model
from .quantizer import FastPeftQuantizer


def from_bitsandbytes(
    source: nn.Module | str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """A bitsandbytes model with our layers: the packed bytes are the same.

    Args:
        source: a folder whose config.json says bitsandbytes (4-bit or 8-bit), read without that
            library; or a model that transformers has loaded with it, changed in place.
        dtype: of what is not quantised, for a folder; "auto": as stored.
        device: where to put it, for a folder; default: the CPU.

    Returns:
        The model.

    Raises:
        ConfigError: no such folder. FormatError: packed tensors that are damaged.
        StateError: a model without a bitsandbytes layer, one whose weights are not packed yet, or
        16-bit weights under LLM.int8() (has_fp16_weights).
    """
    if not isinstance(source, nn.Module):
        return load_model(source, dtype, device)
    layers: dict[str, QuantizedLinear] = {}
    for place in places(source):
        kind = _kind(place.module)
        if kind is not None:
            layers[place.name] = _convert(place.name, place.module, kind, source)
    if not layers:
        ours = any(is_quantized(place.module) for place in places(source))
        got = "our own layers" if ours else "no bitsandbytes layer"
        advice = "Pass the model that transformers loaded with bitsandbytes, or its folder."
        raise refuse(StateError, "model", got, "a bitsandbytes model", advice)
    for place in places(source):
        if place.name in layers:
            place.put(layers[place.name])
    _speak_for(source, layers)
    return source


def _kind(module: nn.Module) -> str | None:
    """ "Linear4bit" or "Linear8bitLt" of bitsandbytes, told by name: it need not be importable."""
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "bitsandbytes" and cls.__name__ in (
            "Linear4bit",
            "Linear8bitLt",
        ):
            return cls.__name__
    return None


def _convert(name: str, module: nn.Module, kind: str, model: nn.Module) -> QuantizedLinear:
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        # Its CPU kernel wants other bytes, and rounds the scales to bfloat16 on the way.
        got = "weights that bitsandbytes has repacked for the CPU, their scales rounded"
        advice = "Convert before the first forward pass, or give the folder it was loaded from."
        raise refuse(StateError, f"layer '{name}'", got, "them as loaded", advice)
    tensors = module.state_dict()
    if tensors["weight"].is_floating_point() and len(tensors) - (module.bias is not None) == 1:
        advice = "Move the model to its device first: bitsandbytes packs then."
        raise refuse(StateError, f"layer '{name}'", "a weight not packed yet", "codes", advice)
    bias = None if module.bias is None else tensors.pop("bias").clone()
    shape = (module.out_features, module.in_features)
    try:
        q = QuantizedTensor.from_canonical(tensors, shape)
    except FormatError as error:
        raise FormatError(f"layer '{name}': {error}") from error
    if kind == "Linear4bit":
        return Linear4bit.from_quantized(q, bias).train(module.training)
    layer = Linear8bit.from_quantized(_own(q), bias, float(module.state.threshold))
    layer.weight_dtype = getattr(model, "dtype", torch.float16)
    return layer.train(module.training)


def _own(q: QuantizedTensor) -> QuantizedTensor:
    """int8 codes are stored as they are: leave bitsandbytes its own memory."""
    return QuantizedTensor(
        q.codes.clone(), q.scales.clone(), None, q.format, q.blocksize, q.shape, q.dtype
    )


def _speak_for(model: nn.Module, layers: dict[str, QuantizedLinear]) -> None:
    """transformers' notes on the model: it is ours now."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "hf_quantizer"):
        return
    formats = {layer.format for layer in layers.values()}
    if len(formats) > 1:
        raise refuse(ConfigError, "model", sorted(formats), "one format", "Convert each alone.")
    ours = config_of(layers)
    quantizer = FastPeftQuantizer(ours, pre_quantized=True)
    quantizer.report.converted.extend(layers)
    quantizer.adopt(model)
    model.hf_quantizer, config.quantization_config = quantizer, ours
    model.quantization_method = ours.quant_method
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(flag, None)
