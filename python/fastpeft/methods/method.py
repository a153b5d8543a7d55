"""METHODS: the ways to adapt a model, by name. A method adds itself when its module is imported (methods/__init__.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError


@dataclass(frozen=True)
class Method:
    """What the rest of the package must know of a method.

    Attributes:
        name: the word used in files and on the command line ("lora").
        config: its config dataclass; an instance is what `fastpeft.attach` takes.
        wrap: (frozen layer, config, adapter name, r, lora_alpha) -> layer with that adapter added; the layer itself when
            it is wrapped already.
        wraps: whether `wrap` accepts this module as base.
    """

    name: str
    config: type[Any]
    wrap: Callable[..., nn.Module]
    wraps: Callable[[nn.Module], bool]


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Adds a method; a name can be taken once.

    Raises:
        ConfigError: the name is registered already.
    """
    if method.name in METHODS:
        raise ConfigError(
            f"method {method.name!r} is registered already. Choose another name for the new one."
        )
    METHODS[method.name] = method
    return method


def method_of(config: object) -> Method:
    """The method whose config class this object has.

    Raises:
        ConfigError: no registered method has such a config.
    """
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    known = ", ".join(sorted(m.config.__name__ for m in METHODS.values()))
    raise ConfigError(
        f"config: got {type(config).__name__}, expected one of {known}. Pass an instance, like fastpeft.LoRA(r=16)."
    )
