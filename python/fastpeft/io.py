"""Adapter folders: adapter_config.json, a safetensors file and README.md, as peft writes and reads
them, or as the library that knows the method does (`Files` of methods/method.py).

One table, LAYOUTS, says how a method's names look in peft's files, and it is used both ways.
Loading is strict: every tensor of the file must find its parameter and every parameter its tensor,
or nothing is loaded.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft import copies, diagnose
from fastpeft.attach import activate, add, check_name, method_named, named, remove, state_of
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
from fastpeft.methods.lora_method import written as lora_written
from fastpeft.methods.method import METHODS, Files, Method, method_of_peft_type
from fastpeft.patterns import find_targets
from fastpeft.peft_format import Layout, peft_files
from fastpeft.transposed import is_conv1d

CONFIG_FILE, CARD_FILE = "adapter_config.json", "README.md"

# By peft_type, where a method's names or fields differ from the rule (Layout's defaults).
LAYOUTS: dict[str, Layout] = {
    "LORA": Layout(
        inert=frozenset(("megatron_core", "qalora_group_size", "fan_in_fan_out", "loftq_config")),
        start={"init_lora_weights": True},
        refused={"init_lora_weights": ("pissa", "olora", "corda", "loftq", "lora_ga")},
        written=lambda model, config: {
            "fan_in_fan_out": any(is_conv1d(p.module) for p in find_targets(model, config)),
            **lora_written(config),
        },
        check=diagnose.check_lora_pairs,
    ),
    "PREFIX_TUNING": Layout(  # the file holds the projected prefix, so it loads without the MLP
        prefix="base_model.",
        bare=frozenset(("prompt_embeddings",)),
        fields={"projection": "prefix_projection"},
        start={"prefix_projection": False, "init_weights": "zero"},
    ),
    "PROMPT_TUNING": Layout(
        prefix="base_model.",
        bare=frozenset(("prompt_embeddings",)),
        inert=frozenset(("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")),
        start={"prompt_tuning_init": "RANDOM"},
    ),
    "IA3": Layout(inert=frozenset(("fan_in_fan_out",)), start={"init_ia3_weights": True}),
}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write adapter `name` to folder `path` in peft's format, so that `PeftModel.from_pretrained`
    loads it; bottleneck adapters in that of the adapters library.

    Each file is written beside its place and renamed, the config last: a crash leaves no half file.
    A README.md that is there already is left alone.

    Args:
        model: what the adapter is attached to.
        path: a folder, made if missing.
        name: which adapter; None means the only one.

    Returns:
        The folder.

    Raises:
        AdapterError: no such adapter, a file in the way, or a tensor that is empty, on meta, or not
        finite.
    """
    state, name = named(model, name)
    method, config = method_named(state, name), state.adapters[name].config
    if method.save is not None:
        folder = make_folder(path)
        method.save(model, name, folder)
        return folder
    files, label = files_of(method), f"adapter '{name}'"
    raw = files.write_config(model, config, name)
    values = tensors_of(model, name)
    tensors = {key: values[plain] for key, plain in files.keys(model, name, raw, ()).items()}
    _check(tensors, files, label)
    folder = make_folder(path)
    write_safetensors(folder / files.weights, tensors)
    if not (folder / CARD_FILE).exists():
        write_text(folder / CARD_FILE, _card(method, files, config))
    write_text(folder / CONFIG_FILE, json.dumps(raw, indent=2, sort_keys=True) + "\n")
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
        path: a folder written by peft, by the adapters library or by `save_adapter`.
        name: what to call it; None means "default".
        trainable: whether it gets gradients while active.
        allow_pickle_weights_only: read a pickle (torch.load with weights_only) where there is no
            safetensors file.

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
    label = f"adapter folder '{folder}'"
    whole = _whole_model(model, folder)
    if whole is None:
        config, method = read_config(folder)
        tensors = read_tensors(folder, method, allow_pickle_weights_only)
    else:
        method, config, tensors = whole
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
        if whole is None:
            wanted = file_targets(model, name, folder, tensors)
        else:
            wanted = tensors_of(model, name)
            base = getattr(config, "base_model_name_or_path", None)
            diagnose.compare(wanted, tensors, label, base)
        with torch.no_grad():
            for key, target in wanted.items():
                target.copy_(tensors[key])
    except BaseException:
        remove(model, name)
        raise
    activate(model, name)
    return model


def _whole_model(model: nn.Module, folder: Path) -> tuple[Method, Any, dict[str, Tensor]] | None:
    """What is in a folder that holds no adapter but a whole model, else None."""
    for method in METHODS.values():
        found = None if method.load is None else method.load(model, folder)
        if found is not None:
            return method, *found
    return None


def files_of(method: Method) -> Files:
    """The folder format of `method`: its own, or peft's."""
    if method.files is not None:
        return method.files
    layout = LAYOUTS.get(method.peft_type, Layout())
    return peft_files(method, layout, tensors_of)


def read_config(folder: Path) -> tuple[Any, Method]:
    """The configuration object in `folder` and its method.

    Raises:
        AdapterError: not JSON, an unknown method, or a field that is set and that we do not know.
        ConfigError: an impossible value, such as r = 0.
    """
    raw = read_json(folder, CONFIG_FILE)
    label = f"file '{folder / CONFIG_FILE}'"
    for method in METHODS.values():
        if method.files is not None and method.files.recognises(raw):
            return method.files.read_config(raw, label), method
    try:
        method = method_of_peft_type(raw.get("peft_type"))
    except ConfigError as error:
        raise AdapterError(f"{label}: {error}") from error
    return files_of(method).read_config(raw, label), method


def read_tensors(folder: Path, method: Method, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors in `folder` by the file's keys, each one checked: a float dtype, not empty,
    finite."""
    label, files = f"adapter folder '{folder}'", files_of(method)
    weights, pickle = folder / files.weights, folder / files.pickle
    if weights.exists() or weights.is_symlink():
        tensors = read_safetensors(folder, files.weights)
    elif not pickle.exists():
        raise refuse(
            AdapterError, label, f"no {files.weights}", "one", "Save or download the adapter again."
        )
    elif allow_pickle:
        tensors = read_pickle(folder, files.pickle)
    else:
        raise refuse(
            AdapterError,
            label,
            f"only {files.pickle}, a pickle",
            files.weights,
            "Convert it, or pass allow_pickle_weights_only=True if you trust its origin.",
        )
    _check(tensors, files, label)
    return tensors


def _check(tensors: Mapping[str, Tensor], files: Files, label: str) -> None:
    for key, tensor in tensors.items():
        diagnose.check_tensor(key, tensor, label)
    if files.check is not None:
        files.check(tensors, label)


def _wanted(
    values: Mapping[str, Tensor],
    keys: Mapping[str, str],
    given: Mapping[str, Tensor],
    label: str,
) -> dict[str, Tensor]:
    """{key in the file: tensor to fill}. Of several keys for one tensor one is enough, and those
    that are given must agree."""
    wanted: dict[str, Tensor] = {}
    names_of: dict[str, list[str]] = {plain: [] for plain in values}
    for key, plain in keys.items():
        names_of[plain].append(key)
    for plain, target in values.items():
        names = names_of[plain]
        present = [key for key in names if key in given] or names[:1]
        for key in present[1:]:
            if not torch.equal(given[key], given[present[0]]):
                raise refuse(
                    AdapterError,
                    f"{label}, tensor '{key}'",
                    f"other values than in '{present[0]}'",
                    "the same, for both are one parameter",
                    "The file is damaged; save it again.",
                )
        wanted.update(dict.fromkeys(present, target))
    return wanted


def file_targets(
    model: nn.Module, name: str, folder: Path, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{key in the folder's file: tensor of the attached adapter `name` that it belongs in}.

    Raises:
        AdapterError: the file has other names or shapes than the adapter.
    """
    state, name = named(model, name)
    files, label = files_of(method_named(state, name)), f"adapter folder '{folder}'"
    keys = files.keys(model, name, read_json(folder, CONFIG_FILE), tensors)
    wanted = _wanted(tensors_of(model, name), keys, tensors, label)
    base = getattr(state.adapters[name].config, "base_model_name_or_path", None)
    own = tensors if files.own is None else files.own(model, tensors, label)
    diagnose.compare(wanted, own, label, base)
    return wanted


def tensors_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """{plain name: tensor} of what a file of the attached adapter `name` holds."""
    state, name = named(model, name)
    method = method_named(state, name)
    own = (method.tensors or method.parameters)(model, name)
    return {**own, **copies.copy_parameters(model, name)}


def _card(method: Method, files: Files, config: Any) -> str:
    """A model card with the fields the hub reads."""
    base = getattr(config, "base_model_name_or_path", None)
    head = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        f"library_name: {files.library}",
        "tags:",
        "- fastpeft",
    ]
    text = f"A {method.name} adapter in the format of {files.library}."
    return "\n".join([*head, "---", "", text, ""])


def _gpus(model: nn.Module) -> list[int]:
    return sorted(
        {p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None}
    )
