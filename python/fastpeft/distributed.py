"""Packed weights under DistributedDataParallel: every process has loaded the same ones, so nothing
is gained by sending them, which DDP does with all buffers before each forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastpeft.patterns import is_quantized

_MARK = "_ddp_params_and_buffers_to_ignore"  # DDP reads it when it wraps the model


class LocalBuffers:
    """Names of the buffers of a model's quantised layers, as they are when somebody asks: adapters
    that come and go change them.

    Args:
        model: whose names they are.
        others: names that were there before.
    """

    def __init__(self, model: nn.Module, others: tuple[str, ...] = ()) -> None:
        self.model = model
        self.others = others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        for name, module in self.model.named_modules():
            if is_quantized(module):
                buffers = module.named_buffers(name, recurse=False)
                yield from (key for key, _ in buffers)


def keep_local(model: nn.Module) -> bool:
    """Tell DDP to leave packed weights alone; whether that was new. Nothing is said for a model
    without quantised layers."""
    before: Any = getattr(model, _MARK, ())
    if isinstance(before, LocalBuffers) or not any(map(is_quantized, model.modules())):
        return False
    model.__dict__[_MARK] = LocalBuffers(model, tuple(before))
    return True


def forget_local(model: nn.Module) -> None:
    """Undo `keep_local`."""
    found = model.__dict__.pop(_MARK, None)
    if isinstance(found, LocalBuffers) and found.others:
        model.__dict__[_MARK] = list(found.others)
