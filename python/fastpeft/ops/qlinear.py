"""y = x W^T + bias + scaling * drop(x) A^T B^T over a frozen weight in any format, and its
gradients.

With z = drop(x), s = z A^T and ds = scaling * dy B:
    dx = dy W + drop'(ds A)      dA = ds^T z      dB = scaling * dy^T s      dbias = sum over rows
    of dy
W is frozen: no gradient, and nothing but a reference to its packed form is kept for the backward
pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import load
from ..errors import ConfigError, refuse
from .autocast import without_autocast
from .devices import check_one_device
from .lora import LowRank, draw_seed, lora_wgrad, rows_of, wants_grad

load()
_ops = torch.ops.fastpeft


class Weight(NamedTuple):
    """A frozen weight as the operators take it (csrc/core/formats.h).

    Attributes:
        codes: 4-bit: tiled uint8; int8: int8 [N, K]; dense: [N, K] in x's dtype.
        scales: float32, or uint8 when nested is given; None for dense.
        nested: float32 [257 + ceil(B/256)] or None.
        format: id from FORMAT_IDS.
        blocksize: elements that share a scale.
        N, K: out and in features.
        threshold: int8 only. < 0: weight only; 0: int8 activations; > 0: LLM.int8() with outlier
            columns.
    """

    codes: Tensor
    scales: Tensor | None
    nested: Tensor | None
    format: int
    blocksize: int
    N: int
    K: int
    threshold: float = -1.0


class _QLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor | None,
        nested: Tensor | None,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        seed: Tensor | None,
        options: tuple[int, int, int, int, float, float, float],
    ) -> Tensor:
        format, blocksize, N, K, threshold, scaling, dropout_p = options
        y, s = _ops.qlinear_fwd(
            x,
            codes,
            scales,
            nested,
            format,
            blocksize,
            N,
            threshold,
            bias,
            A,
            B,
            scaling,
            dropout_p,
            seed,
        )
        ctx.options = options
        ctx.bias_dtype = None if bias is None else bias.dtype
        # x is needed for dA alone: with a frozen A nothing of the size of the activations is kept.
        keep_x = A is not None and ctx.needs_input_grad[5]
        ctx.save_for_backward(x if keep_x else None, s, codes, scales, nested, A, B, seed)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, codes, scales, nested, A, B, seed = ctx.saved_tensors
        format, blocksize, N, K, _, scaling, dropout_p = ctx.options
        needs_x, _, _, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:7]
        dx = dbias = dA = dB = ds = None
        if A is not None:
            if needs_A:
                dA, dB, ds = lora_wgrad(dy, x, s, A, B, scaling, dropout_p, seed)
                dB = dB.to(B.dtype) if needs_B else None
            else:
                rows = dy.reshape(-1, N)
                dB = (rows.t() @ s * scaling).to(B.dtype) if needs_B else None
                ds = rows @ B.to(dy.dtype) * scaling if needs_x else None
        if needs_x:
            dx = _ops.qlinear_dgrad(
                dy, codes, scales, nested, format, blocksize, K, ds, A, dropout_p, seed
            )
        if needs_bias:
            dbias = dy.reshape(-1, N).sum(0, dtype=ctx.bias_dtype)
        return dx, None, None, None, dbias, dA, dB, None, None


def _fitting(parameter: Tensor, x: Tensor) -> Tensor:
    """Operators take parameters in x's dtype or float32; any other is cast, with a gradient."""
    if parameter.dtype == x.dtype or parameter.dtype == torch.float32:
        return parameter
    return parameter.to(x.dtype)


def qlinear(
    x: Tensor, w: Weight, bias: Tensor | None = None, lora: LowRank | None = None
) -> Tensor:
    """y = x W^T + bias + scaling * drop(x) A^T B^T.

    Args:
        x: [..., K], any strides; float32, bfloat16, float16 (float64 on the CPU).
        w: the frozen weight.
        bias: [N] or None.
        lora: low-rank branch or None.

    Returns:
        [..., N] in x's dtype. Gradients flow to x, bias, A and B, each only if it asks for one.

    Raises:
        ConfigError: x's last size is not K.
        RuntimeError: shapes, dtypes or devices that do not fit (named in the text); a second
            derivative.
    """
    # The forward operator is told N alone: with padded tiles another K could go unnoticed there.
    if x.dim() == 0 or x.shape[-1] != w.K:
        raise refuse(
            ConfigError, "x", f"shape {list(x.shape)}", f"[..., {w.K}]", "in_features is the last."
        )
    A = B = seed = None
    scaling, dropout_p = 1.0, 0.0
    if bias is not None:
        bias = _fitting(bias, x)
    if lora is not None:
        A, B, scaling, dropout_p, seed = lora
        A, B = _fitting(A, x), _fitting(B, x)
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(x.device)
    if wants_grad(x, bias, A, B):
        options = (w.format, w.blocksize, w.N, w.K, w.threshold, scaling, dropout_p)
        return _QLinear.apply(x, w.codes, w.scales, w.nested, bias, A, B, seed, options)
    return _ops.qlinear_fwd(
        x,
        w.codes,
        w.scales,
        w.nested,
        w.format,
        w.blocksize,
        w.N,
        w.threshold,
        bias,
        A,
        B,
        scaling,
        dropout_p,
        seed,
    )[0]


@torch.library.register_fake("fastpeft::qlinear_fwd")
def _(
    x,
    codes,
    scales,
    nested,
    format,
    blocksize,
    N,
    threshold,
    bias,
    lora_A,
    lora_B,
    scaling,
    dropout_p,
    seed,
):
    check_one_device(
        x=x, codes=codes, scales=scales, bias=bias, lora_A=lora_A, lora_B=lora_B, seed=seed
    )
    s = [0] if lora_A is None else [rows_of(x), lora_A.shape[0]]
    return x.new_empty([*x.shape[:-1], N]), x.new_empty(s)


@torch.library.register_fake("fastpeft::qlinear_dgrad")
def _(dy, codes, scales, nested, format, blocksize, K, ds, lora_A, dropout_p, seed):
    check_one_device(dy=dy, codes=codes, scales=scales, ds=ds, lora_A=lora_A, seed=seed)
    return dy.new_empty([*dy.shape[:-1], K])
