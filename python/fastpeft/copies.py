"""modules_to_save: a whole module (a head, a norm, an embedding) trained as a copy of its own per
adapter.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fastpeft.errors import ConfigError, StateError, refuse
from fastpeft.patterns import Place, find_saved, is_quantized, places


class TrainedCopy(nn.Module):
    """Stands where a module stood and calls the active adapter's copy of it, or the frozen
    original.

    original_module: what stood here, untouched.
    copies: {adapter name: deep copy of the original, in the original's dtype}.
    active: the adapter whose copy is called, or None.
    Any other attribute (weight, in_features, ...) is that of the module in use.
    """

    fastpeft_wraps = "original_module"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.training = module.training

    @property
    def module_in_use(self) -> nn.Module:
        """The active copy, or the original."""
        return self.original_module if self.active is None else self.copies[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module in use returns."""
        return self.module_in_use(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if "original_module" not in modules or "copies" not in modules:
                raise  # half built: by copy or unpickling
            return getattr(self.module_in_use, name)


def check_copies(model: nn.Module, config: Any) -> list[Place]:
    """The places of modules_to_save, after checking that each can be trained whole."""
    found = find_saved(model, config)
    for place in found:
        inside = [place.module, *place.module.modules()]
        if any(is_quantized(module) for module in inside):
            raise refuse(
                ConfigError,
                f"modules_to_save '{place.name}'",
                "a quantised layer, which cannot be trained whole",
                "a dense module",
                "Keep it dense by quantize(..., skip=[...]), or give it a LoRA by target_modules.",
            )
        if any(hasattr(type(module), "fastpeft_wraps") for module in place.module.modules()):
            raise refuse(
                ConfigError,
                f"modules_to_save '{place.name}'",
                "a module which holds another adapter's layers",
                "one without adapters inside",
                "Detach the other adapter first, or save a smaller module.",
            )
    return found


def add_copies(found: list[Place], name: str) -> None:
    """Give adapter `name` a copy of the module at every place."""
    for place in found:
        wrapper = place.wrapper(TrainedCopy)
        if wrapper is None:
            wrapper = TrainedCopy(place.module)
            place.put(wrapper)
        wrapper.copies[name] = copy.deepcopy(wrapper.original_module)


def remove_copies(model: nn.Module, name: str) -> None:
    """Drop adapter `name`'s copies; an original whose last copy went takes its place again."""
    for place in list(places(model)):
        wrapper = place.wrapper(TrainedCopy)
        if wrapper is None or name not in wrapper.copies:
            continue
        del wrapper.copies[name]
        if wrapper.active == name:
            wrapper.active = None
        if not wrapper.copies:
            place.unwrap(TrainedCopy)


def activate_copies(model: nn.Module, names: tuple[str, ...]) -> None:
    """Use the copies of `names`. StateError, before any change, if two of them copy the same
    module.
    """
    chosen: list[tuple[TrainedCopy, str | None]] = []
    for place in places(model):
        wrapper = place.wrapper(TrainedCopy)
        if wrapper is None:
            continue
        having = [name for name in names if name in wrapper.copies]
        if len(having) > 1:
            raise refuse(
                StateError,
                f"modules_to_save '{place.name}'",
                f"copies of adapters {', '.join(having)}",
                "one active copy",
                "Activate one of these adapters at a time.",
            )
        chosen.append((wrapper, having[0] if having else None))
    for wrapper, name in chosen:
        wrapper.active = name


def copy_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """{plain name: Parameter} of adapter `name`'s copies, for example "lm_head.weight"."""
    found: dict[str, nn.Parameter] = {}
    for place in places(model):
        wrapper = place.wrapper(TrainedCopy)
        if wrapper is not None and name in wrapper.copies:
            for key, parameter in wrapper.copies[name].named_parameters():
                found[f"{place.name}.{key}"] = parameter
    return found
