"""Adapter folders as peft writes and reads them: adapter_config.json, adapter_model.safetensors,
README.md.

One table, LAYOUTS, says how a method's names look in the files, and it is used both ways. Loading
is strict: every tensor of the file must find its parameter and every parameter its tensor, or
nothing is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft import copies, diagnose
from fastpeft.attach import (
    Attached,
    activate,
    add,
    check_name,
    method_named,
    named,
    remove,
    state_of,
)
from fastpeft.errors import AdapterError, ConfigError, refuse
from fastpeft.files import (
    make_folder,
    open_folder,
    read_json,
    read_pickle,
    read_safetensors,
    write_safetensors,
    write_text,
)
from fastpeft.methods.method import Method, method_of_peft_type
from fastpeft.patterns import find_targets
from fastpeft.transposed import is_conv1d

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"

# Fields of adapter_config.json that change no number here, whatever their value.
_INERT = frozenset(
    ("peft_type", "peft_version", "auto_mapping", "revision", "inference_mode", "runtime_config")
)


@dataclass(frozen=True)
class Layout:
    """How one method's adapter looks in peft's files.

    prefix: put before every plain name.
    fields: {our config field: name in adapter_config.json} where they differ.
    inert: fields of the file that we need not know, whatever their value.
    start: {field of the file: value taken when loading}; it only says how weights start.
    refused: {field of the file: values that cannot be loaded}; they need a change of the base that
    is not in the file.
    check: (tensors by plain name, label) -> None; raises on what shapes against the model would not
    show well.
    """

    prefix: str = "base_model.model."
    fields: Mapping[str, str] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    start: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    check: Callable[[Mapping[str, Tensor], str], None] | None = None


LAYOUTS: dict[str, Layout] = {
    "LORA": Layout(
        inert=frozenset(("megatron_core", "qalora_group_size", "fan_in_fan_out", "loftq_config")),
        start={"init_lora_weights": True},
        refused={"init_lora_weights": ("pissa", "olora", "corda", "loftq", "lora_ga")},
        check=diagnose.check_lora_pairs,
    ),
    "PREFIX_TUNING": Layout(  # the file holds the projected prefix, so it loads without the MLP
        prefix="",
        fields={"projection": "prefix_projection"},
        start={"prefix_projection": False},
    ),
}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write adapter `name` to folder `path` in peft's format; `PeftModel.from_pretrained` loads it.

    Each file is written beside its place and renamed, the config last: a crash leaves no half file.
    A README.md that is there already is left alone.

    Args:
        model: what the adapter is attached to.
        path: a folder, made if missing.
        name: which adapter; None means the only one. The name is not part of the files.

    Returns:
        The folder.

    Raises:
        AdapterError: no such adapter, a file in the way, or a tensor that is empty, on meta, or not
        finite.
    """
    attached, method, name = _lookup(model, name)
    layout = LAYOUTS.get(method.peft_type, Layout())
    tensors = _tensors(model, method, name)
    for key, tensor in tensors.items():
        diagnose.check_tensor(key, tensor, f"adapter '{name}'")
    if layout.check is not None:
        layout.check(tensors, f"adapter '{name}'")
    folder = make_folder(path)
    config = _config_to_json(model, attached.config, method, layout)
    write_safetensors(
        folder / WEIGHTS_FILE, {f"{layout.prefix}{key}": t for key, t in tensors.items()}
    )
    if not (folder / CARD_FILE).exists():
        write_text(folder / CARD_FILE, _card(config))
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = True,
    allow_pickle_weights_only: bool = False,
) -> nn.Module:
    """Attach the adapter in folder `path`, with its weights, and make it the active one.

    Args:
        model: the base model, perhaps with other adapters.
        path: a folder written by peft or by `save_adapter`.
        name: what to call it; None means "default".
        trainable: whether it gets gradients while active.
        allow_pickle_weights_only: read adapter_model.bin (torch.load with weights_only) where there
            is no safetensors file.

    Returns:
        `model` itself.

    Raises:
        AdapterError: bad path or file, another base model, missing or unexpected tensors, wrong
        shapes or dtypes, NaN, an option we do not know; ConfigError: an option with an impossible
        value. After an error the model is as before.
    """
    name = "default" if name is None else name
    check_name(name, state_of(model))
    folder = open_folder(path)
    config, method = read_config(folder)
    layout = LAYOUTS.get(method.peft_type, Layout())
    tensors = read_tensors(folder, layout, allow_pickle_weights_only)
    label = f"adapter folder '{folder}'"
    try:
        # The random start is overwritten: leave no trace of it. And the file names what it names.
        with torch.random.fork_rng(devices=_gpus(model)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="target_modules: ")
            add(model, config, name, trainable)
    except ConfigError as error:
        base = getattr(config, "base_model_name_or_path", None)
        raise refuse(
            AdapterError,
            label,
            f"it does not fit this model: {error}",
            "its own base model",
            f"It was made for {base!r}.",
        ) from error
    try:
        targets = _tensors(model, method, name)
        diagnose.compare(targets, tensors, label, getattr(config, "base_model_name_or_path", None))
        with torch.no_grad():
            for key, tensor in tensors.items():
                targets[key].copy_(tensor)
    except BaseException:
        remove(model, name)
        raise
    activate(model, name)
    return model


def read_config(folder: Path) -> tuple[Any, Method]:
    """The configuration object in `folder` and its method.

    Raises:
        AdapterError: not JSON, an unknown peft_type, or a field that is set and that we do not
        know.
        ConfigError: an impossible value, such as r = 0.
    """
    raw = read_json(folder, CONFIG_FILE)
    label = f"file '{folder / CONFIG_FILE}'"
    try:
        method = method_of_peft_type(raw.get("peft_type"))
    except ConfigError as error:
        raise AdapterError(f"{label}: {error}") from error
    layout = LAYOUTS.get(method.peft_type, Layout())
    known = {
        layout.fields.get(f.name, f.name): f.name
        for f in dataclasses.fields(method.config)
        if f.init
    }
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key in known:
            if value is not None and value not in ("", [], {}):  # else our default
                values[known[key]] = layout.start.get(key, value)
        elif key not in _INERT | layout.inert and not _is_unset(value):
            raise refuse(
                AdapterError,
                f"{label}, field '{key}'",
                repr(value)[:80],
                "null, false or empty, for this option is not supported",
                "Load this adapter with peft, or retrain it without the option.",
            )
        if any(
            value == word or str(value).startswith(f"{word}_niter")
            for word in layout.refused.get(key, ())
        ):
            raise refuse(
                AdapterError,
                f"{label}, field '{key}'",
                repr(value),
                "an adapter whose base weights are the original ones",
                "Convert it with peft's path_initial_model_for_weight_conversion first.",
            )
    try:
        return method.config(**values), method
    except (TypeError, AttributeError) as error:  # a value of the wrong kind
        raise refuse(
            AdapterError, label, f"{error}", "fields of the kinds peft writes", "Repair the file."
        ) from error


def read_tensors(folder: Path, layout: Layout, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors in `folder` by plain name, each one checked: a float dtype, not empty, finite."""
    label = f"adapter folder '{folder}'"
    if (folder / WEIGHTS_FILE).exists() or (folder / WEIGHTS_FILE).is_symlink():
        raw = read_safetensors(folder, WEIGHTS_FILE)
    elif not (folder / PICKLE_FILE).exists():
        raise refuse(
            AdapterError, label, f"no {WEIGHTS_FILE}", "one", "Save or download the adapter again."
        )
    elif allow_pickle:
        raw = read_pickle(folder, PICKLE_FILE)
    else:
        raise refuse(
            AdapterError,
            label,
            f"only {PICKLE_FILE}, a pickle",
            WEIGHTS_FILE,
            "Convert it, or pass allow_pickle_weights_only=True if you trust its origin.",
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        if not key.startswith(layout.prefix):
            raise refuse(
                AdapterError,
                f"{label}, tensor '{key}'",
                "an unexpected key",
                f"a name that starts with '{layout.prefix}'",
                "Rename it as peft does.",
            )
        diagnose.check_tensor(key, tensor, label)
        tensors[key[len(layout.prefix) :]] = tensor
    if layout.check is not None:
        layout.check(tensors, label)
    return tensors


def _lookup(model: nn.Module, name: str | None) -> tuple[Attached, Method, str]:
    state, name = named(model, name)
    return state.adapters[name], method_named(state, name), name


def _tensors(model: nn.Module, method: Method, name: str) -> dict[str, Tensor]:
    own = (method.tensors or method.parameters)(model, name)
    return {**own, **copies.copy_parameters(model, name)}


def _config_to_json(
    model: nn.Module, config: Any, method: Method, layout: Layout
) -> dict[str, Any]:
    values: dict[str, Any] = {"peft_type": method.peft_type, "inference_mode": True}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, (set, frozenset, tuple)) or item.name in (
            "target_modules",
            "exclude_modules",
        ):
            value = sorted(value) if value is not None and not isinstance(value, str) else value
        values[layout.fields.get(item.name, item.name)] = value
    if values.get("base_model_name_or_path") is None:
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if method.peft_type == "LORA":
        values["fan_in_fan_out"] = any(
            is_conv1d(place.module) for place in find_targets(model, config)
        )
    return values


def _card(config: Mapping[str, Any]) -> str:
    """A model card with the fields the hub reads."""
    base = config.get("base_model_name_or_path")
    head = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: peft",
        "tags:",
        "- fastpeft",
    ]
    return "\n".join([*head, "---", "", f"A {config['peft_type']} adapter in peft's format.", ""])


def _gpus(model: nn.Module) -> list[int]:
    return sorted(
        {p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None}
    )


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
