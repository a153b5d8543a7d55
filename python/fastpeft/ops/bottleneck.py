"""Bottleneck adapter: y = residual + scaling * (act(x D^T + down_bias) U^T + up_bias), and its
gradients.

The hidden layer [M, D] is recomputed in the backward pass, not kept. Houlsby et al. 2019; Pfeiffer
et al. 2021; He et al. 2022 (scaling, parallel).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import load
from ..errors import ConfigError, refuse
from .autocast import without_autocast
from .devices import check_one_device
from .lora import wants_grad

load()
_ops = torch.ops.fastpeft

# fastpeft::Activation of csrc/core/params.h. gelu is the exact one (erf); swish is silu's older
# name.
ACTIVATIONS = {
    "relu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "silu": 3,
    "swish": 3,
    "tanh": 4,
    "identity": 5,
}


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        residual: Tensor | None,
        activation: int,
        scaling: float,
        serial: bool,
    ) -> Tensor:
        ctx.activation, ctx.scaling, ctx.serial = activation, scaling, serial
        ctx.save_for_backward(x, down, down_bias, up, up_bias)
        residual = x if serial else residual
        return _ops.bottleneck_fwd(x, down, down_bias, up, up_bias, activation, scaling, residual)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, down, down_bias, up, up_bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads: tuple[Tensor | None, ...] = (None,) * 5
        if any(needs[:5]):
            computed = _ops.bottleneck_bwd(
                dy, x, down, down_bias, up, up_bias, ctx.activation, ctx.scaling
            )
            grads = tuple(g if need else None for g, need in zip(computed, needs[:5], strict=True))
            if ctx.serial and grads[0] is not None:
                grads = (grads[0] + dy, *grads[1:])
        return *grads, dy if needs[5] else None, None, None, None


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scaling: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + scaling * (act(x D^T + down_bias) U^T + up_bias).

    Args:
        x: [..., K], any strides, floating point.
        down: [D, K].
        down_bias: [D] or None.
        up: [K, D].
        up_bias: [K] or None.
        activation: a key of ACTIVATIONS.
        scaling: factor of the branch.
        residual: like x, or None.

    Returns:
        [..., K] in x's dtype, with gradients for every tensor argument that asks for one.

    Raises:
        ConfigError: unknown activation.
        RuntimeError: shapes or dtypes that do not fit; a second derivative.
    """
    if activation not in ACTIVATIONS:
        raise refuse(
            ConfigError,
            "activation",
            repr(activation),
            "one of " + ", ".join(ACTIVATIONS),
            "Take one of these.",
        )
    code = ACTIVATIONS[activation]
    if wants_grad(x, down, down_bias, up, up_bias, residual):
        # torch.compile refuses one tensor as two inputs, so "x itself" is an option of its own.
        serial = residual is x
        rest = None if serial else residual
        return _Bottleneck.apply(x, down, down_bias, up, up_bias, rest, code, scaling, serial)
    return _ops.bottleneck_fwd(x, down, down_bias, up, up_bias, code, scaling, residual)


@torch.library.register_fake("fastpeft::bottleneck_fwd")
def _(x, down, down_bias, up, up_bias, activation, scaling, residual):
    check_one_device(x=x, down=down, down_bias=down_bias, up=up, up_bias=up_bias, residual=residual)
    return x.new_empty(x.shape)


@torch.library.register_fake("fastpeft::bottleneck_bwd")
def _(dy, x, down, down_bias, up, up_bias, activation, scaling):
    check_one_device(dy=dy, x=x, down=down, down_bias=down_bias, up=up, up_bias=up_bias)

    def like(t: Tensor | None) -> Tensor:
        return x.new_empty([0]) if t is None else t.new_empty(t.shape)

    return x.new_empty(x.shape), like(down), like(down_bias), like(up), like(up_bias)
