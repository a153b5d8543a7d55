"""Starts of A and B that look at the weight: PiSSA, OLoRA, LoftQ.

PiSSA (Meng et al. 2024) and OLoRA (Buyukakyuz 2024) train the leading part of W and keep the rest:

    y = (W - s B0 A0) x + s B A x = W x + s (B A - B0 A0) x

W is left as it is and the second form is computed, an operator of rank 2 R with A0, B0 frozen (the
"anchor"). The gradients are those of the first form; the bare base, other adapters and detach need
no copy of W, and any format will do. A file holds [A; A0] and [B, -B0] as a LoRA of rank 2 R, the
form that peft converts such adapters to. Loaded, it trains as that: an optimizer's state saved
beside it has the shapes of rank R and fits no more.

LoftQ (Li et al. 2023, one iteration): s B A is the best approximation of rank R of what quantising
took from W. So it starts when an attached layer is quantised: only then both are known.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import ConfigError, refuse
from ..quant.frozen import QuantizedLinear

_NITER = re.compile(r"pissa_niter_(\d+)")


def is_anchored(init: object) -> bool:
    """Whether this init_lora_weights trains a part of W, and so needs an anchor."""
    return init in ("pissa", "olora") or (
        isinstance(init, str) and _NITER.fullmatch(init) is not None
    )


def is_mode(init: object) -> bool:
    """Whether this is an init_lora_weights of this file."""
    return is_anchored(init) or init == "loftq"


@torch.no_grad()
def start_from_weight(adapter: nn.Module, base: nn.Module, init: bool | str) -> None:
    """Fills lora_A, lora_B and the anchor from the base's weight; leaves other modes alone.

    Raises:
        ConfigError: the rank is above min(N, K), or LoftQ over a base that is quantised already.
    """
    if init == "loftq":
        if isinstance(base, QuantizedLinear):
            raise refuse(
                ConfigError,
                "init_lora_weights",
                "'loftq' over a quantised layer",
                "a dense one",
                "Attach first, then quantize: the error is known only while W is. Or attach with "
                "True and call fastpeft.loftq(model, weights).",
            )
        return
    if not is_anchored(init):
        return
    A, B = adapter.lora_A.weight, adapter.lora_B.weight
    least = min(adapter.lora_A.in_features, adapter.lora_B.out_features)
    if adapter.r > least:
        raise refuse(
            ConfigError, "r", adapter.r, f"at most min(in, out) = {least}", f"{init!r} needs it."
        )
    if not A.is_meta:
        W = base.dequantize(torch.float32) if isinstance(base, QuantizedLinear) else base.weight
        W = W.detach().to(torch.promote_types(A.dtype, torch.float32))
        B0, A0 = _parts(W, adapter.r, adapter.scaling, str(init))
        A.copy_(A0)
        B.copy_(B0)
    adapter.anchor_A, adapter.anchor_B = A.detach().clone(), -B.detach()


def _parts(W: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """B [N, r], A [r, K] of the part of W [N, K] that trains."""
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return Q[:, :r], R[:r]
    if found := _NITER.fullmatch(init):
        U, S, V = torch.svd_lowrank(W, r, niter=int(found[1]))
        return _balanced(U, S / scaling, V.t())
    return best(W, r, scaling)


def best(M: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B [N, r], A [r, K] with scaling * B A the nearest to M [N, K] of that rank."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return _balanced(U[:, :r], S[:r] / scaling, Vh[:r])


def _balanced(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    root = S.sqrt()
    return U * root, root[:, None] * Vh


@torch.no_grad()
def compensate(adapter: nn.Module, dense: Tensor, packed: QuantizedLinear) -> None:
    """LoftQ: A and B from what quantising `dense` [N, K] to `packed` lost; what is above rank
    min(N, K) is zero.

    Nothing is done to an adapter that was trained or loaded since (its B is not zero any more).
    """
    A, B = adapter.lora_A.weight, adapter.lora_B.weight
    if dense.is_meta or packed.codes.is_meta or bool(B.any()):
        return
    lost = dense.detach().to(A.device, torch.float32) - packed.dequantize(torch.float32)
    B0, A0 = best(lost, adapter.r, adapter.scaling)
    A.zero_()[: A0.shape[0]].copy_(A0)
    B.zero_()[:, : B0.shape[1]].copy_(B0)
