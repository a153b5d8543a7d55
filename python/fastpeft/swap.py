"""swap: other values in an attached adapter, in place, so that compiled code and captured CUDA
graphs stay valid.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft import diagnose
from fastpeft.attach import State, method_named, named, refuse_merged
from fastpeft.errors import AdapterError, StateError, refuse
from fastpeft.files import open_folder
from fastpeft.io import file_targets, read_config, read_tensors, tensors_of

# Fields of a configuration that change nothing once the tensors are there. What an adapter sits on
# is seen in the names of its tensors.
_FREE = frozenset(
    (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "feedforward_modules",
        "rank_pattern",
        "lora_dropout",
        "dropout",
        "task_type",
        "base_model_name_or_path",
        "encoder_hidden_size",
        "tokenizer_name_or_path",
    )
)
_FREE_STARTS = ("init_", "prompt_tuning_init")


def swap(
    model: nn.Module,
    name: str,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    allow_pickle_weights_only: bool = False,
) -> nn.Module:
    """Give the attached adapter `name` the values of another one of the same shapes.

    The values are copied into the tensors that are there: what torch.compile made is not compiled
    again, a captured CUDA graph replays with the new values. Which adapters are active, gradient
    flags and dropout stay; an optimizer keeps its moments.

    Args:
        model: what the adapter is attached to.
        name: which adapter.
        source: an adapter folder, as for `load_adapter`, or {plain name: tensor} of any device and
            float dtype, as `adapter_state` gives it.
        allow_pickle_weights_only: see `load_adapter`.

    Returns:
        `model` itself.

    Raises:
        AdapterError: no such adapter; a folder of another method or with another option that
        changes what is computed (lora_alpha, use_rslora, ...), for such numbers are constants of
        compiled code; missing, unexpected, misshapen or not finite tensors. Nothing is changed
        then.
        StateError: an adapter is merged, or this one is the whole model.
    """
    state, name = named(model, name)
    refuse_merged(state, f"swap adapter '{name}'")
    if method_named(state, name).save is not None:
        raise refuse(
            StateError,
            f"adapter '{name}'",
            f"method {method_named(state, name).name}, whose file is a whole model",
            "an adapter beside the base",
            "Load it with load_adapter().",
        )
    if isinstance(source, Mapping):
        values, targets = _from_state(model, name, source)
    else:
        values, targets = _from_folder(model, state, name, source, allow_pickle_weights_only)
    if any(target.is_inference() for target in targets.values()):
        raise refuse(
            StateError,
            f"adapter '{name}'",
            "one that stands on a part of the base's weight (PiSSA, OLoRA)",
            "an adapter whose file is its parameters",
            "Save it and load it: it is a plain LoRA then.",
        )
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(values[key])
    return model


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """{plain name: copy of the tensor} of adapter `name`, for `swap`: keep many adapters of one
    shape, on any device, and plug in one after the other.

    Args:
        model: what the adapter is attached to.
        name: which one; None means the only one.

    Raises:
        AdapterError: no such adapter.
    """
    _, name = named(model, name)
    return {key: value.detach().clone() for key, value in tensors_of(model, name).items()}


def _from_state(
    model: nn.Module, name: str, source: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    targets, label = tensors_of(model, name), f"swap of adapter '{name}'"
    for key, tensor in source.items():
        diagnose.check_tensor(key, tensor, label)
    diagnose.compare(targets, source, label)
    return source, targets


def _from_folder(
    model: nn.Module, state: State, name: str, path: str | os.PathLike[str], pickle: bool
) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    folder = open_folder(path)
    config, method = read_config(folder)
    attached, label = state.adapters[name], f"adapter folder '{folder}'"
    if method.name != attached.method:
        raise refuse(
            AdapterError,
            label,
            f"method {method.name}",
            f"{attached.method}, that of adapter '{name}'",
            "Load it under a name of its own by load_adapter().",
        )
    _compare_configs(attached.config, config, label)
    tensors = read_tensors(folder, method, pickle)
    return tensors, file_targets(model, name, folder, tensors)


def _compare_configs(attached: Any, given: Any, label: str) -> None:
    for item in dataclasses.fields(attached):
        if item.name in _FREE or item.name.startswith(_FREE_STARTS):
            continue
        old, new = getattr(attached, item.name), getattr(given, item.name)
        if old is not None and new is not None and old != new:
            raise refuse(
                AdapterError,
                f"{label}, {item.name}",
                repr(new),
                f"{old!r}, as attached",
                "It changes what is computed: load it under a name of its own by load_adapter().",
            )
