"""Autocast for layers: operators see one dtype, so x is cast once, where a layer begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for that kind of device; False for kinds that have none (meta)."""
    # not torch.amp.is_autocast_available: torch 2.11 cannot trace it in a compiled graph
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(backward: Any) -> Any:
    """Decorates a backward(ctx, dy): gradients are computed in the dtypes of the forward pass, also
    where backward() is called under autocast.
    """

    def run(ctx: Any, dy: Tensor) -> Any:
        if is_autocast_on(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return backward(ctx, dy)
        return backward(ctx, dy)

    return run


def autocast_input(x: Tensor) -> Tensor:
    """x in the autocast dtype of its device where autocast is on, else x itself.

    Args:
        x: any shape. float64 and integers are left alone, as torch's own autocast leaves them.
    """
    if not is_autocast_on(x.device.type):
        return x
    if not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
