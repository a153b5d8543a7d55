"""peft's adapter folder as `Files`: what a row of io.LAYOUTS says, made into functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import AdapterError, refuse
from fastpeft.methods.method import Files, Method
from fastpeft.patterns import places

WEIGHTS_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"

# Fields of adapter_config.json that change no number here, whatever their value.
_INERT = frozenset(
    ("peft_type", "peft_version", "auto_mapping", "revision", "inference_mode", "runtime_config")
)
_NAME_LISTS = ("target_modules", "exclude_modules")  # sets to peft, so their order says nothing


@dataclass(frozen=True)
class Layout:
    """How one method's adapter looks in peft's files.

    prefix: put before every plain name, but for those in `bare`.
    fields: {our config field: name in adapter_config.json} where they differ.
    inert: fields of the file that we need not know, whatever their value.
    start: {field of the file: value taken when loading}; it only says how weights start.
    refused: {field of the file: values that cannot be loaded}; they need a change of the base that
        is not in the file.
    written: (model, config) -> further fields of the file.
    check: (tensors, label) -> None; raises on what a comparison of shapes would not show well.
    """

    prefix: str = "base_model.model."
    bare: frozenset[str] = frozenset()
    fields: Mapping[str, str] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    start: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    written: Callable[[nn.Module, Any], dict[str, Any]] | None = None
    check: Callable[[Mapping[str, Tensor], str], None] | None = None


def peft_files(
    method: Method, layout: Layout, names: Callable[[nn.Module, str], Iterable[str]]
) -> Files:
    """`method`'s folder format. names: (model, adapter name) -> plain names of its tensors."""
    return Files(
        weights=WEIGHTS_FILE,
        pickle=PICKLE_FILE,
        recognises=lambda raw: raw.get("peft_type") == method.peft_type,
        read_config=lambda raw, label: _read_config(method, layout, raw, label),
        write_config=lambda model, config, name: _write_config(method, layout, model, config),
        keys=lambda model, name, raw, given: {
            key if key in layout.bare else f"{layout.prefix}{key}": key
            for key in names(model, name)
        },
        check=layout.check,
        own=lambda model, tensors, label: _without_base(model, layout.prefix, tensors, label),
        library="peft",
    )


def _without_base(
    model: nn.Module, prefix: str, tensors: Mapping[str, Tensor], label: str
) -> Mapping[str, Tensor]:
    """peft stores the base's weight beside an adapter on embed_tokens or lm_head, and loading one
    overwrites the base's. Here it must be what this model has already."""
    ending = ".base_layer.weight"
    if not any(key.endswith(ending) for key in tensors):
        return tensors
    rest = dict(tensors)
    for place in places(model):
        given = rest.pop(f"{prefix}{place.name}{ending}", None)
        weight = getattr(place.module, "weight", None)
        if given is None or (weight is not None and _is_same(given, weight)):
            continue
        raise refuse(
            AdapterError,
            f"{label}, tensor '{prefix}{place.name}{ending}'",
            "another weight than this model's",
            "the base that the adapter was trained on",
            "Load that base (it may have been resized), then the adapter.",
        )
    return rest


def _is_same(given: Tensor, weight: Tensor) -> bool:
    """Equal values, in either of the two dtypes."""
    given, weight = given.to(weight.device), weight.detach()
    return given.shape == weight.shape and (
        torch.equal(given.to(weight.dtype), weight) or torch.equal(given, weight.to(given.dtype))
    )


def _read_config(method: Method, layout: Layout, raw: Mapping[str, Any], label: str) -> Any:
    known = {
        layout.fields.get(f.name, f.name): f.name
        for f in dataclasses.fields(method.config)
        if f.init
    }
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key in known:
            if value is not None and value not in ("", [], {}):  # else our default
                values[known[key]] = value
        elif key not in _INERT | layout.inert and not _is_unset(value):
            raise refuse(
                AdapterError,
                f"{label}, field '{key}'",
                repr(value)[:80],
                "null, false or empty, for this option is not supported",
                "Load this adapter with peft, or retrain it without the option.",
            )
        for word in layout.refused.get(key, ()):
            if value == word or str(value).startswith(f"{word}_niter"):
                raise refuse(
                    AdapterError,
                    f"{label}, field '{key}'",
                    repr(value),
                    "an adapter whose base weights are the original ones",
                    "Convert it with peft's path_initial_model_for_weight_conversion first.",
                )
    values |= {known[key]: value for key, value in layout.start.items() if key in known}
    try:
        return method.config(**values)
    except (TypeError, AttributeError) as error:  # a value of the wrong kind
        raise refuse(
            AdapterError, label, f"{error}", "fields of the kinds peft writes", "Repair the file."
        ) from error


def _write_config(method: Method, layout: Layout, model: nn.Module, config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"peft_type": method.peft_type, "inference_mode": True}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        elif item.name in _NAME_LISTS and isinstance(value, (list, tuple)):
            value = sorted(value)
        values[layout.fields.get(item.name, item.name)] = value
    if values.get("base_model_name_or_path") is None:
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if layout.written is not None:
        values.update(layout.written(model, config))
    return values


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
