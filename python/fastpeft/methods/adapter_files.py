"""Bottleneck adapters in the file format of the `adapters` library (1.3): adapter_config.json with
a "config" inside, and adapter.safetensors, whose keys carry the adapter's name.

`_NAMES` and `FIXED` are used both ways. The pickle of the library's default, pytorch_adapter.bin,
is refused unless asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import AdapterError, ConfigError, refuse
from .adapter_config import Bottleneck
from .adapter_seats import adapted
from .method import Files

VERSION = "adapters.1.3.0"

# Parameter of BottleneckAdapter -> its names in the file; {down} is 1 behind a norm in one
# nn.Sequential with it, else 0. The norm has two names there.
_NAMES = {
    "adapter_norm_before": ("adapter_norm_before", "adapter_down.0"),
    "adapter_down": ("adapter_down.{down}",),
    "adapter_up": ("adapter_up",),
    "adapter_norm_after": ("adapter_norm_after",),
    "gate": ("gate",),
    "scaling": ("scaling",),
}

# Fields of the library that Bottleneck lacks -> the value that is written; another one is refused.
FIXED = {"inv_adapter": None, "phm_layer": False, "stochastic_depth": 0.0}
# Fields that mean something only beside another value of those above.
_IDLE = {
    "inv_adapter_reduction_factor": None,
    "phm_dim": 4,
    "phm_rank": 1,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "shared_W_phm": False,
    "factorized_phm_W": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
}
_OWN = tuple(f.name for f in dataclasses.fields(Bottleneck) if f.name != "base_model_name_or_path")
# Files from before the library wrote its version call these activations otherwise.
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether this adapter_config.json is the library's: peft's has no "config" inside."""
    return "peft_type" not in raw and "config" in raw


def read_config(raw: Mapping[str, Any], label: str) -> Bottleneck:
    """The configuration in an adapter_config.json.

    Raises:
        AdapterError: another method, or a field that is set and that we do not compute.
        ConfigError: an impossible value.
    """
    inner = raw["config"]
    if not isinstance(inner, dict) or inner.get("architecture") is not None:
        got = inner.get("architecture") if isinstance(inner, dict) else inner
        raise refuse(
            AdapterError,
            f"{label}, field 'config'",
            repr(got)[:80],
            "a bottleneck adapter with its whole configuration",
            "Save it anew with the adapters library, or load it there.",
        )
    if not isinstance(raw.get("name"), str) or not raw["name"]:
        raise refuse(
            AdapterError,
            f"{label}, field 'name'",
            repr(raw.get("name"))[:80],
            "the adapter's name, which is part of the tensors' names",
            "Add it.",
        )
    values = {key: inner[key] for key in _OWN if inner.get(key) is not None}
    for key, value in inner.items():
        default = FIXED.get(key)
        known = key in _OWN or key in _IDLE or key == "architecture"
        if not known and value != default and value not in (None, False, "", [], {}):
            raise refuse(
                AdapterError,
                f"{label}, field 'config.{key}'",
                repr(value)[:80],
                repr(default),
                "This option is not supported: train the adapter without it.",
            )
    missing = [key for key in ("mh_adapter", "output_adapter", "non_linearity") if key not in inner]
    if missing:
        raise refuse(
            AdapterError,
            f"{label}, field 'config'",
            f"no {', '.join(missing)}",
            "a whole configuration",
            "Save it anew with the adapters library.",
        )
    # what the library takes where a field is not written
    values = {"original_ln_before": False, **values}
    if "version" not in raw:
        word = values["non_linearity"]
        values["non_linearity"] = _OLD_ACTIVATIONS.get(word, word)
    name = raw.get("model_name")
    try:
        return Bottleneck(**values, base_model_name_or_path=name if name else None)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # a value of the wrong kind
        raise refuse(
            AdapterError, label, f"{error}", "fields of the kinds adapters writes", "Repair it."
        ) from error


def write_config(model: nn.Module, config: Bottleneck, name: str) -> dict[str, Any]:
    """adapter_config.json as the library writes it for adapter `name` on this model."""
    inner = {key: getattr(config, key) for key in _OWN}
    factor = config.reduction_factor
    inner["reduction_factor"] = dict(factor) if isinstance(factor, Mapping) else factor
    if not isinstance(config.scaling, str):
        inner["scaling"] = float(config.scaling)  # the library takes no int
    about = getattr(model, "config", None)
    return {
        "config": {**_IDLE, **FIXED, **inner},
        "hidden_size": getattr(about, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": config.base_model_name_or_path or getattr(model, "name_or_path", None),
        "model_type": getattr(about, "model_type", None),
        "name": name,
        "version": VERSION,
    }


def keys(
    model: nn.Module, adapter: str, raw: Mapping[str, Any], given: Iterable[str]
) -> dict[str, str]:
    """{key in the file: plain name of the parameter it holds}.

    Args:
        model: with the adapter attached.
        adapter: its name there.
        raw: adapter_config.json; its "name" is the adapter's in the file.
        given: the file's keys, whose prefix is followed: files saved from a bare encoder or decoder
            lack the name under which a model with a head holds it. () for a file to be written.

    Raises:
        AdapterError: the file says another hidden size than the model has.
    """
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if None not in (hidden, raw.get("hidden_size")) and hidden != raw["hidden_size"]:
        raise refuse(
            AdapterError,
            "field 'hidden_size'",
            repr(raw["hidden_size"])[:80],
            f"{hidden}, the model's",
            f"It was made for {raw.get('model_name')!r}.",
        )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for place, seat in adapted(model, adapter):
        module = seat.adapters[adapter]
        down = 0 if module.adapter_norm_before is None else 1
        for name, _ in module.named_parameters():
            part, dot, rest = name.partition(".")
            for written in _NAMES[part]:
                key = f"{seat.key}.{raw['name']}.{written.format(down=down)}{dot}{rest}"
                found[key] = f"{place.name}.{name}"
    given = tuple(given)
    if given and len(prefix) > 1:
        has = [any(key.startswith(prefix) for key in group) for group in (given, found)]
        if has == [True, False]:
            found = {f"{prefix}{key}": name for key, name in found.items()}
        elif has == [False, True]:
            found = {key.removeprefix(prefix): name for key, name in found.items()}
    return found


FILES = Files(
    weights="adapter.safetensors",
    pickle="pytorch_adapter.bin",
    recognises=recognises,
    read_config=read_config,
    write_config=write_config,
    keys=keys,
)
