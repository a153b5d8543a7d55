"""Fold an adapter into the base weights, and take it out again exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from fastpeft.attach import activate, forget, method_named, named, state_of, switch
from fastpeft.copies import TrainedCopy
from fastpeft.errors import StateError, refuse
from fastpeft.methods import METHODS
from fastpeft.patterns import places
from fastpeft.report import table


@dataclass
class MergeReport:
    """What `merge` did.

    name: the adapter.
    errors: {plain module name: |stored - exact| / |exact| (Frobenius norms) of the merged weight};
        0 where it is stored as computed.
    """

    name: str
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the largest error, and that error."""
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        module, error = self.worst
        return table(
            [
                ("merged", f"adapter '{self.name}' into {len(self.errors)} layers"),
                ("largest relative error", f"{error:.3e} {module}"),
            ]
        )


def merge(model: nn.Module, name: str | None = None, requantize: bool = False) -> MergeReport:
    """Fold adapter `name` into the base: the model computes the same without the adapter's extra
    work.

    Other adapters are switched off and everything is frozen until `unmerge`.

    Args:
        model: what the adapter is attached to.
        name: which adapter; None means the only one.
        requantize: on a quantised base, quantise the merged weight again, which changes outputs
            (the report says how much). Otherwise the merged weight is kept dense: the exact
            dequantised weight plus the adapter's product.

    Raises:
        AdapterError: no such adapter; StateError: one is merged already, or its method has no
        merge.
    """
    state, name = named(model, name)
    if state.merged is not None:
        raise refuse(
            StateError,
            f"adapter '{name}'",
            f"a model into which '{state.merged}' is merged already",
            "an unmerged one",
            "Call unmerge(model) first.",
        )
    method = method_named(state, name)
    if method.merge is None or method.unmerge is None:
        mergeable = [other.name for other in METHODS.values() if other.merge is not None]
        raise refuse(
            StateError,
            f"adapter '{name}'",
            f"method '{method.name}', which has no merge",
            f"one of a method that has: {', '.join(mergeable)}",
            "Keep it attached.",
        )
    switch(model, state, (name,))
    try:
        report = MergeReport(name, method.merge(model, name, requantize))
    except BaseException:
        switch(model, state, state.active)
        raise
    state.merged = name
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return report


def unmerge(model: nn.Module) -> nn.Module:
    """Take the merged adapter out again: the base is bit for bit what it was, and what was active
    is active again.

    Raises:
        StateError: nothing is merged.
    """
    state = state_of(model)
    if state is None or state.merged is None:
        raise refuse(
            StateError, "model", "no merged adapter", "one", "Call merge(model, name) first."
        )
    method = method_named(state, state.merged)
    method.unmerge(model, state.merged)
    state.merged = None
    return activate(model, state.active)


def settle(model: nn.Module) -> nn.Module:
    """Make a merge final: the merged weights are the model's own, nothing of the adapter is left,
    and it can be saved as a plain model.

    Raises:
        StateError: nothing is merged, or other adapters are attached too.
    """
    state = state_of(model)
    if state is None or state.merged is None or len(state.adapters) > 1:
        got = "no merged adapter" if state is None or state.merged is None else "other adapters too"
        advice = "Call merge(model, name) first, and detach the others before it."
        raise refuse(StateError, "model", got, "one adapter, merged", advice)
    for place in list(places(model)):
        parent, attribute, outer = place.chain[0]
        copy = place.wrapper(TrainedCopy)
        inner = place.module if copy is None else copy.module_in_use
        if inner is not outer:
            setattr(parent, attribute, inner)
    forget(model)
    return model
