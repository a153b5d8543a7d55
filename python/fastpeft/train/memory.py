"""Memory of this process or of the GPU: now, at its peak, since when."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch


def memory_bytes(device: torch.device) -> int:
    """Peak memory since the last `reset_peak`: allocated on the GPU, or resident in this
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def reset_peak(device: torch.device) -> None:
    """Lets the peak begin at what is in use now. On the CPU Linux alone can: elsewhere the peak
    stays that of the whole process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # The C library keeps freed memory, such as the dense weights of a base that was quantised
    # since; it would count as resident.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: the peak of the resident set
    except OSError:
        return


def resident_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on the GPU, or resident in this process (0 where the system does
    not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
