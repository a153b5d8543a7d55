"""Full fine-tuning: every parameter of a dense model trains, in its place.

What "unplugged" means here: the original values are copied to host memory when the adapter is first
switched on, and `detach`, `disabled` and `activate(model, None)` copy them back, so the base is bit
for bit what it was. Only one set of values is in the model; those of the other full adapters (and
the original ones) wait in host memory. A switch costs one copy of the model there and one back.

Parameters are changed in place: tied weights stay tied, an optimizer keeps its references. Buffers
(running statistics) are part of the values.

A file is the whole model, as its own `save_pretrained` writes it: from_pretrained loads it without
this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diagnose import check_tensor
from ..errors import AdapterError, ConfigError, StateError, refuse
from ..files import read_safetensors, write_safetensors
from ..patterns import is_quantized, places, plain_parameters
from .full_optimizer import OPTIMIZERS
from .method import Method, register_method

__all__ = ["Full"]

_STATE = "_fastpeft_full"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ORIGINAL = None  # the key of the base's own values


@dataclass
class Full:
    """What `fastpeft.attach` needs to train every parameter.

    Attributes:
        optimizer: "adamw" (torch's fused AdamW) or "adamw_8bit" (bitsandbytes', where installed):
            what `fastpeft.methods.full_optimizer.make_optimizer` builds.
        float32_master: keep float32 copies of 16-bit weights, to which the steps are added; small
            steps are lost in 16 bits. None: with "adamw" yes, with "adamw_8bit" no.
        snapshot: copy the original values to host memory (as many bytes as the model has). Without
            it the adapter can be neither detached nor switched off.
        task_type, base_model_name_or_path: kept.

    Raises:
        ConfigError: a value that cannot work.
    """

    optimizer: str = "adamw"
    float32_master: bool | None = None
    snapshot: bool = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise refuse(
                ConfigError,
                "optimizer",
                repr(self.optimizer),
                f"one of {OPTIMIZERS}",
                "'adamw' needs nothing installed.",
            )
        if self.optimizer == "adamw_8bit" and self.float32_master:
            raise refuse(
                ConfigError,
                "float32_master",
                "True with optimizer 'adamw_8bit'",
                "'adamw', or no master weights",
                "Master weights would take back what 8-bit states save.",
            )


@dataclass
class FullState:
    """Which values are where.

    current: the adapter whose values are in the model; None: the original ones.
    hosted: {adapter: {plain name: value in host memory}} of the others; a missing adapter has the
        original values still.
    configs: {adapter: Full}.
    """

    current: str | None = _ORIGINAL
    hosted: dict[str | None, dict[str, Tensor]] = field(default_factory=dict)
    configs: dict[str, Full] = field(default_factory=dict)


def _values(model: nn.Module) -> dict[str, Tensor]:
    """{plain name: parameter or buffer} of the bare model."""
    return {**dict(plain_parameters(model)), **{name: b for name, b, _ in _buffers(model)}}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(plain name, buffer, whether it belongs into a file)."""
    owners = [("", model)] + [(f"{place.name}.", place.module) for place in places(model)]
    for prefix, owner in owners:
        for key, buffer in owner._buffers.items():
            if buffer is not None:
                yield f"{prefix}{key}", buffer, key not in owner._non_persistent_buffers_set


def _host_copy(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in values.items()}


def _original(model: nn.Module, state: FullState) -> dict[str, Tensor]:
    return _values(model) if state.current is _ORIGINAL else state.hosted[_ORIGINAL]


def _switch(model: nn.Module, state: FullState, wanted: str | None) -> None:
    """Brings the values of `wanted` into the model and those that are there to the host.

    Raises:
        StateError: there is no snapshot of them, or the model was changed since.
    """
    if wanted == state.current:
        return
    if wanted is _ORIGINAL and _ORIGINAL not in state.hosted:
        raise refuse(
            StateError,
            f"adapter '{state.current}'",
            "Full(snapshot=False), which keeps no original values",
            "a snapshot, to switch it off or detach it",
            "Load the base model anew.",
        )
    present = _values(model)
    incoming = state.hosted.get(wanted)
    if incoming is None and state.current is not _ORIGINAL:
        incoming = state.hosted[_ORIGINAL]  # never switched on yet: the original values
    if incoming is not None and incoming.keys() != present.keys():
        strange = sorted(incoming.keys() ^ present.keys())
        raise refuse(
            StateError,
            f"adapter '{wanted or state.current}'",
            f"a model whose parameters are others than at attach ('{strange[0]}', ...)",
            "the same model",
            "Do not quantise or rebuild a model between attach(Full()) and detach.",
        )
    config = state.configs.get(wanted) if state.current is _ORIGINAL else None
    if config is None or config.snapshot:
        state.hosted[state.current] = _host_copy(present)
    if incoming is not None:
        with torch.no_grad():
            for name, value in incoming.items():
                present[name].copy_(value)
    state.hosted.pop(wanted, None)
    state.current = wanted


def _attach(model: nn.Module, config: Full, name: str) -> Full:
    for place in places(model):
        if is_quantized(place.module):
            raise refuse(
                ConfigError,
                "Full",
                f"a quantised base ('{place.name}', {place.module.format})",
                "a dense model",
                "A packed weight gets no gradient: load the model dense, or attach LoRA.",
            )
    for key, parameter in plain_parameters(model):
        if parameter.is_meta or not parameter.is_floating_point():
            what = "a parameter on meta" if parameter.is_meta else f"dtype {parameter.dtype}"
            raise refuse(
                ConfigError,
                f"Full, parameter '{key}'",
                what,
                "floating-point data",
                "Load the weights first, and dense.",
            )
    state = model.__dict__.get(_STATE) or FullState()
    others = [*state.configs.values(), config] if state.configs else []
    if any(not other.snapshot for other in others):
        raise refuse(
            ConfigError,
            "snapshot",
            "False beside another full adapter",
            "True for all of them",
            "Several sets of values need a place in host memory.",
        )
    state.configs[name] = config
    model.__dict__[_STATE] = state
    return config


def _detach(model: nn.Module, name: str) -> None:
    state: FullState = model.__dict__[_STATE]
    if state.current == name:
        _switch(model, state, _ORIGINAL)
    state.hosted.pop(name, None)
    del state.configs[name]
    if not state.configs:
        del model.__dict__[_STATE]


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    state: FullState | None = model.__dict__.get(_STATE)
    if state is None:
        return
    if len(names) > 1:
        raise refuse(
            StateError,
            "full adapters",
            ", ".join(names),
            "one active",
            "Each of them is a whole set of weights: activate one at a time.",
        )
    _switch(model, state, names[0] if names else _ORIGINAL)


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return dict(plain_parameters(model))


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a file holds, wherever it is now: parameters and persistent buffers."""
    state: FullState = model.__dict__[_STATE]
    if state.current == name:
        values = _values(model)
    else:
        if name not in state.hosted:
            state.hosted[name] = _host_copy(_original(model, state))
        values = state.hosted[name]
    transient = {key for key, _, persistent in _buffers(model) if not persistent}
    return {key: value for key, value in values.items() if key not in transient}


def _save(model: nn.Module, name: str, folder: Path) -> None:
    """The whole model into `folder`."""
    tensors = {key: value.detach() for key, value in _tensors(model, name).items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            check_tensor(key, tensor, f"adapter '{name}'")
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=tensors)
    else:
        write_safetensors(folder / _WEIGHTS, tensors)


def _load(model: nn.Module, folder: Path) -> tuple[Full, dict[str, Tensor]] | None:
    """What `folder` holds if it is a whole model's, else None.

    Raises:
        AdapterError: not all weights of this model's class are in it.
    """
    if (folder / "adapter_config.json").exists():
        return None
    if not any((folder / name).exists() for name in (_WEIGHTS, _INDEX)):
        return None
    label = f"model folder '{folder}'"
    if not hasattr(model, "save_pretrained"):
        tensors = read_safetensors(folder, _WEIGHTS)
    else:
        tensors = _pretrained(type(model), folder, label)
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            check_tensor(key, tensor, label)
    return Full(), tensors


def _pretrained(kind: Any, folder: Path, label: str) -> dict[str, Tensor]:
    loaded, info = kind.from_pretrained(
        folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    lost = [key for kind in ("missing_keys", "mismatched_keys") for key in info[kind]]
    if lost:
        raise refuse(
            AdapterError,
            label,
            f"no fitting '{lost[0]}' ({len(lost)} like it)",
            f"every weight of {kind.__name__}",
            "It is another model's folder.",
        )
    persistent = {key for key, _, stays in _buffers(loaded) if stays}
    parameters = dict(plain_parameters(loaded))
    return {k: v for k, v in _values(loaded).items() if k in parameters or k in persistent}


register_method(
    Method(
        "full",
        Full,
        "FULL",
        _attach,
        _detach,
        _activate,
        _parameters,
        _tensors,
        save=_save,
        load=_load,
    )
)
