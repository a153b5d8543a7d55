"""Rows: which rows of a batch go through which adapter, and how a linear layer computes them.

The base runs once for the whole batch; each adapter adds its branch to its own rows, so a batch of
many adapters costs the base once and each low-rank product once. DoRA scales the base's output
without the bias, so its rows run through the base a second time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import AdapterError, refuse
from ..ops.autocast import autocast_input


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
        wanted = [name for name in dict.fromkeys(self.names) if name is not None and name in known]
        if not wanted:
            return []  # whoever's rows these are
        repeats = self.repeats(x)
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


def low_rank_by_rows(layer: nn.Module, x: Tensor, rows: Rows) -> Tensor:
    """[B, ..., K] -> [B, ..., N]: row b is what the layer computes with b's adapter active.

    Args:
        layer: has `adapters`, {name: adapter with low_rank()}, and `compute(x, names)`; a name that
            is not there leaves the base.
        x: input; ids [B, ...] for an embedding.
        rows: who goes where.
    """
    adapters = layer.adapters._modules
    groups = rows.groups(adapters, x)
    if len(groups) == 1 and groups[0][1] is None:
        return layer.compute(x, (groups[0][0],))
    y = layer.compute(x, ())
    # autograd keeps what was there before; without it nobody else reads y
    is_recorded = torch.is_grad_enabled()
    for name, index in groups:
        adapter, own = adapters[name], x.index_select(0, index)
        if (
            adapter.use_dora or not x.is_floating_point()
        ):  # no sum of base and branch, or a cheap one
            whole = layer.compute(own, (name,)).to(y.dtype)
            y = (y.index_copy if is_recorded else y.index_copy_)(0, index, whole)
            continue
        branch = ops.lora.low_rank(autocast_input(own), adapter.low_rank())
        if adapter.lora_bias:
            branch = branch + (adapter.lora_B.bias * adapter.scaling).to(branch.dtype)
        y = (y.index_add if is_recorded else y.index_add_)(0, index, branch.to(y.dtype))
    return y


def scale_by_rows(x: Tensor, vectors: dict[str, Tensor], rows: Rows) -> Tensor:
    """x [B, ..., K] with row b multiplied by the vector [K] of its adapter, in x's dtype; rows of
    others stay as they are, bit for bit."""
    if not vectors:
        return x
    stacked = torch.stack([torch.ones_like(next(iter(vectors.values()))), *vectors.values()])
    factors = stacked.index_select(0, rows.places(vectors, x))
    return (x * factors.view(x.shape[0], *[1] * (x.dim() - 2), -1)).to(x.dtype)
