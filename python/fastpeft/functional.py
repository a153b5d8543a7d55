"""Layers as functions, with gradients."""

from __future__ import annotations

from torch import Tensor

from . import ops
from .errors import ConfigError, StateError, refuse
from .ops.autocast import autocast_input
from .ops.lora import LowRank
from .quant.tensor import QuantizedTensor

__all__ = ["bottleneck", "qlinear"]


def qlinear(
    x: Tensor,
    weight: QuantizedTensor | Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout_p: float = 0.0,
    threshold: float | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling * drop(x) A^T B^T over a frozen weight (Hu et al. 2021; Dettmers
    et al. 2023).

    Args:
        x: [..., K], any strides; float32, bfloat16, float16, on the CPU float64.
        weight: W [N, K], quantised, or a plain tensor that asks for no gradient.
        bias: [N].
        lora_A: [R, K], float32 or x's dtype; with lora_B.
        lora_B: [N, R].
        scaling: factor of the low-rank branch.
        dropout_p: chance to drop an element of x in that branch, in [0, 1); give 0 outside
            training.
        threshold: int8 weights only. None: weight-only; 0: x in int8 too; > 0: LLM.int8() with
            outlier columns.
        seed: int64 [1] on x's device for the dropout; drawn from torch's generator when None.

    Returns:
        [..., N] in x's dtype, under autocast in the autocast dtype. Gradients for x, bias, lora_A
        and lora_B.

    Raises:
        ConfigError: x's last size is not K, lora_A without lora_B, dropout_p outside [0, 1).
        StateError: a gradient is asked for the weight.
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    if (lora_A is None) != (lora_B is None):
        raise refuse(
            ConfigError, "lora_A, lora_B", "one of the two", "both or none", "Pass the other too."
        )
    if not 0.0 <= dropout_p < 1.0:
        raise refuse(
            ConfigError, "dropout_p", dropout_p, "a number in [0, 1)", "0 switches dropout off."
        )
    x = autocast_input(x)
    lora = None
    if lora_A is not None and lora_B is not None:
        lora = LowRank(lora_A, lora_B, scaling, dropout_p, seed)
    if isinstance(weight, QuantizedTensor):
        w = weight.weight(-1.0 if threshold is None else float(threshold))
    else:
        w = dense_weight(weight, x)
    return ops.qlinear.qlinear(x, w, bias, lora)


def dense_weight(weight: Tensor, x: Tensor) -> ops.qlinear.Weight:
    """A plain [N, K] tensor as the operators take it, cast to x's dtype.

    Raises:
        StateError: it asks for a gradient, which the operators do not compute.
    """
    if weight.requires_grad:
        raise refuse(
            StateError,
            "weight",
            "a tensor with requires_grad=True",
            "a frozen weight",
            "qlinear gives no gradient to it: freeze it, or use torch.nn.functional.linear.",
        )
    N, K = weight.shape
    return ops.qlinear.Weight(
        weight.to(x.dtype), None, None, ops.quant.FORMAT_IDS["dense"], 64, N, K
    )


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str = "gelu",
    scaling: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scaling * (act(x D^T + down_bias) U^T + up_bias) (Houlsby et al. 2019; He et al.
    2022).

    Args:
        x: [..., K], any strides, floating point.
        down: [D, K].
        down_bias: [D] or None.
        up: [K, D].
        up_bias: [K] or None.
        activation: relu, gelu (erf), gelu_tanh, silu (= swish), tanh or identity.
        scaling: factor of the branch.
        residual: [..., K] or None (then the branch alone).

    Returns:
        [..., K] in x's dtype, under autocast in the autocast dtype. Gradients for every tensor that
        asks for one.

    Raises:
        ConfigError: unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    cast = autocast_input(x)
    if residual is not None:
        residual = cast if residual is x else residual.to(cast.dtype)
    return ops.bottleneck.bottleneck(
        cast, down, down_bias, up, up_bias, activation, scaling, residual
    )
