"""Rows: which rows of a batch go through which adapter, and how a linear layer computes them.

The base runs once for the whole batch; each adapter adds its branch to its own rows, so a batch of
many adapters costs the base once and each low-rank product once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import AdapterError, refuse
from ..ops.autocast import autocast_input
from ..ops.lora import LowRank


class Rows:
    """An adapter's name, or None for the base, for each row of a batch.

    A layer whose input has F times as many rows (a model that flattens batch and sequence) takes
    each name for F rows that follow each other.

    Args:
        names: one for each row.
    """

    def __init__(self, names: tuple[str | None, ...]) -> None:
        self.names = names
        self._indices: dict[tuple[Any, ...], Tensor] = {}

    def repeats(self, x: Tensor) -> int:
        """F for a layer's input.

        Raises:
            AdapterError: x.shape[0] is no multiple of the number of names.
        """
        if x.dim() < 2 or x.shape[0] % len(self.names):
            raise refuse(
                AdapterError,
                "adapter_ids",
                f"{len(self.names)} ids for a layer's input of shape {list(x.shape)}",
                "one id for each row of the batch",
                "Give as many ids as input_ids has rows. A layer that sees other rows (pooled, "
                "routed to experts) cannot tell whose they are.",
            )
        return x.shape[0] // len(self.names)

    def groups(self, known: Collection[str], x: Tensor) -> list[tuple[str, Tensor | None]]:
        """[(name, rows of x, int64 [m])] for the names that are in `known`; None: all rows."""
        repeats = self.repeats(x)
        wanted = [name for name in dict.fromkeys(self.names) if name is not None and name in known]
        if len(wanted) == 1 and set(self.names) == set(wanted):
            return [(wanted[0], None)]
        return [(name, self._index((name,), repeats, x.device)) for name in wanted]

    def places(self, known: Collection[str], x: Tensor) -> Tensor:
        """int64 [rows of x]: 1 + the position in `known` of the row's adapter, 0 where it is not
        there."""
        return self._index(tuple(known), self.repeats(x), x.device, of_places=True)

    def _index(
        self, known: tuple[str, ...], repeats: int, device: torch.device, of_places: bool = False
    ) -> Tensor:
        key = (known, repeats, device, of_places)
        if key not in self._indices:  # a copy to the device once a batch, not once a layer
            seats = [known.index(name) + 1 if name in known else 0 for name in self.names]
            whole = torch.tensor(seats).repeat_interleave(repeats)
            found = whole if of_places else whole.nonzero().flatten()
            self._indices[key] = found.to(device)
        return self._indices[key]


def low_rank_by_rows(
    layer: nn.Module, x: Tensor, rows: Rows, base: Callable[[Tensor, LowRank | None], Tensor]
) -> Tensor:
    """[B, ..., K] -> [B, ..., N]: row b of the base's output plus the branch of b's adapter.

    Args:
        layer: has `adapters`, {name: LoRAAdapter}; a name that is not there leaves the base.
        x: input.
        rows: who goes where.
        base: (x, branch to compute in the same pass, or None) -> the base's output.
    """
    adapters = layer.adapters._modules
    groups = rows.groups(adapters, x)
    if len(groups) == 1 and groups[0][1] is None:
        adapter = adapters[groups[0][0]]
        return _add_bias(base(x, adapter.low_rank()), adapter)
    y = base(x, None)
    x = autocast_input(x)
    for name, index in groups:
        branch = ops.lora.low_rank(x.index_select(0, index), adapters[name].low_rank())
        branch = _add_bias(branch, adapters[name]).to(y.dtype)
        # autograd keeps the sum before this one; without it nobody else reads y
        add = y.index_add if torch.is_grad_enabled() else y.index_add_
        y = add(0, index, branch)
    return y


def _add_bias(y: Tensor, adapter: nn.Module) -> Tensor:
    return y + (adapter.lora_B.bias * adapter.scaling).to(y.dtype) if adapter.lora_bias else y


def scale_by_rows(x: Tensor, vectors: dict[str, Tensor], rows: Rows) -> Tensor:
    """x [B, ..., K] with row b multiplied by the vector [K] of its adapter, in x's dtype; rows of
    others stay as they are, bit for bit."""
    if not vectors:
        return x
    stacked = torch.stack([torch.ones_like(next(iter(vectors.values()))), *vectors.values()])
    factors = stacked.index_select(0, rows.places(vectors, x))
    return (x * factors.view(x.shape[0], *[1] * (x.dim() - 2), -1)).to(x.dtype)
