"""METHODS: the ways to adapt a model, by name. A method adds itself when its module is imported
(methods/__init__.py).

A method is one file: its configuration (a dataclass in peft's words), its modules, one `Method`.
`attach`, `io`, `merge` and `report` know no method by name; they ask the object found here. A
method that puts something in single linear layers (LoRA, IA3) gets its `Method` from
`methods.layers.layer_method`; one that acts on whole blocks or on the whole model (prefix,
bottleneck, full) fills in the functions itself.

Plain names: a module or parameter is called as in the model without adapters. A class that puts
itself in a module's place says so by the class attribute `fastpeft_wraps`, the name of the child
which holds what it replaced; `patterns.places` walks through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .rows import Rows


@dataclass(frozen=True)
class Files:
    """The folder format of another library, for a method of which peft knows none.

    Attributes:
        weights: name of the safetensors file.
        pickle: name of the pickle that is read only when asked for.
        recognises: (adapter_config.json) -> whether it is of this format.
        read_config: (adapter_config.json, label for messages) -> config; AdapterError or
            ConfigError for what we do not compute.
        write_config: (model, config, adapter name) -> adapter_config.json.
        keys: (model, adapter name, adapter_config.json, the file's keys or ()) -> {key in the file:
            plain name of the parameter it holds}. Two keys may hold the same one.
        check: (the file's tensors, label for messages) -> None; AdapterError for what a comparison
            of shapes would not show well.
        own: (model, the file's tensors, label) -> those that are the adapter's, where a file holds
            some of the base's too; AdapterError if these are not this base's.
        library: who else reads it, for the model card.
    """

    weights: str
    pickle: str
    recognises: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any], str], Any]
    write_config: Callable[[nn.Module, Any, str], dict[str, Any]]
    keys: Callable[[nn.Module, str, Mapping[str, Any], Iterable[str]], dict[str, str]]
    check: Callable[[Mapping[str, Tensor], str], None] | None = None
    own: Callable[[nn.Module, Mapping[str, Tensor], str], Mapping[str, Tensor]] | None = None
    library: str = "adapters"


@dataclass(frozen=True)
class Method:
    """What the rest of the package must know of a method. No state: all of it lives in the model's
    modules.

    Attributes:
        name: the word used in recipes, reports and on the command line ("lora").
        config: its config dataclass; an instance is what `fastpeft.attach` takes.
        peft_type: what adapter_config.json calls it ("LORA").
        attach: (model, config, adapter name) -> config with its defaults filled in. Adds the
            adapter, inactive. Checks all
            before it changes anything: after an error the model is as before.
        detach: (model, adapter name). Removes it; modules that served it alone leave, what they
            replaced returns.
        activate: (model, adapter names). Exactly these of the method's adapters take part; () is
            the bare base.
        parameters: (model, adapter name) -> {plain name: Parameter} of what it trains, for example
            "model.layers.0.self_attn.q_proj.lora_A.weight".
        tensors: the same for what a file holds, if that differs; loading copies into these tensors.
        merge: (model, adapter name, requantize) -> {plain module name: relative error of the stored
            weight}. Folds the adapter into the base. None: the method has no merge.
        unmerge: (model, adapter name). The base is bit for bit what it was.
        mix: (model, Rows or None). Its adapters take part by row of the batch, beside none that are
            active; None ends that. Missing: they cannot.
        files: its folder format, if that is not peft's.
        save: (model, adapter name, folder). Fills the folder, where a file is no adapter but a
            whole model.
        load: (model, folder) -> (config, {plain name: tensor}) if the folder was written that way,
            else None.
    """

    name: str
    config: type[Any]
    peft_type: str
    attach: Callable[[nn.Module, Any, str], Any]
    detach: Callable[[nn.Module, str], None]
    activate: Callable[[nn.Module, tuple[str, ...]], None]
    parameters: Callable[[nn.Module, str], dict[str, nn.Parameter]]
    tensors: Callable[[nn.Module, str], dict[str, Tensor]] | None = None
    merge: Callable[[nn.Module, str, bool], dict[str, float]] | None = None
    unmerge: Callable[[nn.Module, str], None] | None = None
    mix: Callable[[nn.Module, Rows | None], None] | None = None
    files: Files | None = None
    save: Callable[[nn.Module, str, Path], None] | None = None
    load: Callable[[nn.Module, Path], tuple[Any, dict[str, Tensor]] | None] | None = None


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Adds a method; a name, a peft_type and a config class can be taken once.

    Raises:
        ConfigError: one of them is registered already.
    """
    for other in METHODS.values():
        if method.name == other.name:
            raise ConfigError(
                f"method {method.name!r} is registered already. "
                "Choose another name for the new one."
            )
        if method.peft_type == other.peft_type or method.config is other.config:
            raise ConfigError(
                f"method {method.name!r}: peft_type {method.peft_type!r} or config "
                f"{method.config.__name__} is registered already for method {other.name!r}. "
                "Choose others for the new one."
            )
    METHODS[method.name] = method
    return method


def method_of(config: object) -> Method:
    """The method whose config class this object has.

    Raises:
        ConfigError: no registered method has such a config.
    """
    for method in METHODS.values():
        if isinstance(config, method.config):
            return method
    known = ", ".join(sorted(m.config.__name__ for m in METHODS.values()))
    raise ConfigError(
        f"config: got {type(config).__name__}, expected one of {known}. "
        "Pass an instance, like fastpeft.LoRA(r=16)."
    )


def method_of_peft_type(peft_type: object) -> Method:
    """The method whose files carry this peft_type.

    Raises:
        ConfigError: no registered method has it.
    """
    for method in METHODS.values():
        if peft_type == method.peft_type:
            return method
    known = ", ".join(sorted(m.peft_type for m in METHODS.values()))
    raise ConfigError(
        f"peft_type: got {peft_type!r}, expected one of {known}. "
        "Adapters of other methods cannot be loaded."
    )
