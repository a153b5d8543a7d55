"""Autocast for layers: operators see one dtype, so x is cast once, where a layer begins."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """x in the autocast dtype of its device where autocast is on, else x itself.

    Args:
        x: any shape. float64 and integers are left alone, as torch's own autocast leaves them.
    """
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))
