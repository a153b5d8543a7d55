"""DoRA: a direction and a magnitude per output feature (Liu et al. 2024, "DoRA").

    V = W + s B A      g_n = m_n / ||v_n||      y = g * (x V^T) + bias      m [N] trains

||v_n|| counts as a constant for the gradient (section 4.3 of the paper), as in peft. It is found
without V:

    ||v_n||^2 = ||w_n||^2 + 2 s b_n . (A w_n) + s^2 b_n (A A^T) b_n

||w_n||^2 is frozen with W and computed once; A W^T [R, N] is one pass of R tokens through the base
layer's own operator, so that a packed weight stays packed. The norms are those of the factors in
the dtype that x is computed in, as the operator sees them.

With dropout x is dropped in the low-rank branch alone; peft drops it in (g - 1) W x too, which
would be a second pass through W for the same mean.

Forward and backward of one layer take 1.19 times LoRA's (geometric mean of 36 cases, at most 1.42:
R = 16, 256 and 1024 tokens, weights 1536 x 576, 576 x 1536, 192 x 576, dense, NF4 and int8, float32
and bfloat16; processor time of one AVX-512 thread).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import ops
from ..ops.autocast import is_autocast_on, without_autocast
from ..ops.lora import LowRank
from ..quant.frozen import QuantizedLinear
from ..transposed import TransposedLinear

# float32 elements of W that are widened at a time while norms are taken: 4 MiB.
_BLOCK = 1 << 20


def weight_of(base: nn.Module) -> Tensor:
    """W [N, K] of a dense base; an embedding [K, N] is the linear layer of one-hot rows: a view."""
    return base.weight.t() if isinstance(base, nn.Embedding) else base.weight


def start_magnitude(adapter: nn.Module, base: nn.Module) -> None:
    """Gives an adapter its lora_magnitude_vector [N] = ||w_n + s b_n A||, so that g = 1."""
    adapter.register_buffer("weight_sq", None, persistent=False)
    remember_norms(adapter, base)
    adapter.lora_magnitude_vector = nn.Parameter(start_norms(adapter, base))


def start_norms(adapter: nn.Module, base: nn.Module) -> Tensor:
    """||w_n + s b_n A|| [N] in the adapter's dtype."""
    lora = adapter.low_rank()
    dtype = base.weight_dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
    return _norms(base, lora, adapter.weight_sq, dtype).to(lora.A.dtype)


def is_at_start(adapter: nn.Module, base: nn.Module) -> bool:
    """Whether the magnitudes are still those that `start_magnitude` gave over this base."""
    own = adapter.lora_magnitude_vector
    return not own.is_meta and torch.equal(own, start_norms(adapter, base))


@torch.no_grad()
def restart(adapter: nn.Module, base: nn.Module) -> None:
    """Sets the magnitudes to those of a start over this base and these factors."""
    adapter.lora_magnitude_vector.copy_(start_norms(adapter, base))


def remember_norms(adapter: nn.Module, base: nn.Module) -> None:
    """Computes ||w_n||^2 anew: the base was replaced, loaded, or cast."""
    adapter.weight_sq = row_squares(base, adapter.low_rank().A.dtype)


@torch.no_grad()
def row_squares(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """||w_n||^2 [N] in float32 (float64 for float64), a few rows widened at a time."""
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(base, QuantizedLinear):
        W = base.dequantize(wide if wide == torch.float64 else None)
    else:
        W = weight_of(base)
    rows = max(1, _BLOCK // max(W.shape[1], 1))
    return torch.cat([part.to(wide).square().sum(1) for part in W.split(rows)])


def rescale(
    z: Tensor, adapter: nn.Module, base: nn.Module, lora: LowRank, bias: Tensor | None
) -> Tensor:
    """g * z + bias [..., N] in z's dtype.

    Args:
        z: x W^T + s drop(x) A^T B^T, [..., N].
        adapter: with lora_magnitude_vector [N] and weight_sq [N].
        base: the frozen layer.
        lora: its factors.
        bias: [N] or None.
    """
    y = _Rescale.apply(z, gain(adapter, base, lora, z.dtype))
    return y if bias is None else y + bias.to(y.dtype)


class _Rescale(torch.autograd.Function):
    """z * g [..., N] as z + z (g - 1): g - 1 survives the cast to 16 bits where g, near 1, would
    lose what was learned; and all operands share a dtype, which is 15 times faster on a CPU than a
    bfloat16 z times a float32 g.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, g: Tensor) -> Tensor:
        step = (g - 1).to(z.dtype)
        ctx.save_for_backward(z, step)
        ctx.wide = g.dtype
        return torch.addcmul(z, z, step)

    # dz = g dy, dg = sum over rows of dy z.
    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, step = ctx.saved_tensors
        needs_z, needs_g = ctx.needs_input_grad
        dz = torch.addcmul(dy, dy, step) if needs_z else None
        dg = (dy * z).reshape(-1, z.shape[-1]).sum(0, dtype=ctx.wide) if needs_g else None
        return dz, dg


def gain(adapter: nn.Module, base: nn.Module, lora: LowRank, dtype: torch.dtype) -> Tensor:
    """g = m / ||w_n + s b_n A|| [N], float32 or wider; the gradient goes to m alone."""
    plain = isinstance(base, (nn.Linear, nn.Embedding, TransposedLinear, QuantizedLinear))
    if plain and not (isinstance(base, nn.Linear) and base.weight.requires_grad):
        squares = adapter.weight_sq
    else:  # a weight that trains or is switched (modules_to_save of another adapter)
        squares = row_squares(base, adapter.weight_sq.dtype)
    norm = _norms(base, lora, squares, dtype)
    return adapter.lora_magnitude_vector.to(norm.dtype) / norm


def _norms(base: nn.Module, lora: LowRank, squares: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        kind = squares.device.type
        if is_autocast_on(kind):
            with torch.autocast(kind, enabled=False):
                return _closed_form(base, lora, squares, dtype)
        return _closed_form(base, lora, squares, dtype)


def _closed_form(base: Any, lora: LowRank, squares: Tensor, dtype: torch.dtype) -> Tensor:
    A, B, s = lora.A.to(dtype), lora.B.to(dtype), lora.scaling
    if isinstance(base, QuantizedLinear):
        AW = ops.qlinear.qlinear(A, base.quantized.weight(-1.0))  # int8: A is not rounded
    else:
        AW = F.linear(A, weight_of(base).to(dtype))
    A, B, AW = A.to(squares.dtype), B.to(squares.dtype), AW.to(squares.dtype)
    total = squares + 2 * s * (B * AW.t()).sum(1) + s * s * ((B @ (A @ A.t())) * B).sum(1)
    # A row of zeros has magnitude 0 too: 0 / tiny, not 0 / 0. Rounding may leave less than 0.
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()
