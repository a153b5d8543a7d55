"""The low-rank branch: dropout, its gradients, and the branch on its own (for second and later
adapters).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import load
from .devices import check_one_device

load()
_ops = torch.ops.fastpeft


class LowRank(NamedTuple):
    """What a base layer must know to run one adapter in the same pass: y += scaling * drop(x) A^T
    B^T.

    Attributes:
        A: [R, K], float32 or x's dtype.
        B: [N, R], float32 or x's dtype.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        dropout_p: chance that an element of x is dropped in this branch; 0 outside training.
        seed: int64 [1] on x's device; drawn when it is None and dropout_p > 0.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of that device, so that checkpointing and CUDA graphs replay
    the same dropout.

    Returns:
        int64 [1], never read by the host.
    """
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record: gradients are on and one of the tensors asks for one."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def lora_wgrad(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the low-rank factors.

    Args:
        dy: [..., N] gradient of the layer's output.
        x: [..., K] its input.
        s: [M, R] = drop(x) A^T, saved by the forward pass.
        A, B: [R, K], [N, R].
        scaling, dropout_p, seed: as in the forward pass.

    Returns:
        dA [R, K] = ds^T drop(x), dB [N, R] = scaling * dy^T s (both in A's dtype), ds [M, R] =
        scaling * dy B.
    """
    return _ops.lora_wgrad(dy, x, s, A, B, scaling, dropout_p, seed)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(seed)
        return _ops.dropout(x, p, seed)

    # The mask is a function of the seed: it is recomputed, not stored.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _ops.dropout(dy, ctx.p, ctx.saved_tensors[0]), None, None


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """x * keep(seed, i) / (1 - p), with a gradient.

    Args:
        x: any shape, floating point.
        p: chance to drop, in [0, 1).
        seed: int64 [1] on x's device; drawn when None.

    Returns:
        Like x, contiguous. The same numbers on every device for the same seed (csrc/core/philox.h).
    """
    if p == 0.0:
        return x
    seed = draw_seed(x.device) if seed is None else seed
    return _Dropout.apply(x, p, seed) if wants_grad(x) else _ops.dropout(x, p, seed)


def low_rank(x: Tensor, lora: LowRank) -> Tensor:
    """scaling * drop(x) A^T B^T [..., N], with gradients: the branch alone, for adapters beyond the
    first.

    Args:
        x: [..., K]; its dtype is the dtype of the computation and of the result.
        lora: the adapter.
    """
    s = torch.nn.functional.linear(dropout(x, lora.dropout_p, lora.seed), lora.A.to(x.dtype))
    return torch.nn.functional.linear(s, lora.B.to(x.dtype)) * lora.scaling


def rows_of(x: Tensor) -> Any:
    """Product of all sizes but the last (also when one of them is 0)."""
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


@torch.library.register_fake("fastpeft::dropout")
def _(x, p, seed):
    check_one_device(x=x, seed=seed)
    return x.new_empty(x.shape)


@torch.library.register_fake("fastpeft::lora_wgrad")
def _(dy, x, s, lora_A, lora_B, scaling, dropout_p, seed):
    check_one_device(x=x, dy=dy, s=s, lora_A=lora_A, lora_B=lora_B, seed=seed)
    return (
        lora_A.new_empty(lora_A.shape),
        lora_A.new_empty(lora_B.shape),
        x.new_empty([rows_of(x), lora_A.shape[0]]),
    )
