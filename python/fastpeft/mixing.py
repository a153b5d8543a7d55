"""adapter_ids: a batch whose rows go through different adapters."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fastpeft import copies
from fastpeft.attach import State, method_named, named, refuse_merged, state_of, switch
from fastpeft.errors import AdapterError, StateError, refuse
from fastpeft.methods.method import METHODS
from fastpeft.methods.rows import Rows
from fastpeft.patterns import near_names

# Arguments of a model's forward that have one row for each row of the batch, in order of trust.
_BATCHED = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "input_features",
    "pixel_values",
)


@contextlib.contextmanager
def adapter_ids(model: nn.Module, ids: Iterable[str | int | None] | Tensor) -> Iterator[nn.Module]:
    """Within the block row b of every batch goes through adapter ids[b], whatever is active.

        with fastpeft.adapter_ids(model, ["poems", None, "law"]):
            model.generate(input_ids)                       # input_ids [3, L]

    Equal, up to rounding, to running each row alone with its adapter active; the base is computed
    once for all rows. For LoRA, IA3 and bottleneck adapters, also mixed in one batch. Gradient
    flags stay as they are: activate(model, names) of all in the batch before makes all of them
    train. A checkpointed forward pass runs again in backward(), which has to be inside the block
    then.

    Args:
        model: with adapters attached.
        ids: one for each row of the batch: an adapter's name, its index in `adapters(model)`, or
            None for the bare base. int64 tensors are read too. Where generate() multiplies the rows
            (num_beams, num_return_sequences) each id has to be given as many times in sequence.

    Raises:
        AdapterError: an id that is no adapter, or another number of ids than the batch has rows
            (raised by the model's forward); StateError: an adapter is merged, or a named one cannot
            share a batch: its method changes more than rows of a layer's output, or it has
            modules_to_save.
    """
    state = state_of(model)
    if state is None:
        named(model, None)  # says that nothing is attached
    names = _names(state, list(ids.tolist() if isinstance(ids, Tensor) else ids))
    refuse_merged(state, "mix adapters in a batch")
    for name in dict.fromkeys(name for name in names if name is not None):
        _check_mixes(model, state, name)
    before = state.active, state.rows
    hook = model.register_forward_pre_hook(_check_batch(len(names)), with_kwargs=True)
    try:
        switch(model, state, (), Rows(names))
        state.active = ()
        yield model
    finally:
        hook.remove()
        known = tuple(name for name in before[0] if name in state.adapters)
        switch(model, state, known, before[1])
        state.active = known


def _names(state: State, ids: list[Any]) -> tuple[str | None, ...]:
    """Each id as a name or None."""
    known, found = list(state.adapters), []
    listed = ", ".join(f"{index} '{name}'" for index, name in enumerate(known))
    for row, given in enumerate(ids):
        name = given
        if given is not None and not isinstance(given, str):
            try:
                index = -1 if isinstance(given, bool) else operator.index(given)
            except TypeError:
                index = -1
            name = known[index] if 0 <= index < len(known) else given
        if name is not None and name not in state.adapters:
            near = f"{near_names(name, known)} " if isinstance(name, str) else ""
            raise refuse(
                AdapterError,
                f"adapter_ids[{row}]",
                repr(given),
                f"a name or index of {listed}, or None for the base",
                f"{near}Attach or load that adapter first, or correct the id.",
            )
        found.append(name)
    if not found:
        raise refuse(
            AdapterError, "adapter_ids", "no id", "one for each row of the batch", "Name them."
        )
    return tuple(found)


def _check_mixes(model: nn.Module, state: State, name: str) -> None:
    method = method_named(state, name)
    if method.mix is None:
        able = ", ".join(sorted(m.name for m in METHODS.values() if m.mix is not None))
        raise refuse(
            StateError,
            f"adapter '{name}' in adapter_ids",
            f"method {method.name}",
            f"one of {able}: others act on more than single rows of a layer's output",
            f"Run its rows alone, with activate(model, '{name}').",
        )
    saved = list(copies.copy_parameters(model, name))
    if saved:
        raise refuse(
            StateError,
            f"adapter '{name}' in adapter_ids",
            f"whole modules of its own (modules_to_save: '{saved[0]}', ...)",
            "an adapter without them",
            f"Run its rows alone, with activate(model, '{name}').",
        )


def _check_batch(count: int) -> Any:
    """A forward pre-hook that compares the number of ids with the rows of the batch."""

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs.get(key) for key in _BATCHED] + [*args, *kwargs.values()]
        batch = next((t for t in given if isinstance(t, Tensor) and t.dim() > 0), None)
        if batch is not None and batch.shape[0] != count:
            raise refuse(
                AdapterError,
                "adapter_ids",
                f"{count} ids for a batch of {batch.shape[0]} rows",
                "one id for each row",
                "Where generate() multiplies the rows (num_beams, num_return_sequences), give each "
                "id as many times in sequence.",
            )

    return before
