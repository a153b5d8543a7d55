"""Plug adapters into a model, switch them, unplug them: the model is then what it was, bit for bit.

Nothing here knows a method by name: `methods.method.METHODS` finds it by the class of the
configuration. What is attached is written down in one plain object on the model (`state_of`), which
deepcopy and pickle take along.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastpeft import checkpointing, copies, distributed
from fastpeft.errors import AdapterError, StateError, refuse
from fastpeft.methods.method import METHODS, Method, method_of
from fastpeft.methods.rows import Rows
from fastpeft.patterns import near_names, plain_parameters

_STATE = "_fastpeft"
_GOOD_NAME = re.compile(r"[^./\\\x00]+")


@dataclass
class Attached:
    """One adapter: its method's name in METHODS, its configuration with defaults filled in, whether
    it may train.
    """

    method: str
    config: Any
    trainable: bool = True


@dataclass
class State:
    """What is attached to a model.

    adapters: by name, in the order they came.
    active: names of those that take part in the forward pass.
    requires_grad: {plain parameter name: flag} of the bare model before the first attach.
    merged: name of the adapter folded into the base weights, or None.
    rows: inside `adapter_ids`: which row of the batch goes through which adapter; else None.
    told_ddp: the first attach told DDP about packed weights (quantize had not).
    """

    adapters: dict[str, Attached] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    requires_grad: dict[str, bool] = field(default_factory=dict)
    merged: str | None = None
    rows: Rows | None = None
    told_ddp: bool = False


class Adapters(dict[str, Any]):
    """{adapter name: configuration}; `active` has the names in use, and printing marks them with a
    star.
    """

    def __init__(self, state: State | None) -> None:
        super().__init__({name: a.config for name, a in state.adapters.items()} if state else {})
        self.active: tuple[str, ...] = state.active if state else ()

    def __repr__(self) -> str:
        rows = [
            f"{'* ' if name in self.active else '  '}{name}: {config}"
            for name, config in self.items()
        ]
        return "\n".join(rows) or "no adapter attached"


def attach(
    model: nn.Module, config: Any, name: str = "default", *, trainable: bool = True
) -> nn.Module:
    """Add an adapter, freeze everything else, make it the one active adapter.

    Args:
        model: any nn.Module, dense or quantised, with or without other adapters. Changed in place.
        config: configuration of a registered method, for example `LoRA(r=16)`. Not changed;
            `adapters(model)` shows it with its defaults filled in.
        name: what to call it; not empty, no ".", no path separator, not taken.
        trainable: whether its parameters get gradients while it is active.

    Returns:
        `model` itself.

    Raises:
        ConfigError: unknown configuration class, or nothing in the model that fits; AdapterError:
        bad or taken name;
        StateError: an adapter is merged. After an error the model is as before.
    """
    add(model, config, name, trainable)
    return activate(model, name)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove an adapter with all it added. After the last one the model is as before the first
    attach, bit for bit: the same module objects, the same values, the same requires_grad flags.

    Args:
        name: which one; None means the only one attached.

    Raises:
        AdapterError: no such adapter; StateError: it is merged.
    """
    state, name = named(model, name)
    refuse_merged(state, f"detach adapter '{name}'")
    remove(model, name)
    if state.adapters:
        activate(model, state.active)
    return model


def activate(model: nn.Module, names: str | Iterable[str] | None) -> nn.Module:
    """Choose which adapters take part: one name, several, or None for the bare base.

    The parameters of the chosen ones get gradients (unless attached with trainable=False), those of
    the others do not.

    Raises:
        AdapterError: a name that is not attached, or the same twice; StateError: an adapter is
        merged, or two chosen ones replace the same module (modules_to_save).
    """
    state = state_of(model)
    wanted = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    if state is None and not wanted:
        return model
    for name in wanted:
        named(model, name)
    if len(set(wanted)) != len(wanted):
        raise refuse(
            AdapterError, "names", repr(list(wanted)), "each name once", "Remove the repetition."
        )
    refuse_merged(state, "activate adapters")
    switch(model, state, wanted)
    before, state.active = state.active, wanted
    for name in before:
        _let_train(model, name, False)
    for name in wanted:
        _let_train(model, name, state.adapters[name].trainable)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes as the bare base, bit for bit; gradient flags stay as
    they are.

    Raises:
        StateError: an adapter is merged into the base.
    """
    state = state_of(model)
    if state is None:
        yield model
        return
    refuse_merged(state, "show the bare base")
    before, rows = state.active, state.rows
    switch(model, state, ())
    state.active = ()
    try:
        yield model
    finally:
        known = tuple(name for name in before if name in state.adapters)
        switch(model, state, known, rows)
        state.active = known


def add(model: nn.Module, config: Any, name: str, trainable: bool = True) -> None:
    """The first half of `attach`: the adapter is there, but inactive."""
    state = state_of(model) or State()
    check_name(name, state)
    refuse_merged(state, f"attach adapter '{name}'")
    method = method_of(config)
    saved = copies.check_copies(model, config)
    flags = {key: p.requires_grad for key, p in plain_parameters(model)}
    if not state.adapters:
        state.requires_grad = flags
    try:
        resolved = method.attach(model, config, name)
    except BaseException:
        _set_flags(model, flags)
        raise
    copies.add_copies(saved, name)
    if not state.adapters:
        for _, parameter in plain_parameters(model):
            parameter.requires_grad_(False)
        state.told_ddp = distributed.keep_local(model)
    state.adapters[name] = Attached(method.name, resolved, trainable)
    model.__dict__[_STATE] = state
    _let_train(model, name, False)
    checkpointing.add_hooks(model)


def remove(model: nn.Module, name: str) -> None:
    """The first half of `detach`: the adapter is gone; after the last one all is as before the
    first attach.
    """
    state, name = named(model, name)
    method_named(state, name).detach(model, name)
    copies.remove_copies(model, name)
    del state.adapters[name]
    state.active = tuple(other for other in state.active if other != name)
    if state.adapters:
        return
    forget(model)
    _set_flags(model, state.requires_grad)


def forget(model: nn.Module) -> None:
    """Take away the note of what is attached, and its hooks: the last step of `detach` and of
    `merge.settle`."""
    checkpointing.remove_hooks(model)
    if model.__dict__.pop(_STATE).told_ddp:
        distributed.forget_local(model)


def adapters(model: nn.Module) -> Adapters:
    """{name: configuration} of what is attached, in the order it came; `.active` has the names in
    use.
    """
    return Adapters(state_of(model))


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """{plain name: Parameter} of all that adapter `name` trains, its modules_to_save included."""
    state, name = named(model, name)
    return {
        **method_named(state, name).parameters(model, name),
        **copies.copy_parameters(model, name),
    }


def state_of(model: nn.Module) -> State | None:
    """What is attached to `model`, or None."""
    return model.__dict__.get(_STATE)


def method_named(state: State, name: str) -> Method:
    """The method object of adapter `name`."""
    return METHODS[state.adapters[name].method]


def check_name(name: Any, state: State | None) -> None:
    """AdapterError unless `name` can be a new adapter's: text, not empty, no "." or path separator,
    not taken.
    """
    usable = isinstance(name, str) and _GOOD_NAME.fullmatch(name) and name == name.strip()
    if not usable or hasattr(nn.ModuleDict, name) or name == "training":
        raise refuse(
            AdapterError,
            "adapter name",
            repr(name),
            "text that is not empty, without '.', '/', '\\' and outer blanks",
            "Choose another name.",
        )
    if state is not None and name in state.adapters:
        raise refuse(
            AdapterError,
            "adapter name",
            f"'{name}', which is attached already",
            "a new name",
            f"Choose another name, or detach(model, '{name}') first.",
        )


def named(model: nn.Module, name: str | None) -> tuple[State, str]:
    """The state and the adapter meant by `name`; AdapterError tells what there is."""
    state = state_of(model)
    if state is None:
        raise refuse(
            AdapterError,
            "adapter",
            repr(name),
            "an attached adapter",
            "None is attached: attach() first.",
        )
    if name is None:
        if len(state.adapters) > 1:
            raise refuse(
                AdapterError,
                "adapter",
                "no name",
                "one of several",
                f"Say which: {_listed(state)}.",
            )
        return state, next(iter(state.adapters))
    if name not in state.adapters:
        raise refuse(
            AdapterError,
            "adapter",
            repr(name),
            f"one of {_listed(state)}",
            near_names(str(name), state.adapters),
        )
    return state, name


def _let_train(model: nn.Module, name: str, flag: bool) -> None:
    """Set the gradient flag of what adapter `name` trains."""
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(flag)


def _set_flags(model: nn.Module, flags: dict[str, bool]) -> None:
    """Give every parameter of the bare model the flag it had; quantised ones are gone."""
    for key, parameter in plain_parameters(model):
        if key in flags:
            parameter.requires_grad_(flags[key])


def _listed(state: State) -> str:
    return ", ".join(f"'{name}'" for name in state.adapters)


def switch(
    model: nn.Module, state: State, names: tuple[str, ...], rows: Rows | None = None
) -> None:
    """Tell every method which of its adapters are on, for all rows of a batch or by row."""
    copies.activate_copies(model, names)  # first: it alone can refuse
    mixes, state.rows = rows is not None or state.rows is not None, rows
    for method in {attached.method: None for attached in state.adapters.values()}:
        METHODS[method].activate(
            model, tuple(n for n in names if state.adapters[n].method == method)
        )
        if mixes and METHODS[method].mix is not None:
            METHODS[method].mix(model, rows)


def refuse_merged(state: State, deed: str) -> None:
    """StateError if an adapter is in the base weights now."""
    if state.merged is not None:
        raise refuse(
            StateError,
            f"adapter '{state.merged}'",
            "merged into the base weights",
            f"an unmerged model to {deed}",
            "Call unmerge(model) first.",
        )
