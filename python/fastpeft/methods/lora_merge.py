"""Adapters into the weight: the merged layer of a base, and what re-quantising it costs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import StateError, refuse
from ..quant.frozen import QuantizedLinear
from ..quant.linear import Linear4bit, Linear8bit
from ..quant.tensor import quantize_tensor
from ..transposed import TransposedLinear
from .lora_dora import gain, weight_of

if TYPE_CHECKING:
    from .lora_adapter import LoRAAdapter


def relative_error(exact: Tensor, stored: Tensor) -> float:
    """|stored - exact| / |exact| in the Frobenius norm; both [N, K]."""
    norm = float(exact.norm())
    return float((stored.to(exact.dtype) - exact).norm()) / norm if norm else 0.0


def merged_layer(
    base: nn.Module,
    adapters: Sequence[LoRAAdapter],
    requantize: bool,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, float]:
    """A new layer of weight W + sum of scaling * B A and bias + sum of scaling * B.bias; the base
    is left alone. DoRA scales the rows of what was summed before it, as in the forward pass.

    Args:
        base: nn.Linear, TransposedLinear, nn.Embedding, Linear4bit or Linear8bit.
        adapters: what to add.
        requantize: give a layer of the base's own format instead of nn.Linear.
        dtype: of the merged weight, default the base's.

    Returns:
        The layer, frozen, and the relative error of its weight against the exact sum in float32.
        A dense base gives a layer of its own class, a quantised one nn.Linear.

    Raises:
        StateError: requantize with a dense base.
        FormatError: requantize to a format that is only read.
    """
    exact, bias, dtype = exact_weight(base, requantize, dtype)
    for adapter in adapters:
        exact += adapter.delta().to(exact.dtype)
        if adapter.use_dora:
            g = gain(adapter, base, adapter.low_rank(), exact.dtype).detach()
            exact *= g.to(exact.dtype)[:, None]
        if adapter.lora_bias:
            extra = adapter.lora_B.bias.detach() * adapter.scaling
            bias = extra.to(dtype) if bias is None else (bias + extra).to(bias.dtype)
    return stored_layer(base, exact, bias, requantize, dtype)


def exact_weight(
    base: nn.Module, requantize: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """What a merge starts from: copies of the base's weight [N, K], float32 or wider, and of its
    bias [N], and the dtype to store in (default: the base's).

    Raises:
        StateError: requantize with a dense base.
    """
    quantized = isinstance(base, QuantizedLinear)
    if requantize and not quantized:
        raise refuse(
            StateError, "requantize", "a dense base", "a quantised base", "Merge without it."
        )
    if dtype is None:
        dtype = base.weight_dtype if quantized else base.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    exact = base.dequantize(wide) if quantized else weight_of(base).detach().to(wide, copy=True)
    own = getattr(base, "bias", None)
    bias = None if own is None else own.detach().clone()
    return exact, bias, dtype


def stored_layer(
    base: nn.Module, exact: Tensor, bias: Tensor | None, requantize: bool, dtype: torch.dtype
) -> tuple[nn.Module, float]:
    """The frozen layer of weight `exact` [N, K] and bias [N] in place of `base`, and the relative
    error of its weight; see merged_layer.
    """
    if requantize:
        return _requantized(base, exact, bias, dtype)
    weight = exact.to(dtype)
    layer = _dense(base, weight, bias)
    return layer.requires_grad_(False), relative_error(exact, weight)


def _dense(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A dense layer of weight [N, K]; a dense base lends its class, hooks and name."""
    if isinstance(base, nn.Embedding):
        return _with_parameters(base, weight.t().contiguous(), None)
    if isinstance(base, TransposedLinear):
        conv = _with_parameters(base.conv, weight.t().contiguous(), bias)
        return TransposedLinear(conv)
    if isinstance(base, nn.Linear):
        return _with_parameters(base, weight, bias)
    layer = nn.utils.skip_init(
        nn.Linear, base.in_features, base.out_features, bias is not None, device="meta"
    )
    return _with_parameters(layer, weight, bias)


def _with_parameters(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A shallow copy of a dense layer with other parameters."""
    result = copy.copy(layer)
    result._parameters = dict(layer._parameters)
    result.weight = nn.Parameter(weight)
    result.bias = None if bias is None else nn.Parameter(bias)
    return result


def _requantized(
    base: QuantizedLinear, exact: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[nn.Module, float]:
    layer: QuantizedLinear
    if isinstance(base, Linear8bit):
        layer = Linear8bit.from_quantized(quantize_tensor(exact, "int8"), bias, base.threshold)
    else:
        assert isinstance(base, Linear4bit)
        q = quantize_tensor(exact, base.format, base.blocksize, base.double_quant)
        layer = Linear4bit.from_quantized(q, bias)
    layer.weight_dtype = dtype
    return layer, relative_error(exact, layer.dequantize(exact.dtype))
