"""How kernels are launched, and which: switches and facts of the process, without tensors."""

from __future__ import annotations

import torch

from .._library import load
from .quant import FORMAT_IDS

load()
_ops = torch.ops.fastpeft


def dependent_launch(on: bool | None = None) -> bool:
    """Programmatic dependent launch (compute capability 9.0 and newer): a kernel of fastpeft starts
    while the one before it on the stream ends, and waits only before it reads activations. Results
    are the same bits either way. A CUDA graph keeps what held when it was captured.

    Args:
        on: switches it for the whole process; None leaves it. At start it is on, unless the
            environment says FASTPEFT_PDL=0.

    Returns:
        Whether it is on now; always False where only CPU kernels were built.
    """
    return _ops.dependent_launch(on)


def plan_text(
    M: int,
    N: int,
    K: int,
    R: int = 0,
    format: str = "nf4",
    blocksize: int = 64,
    direction: str = "fwd",
    dtype: torch.dtype = torch.bfloat16,
    is_cuda: bool = False,
) -> str:
    """One line: the problem and the kernel that serves it on the current CUDA device or the CPU
    (csrc/core/plan.h). `fastpeft plan` tells more, for any device, where fastpeft._C is built.
    """
    direction_id = ("fwd", "dgrad").index(direction)
    return _ops.plan_text(is_cuda, M, N, K, R, FORMAT_IDS[format], blocksize, direction_id, dtype)
