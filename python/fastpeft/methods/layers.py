"""Methods that put something into single linear layers: one `Method` out of a wrapper class and a
few functions.

The wrapper class (LoRALinear, ...) holds the frozen layer as child `fastpeft_wraps`, the adapters
as `adapters` (nn.ModuleDict by name), and offers `remove_adapter(name)`, `set_active(names)`, an
attribute `rows` (Rows or None) and, if weights can be merged, `merge(name, requantize)` and
`unmerge()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ConfigError, refuse
from ..experts import warn_experts
from ..patterns import (
    ALL_LINEAR,
    Place,
    default_targets,
    find_targets,
    places,
    target_names,
    warn_unused,
)
from ..transposed import TransposedLinear, is_conv1d
from .method import Method
from .rows import Rows


def layer_method(
    name: str,
    config: type[Any],
    peft_type: str,
    wrapper: type[nn.Module],
    add: Callable[[nn.Module, Any, str, str], nn.Module],
    check: Callable[[nn.Module, Any, str], None] | None = None,
    mergeable: bool = False,
    outermost: bool = False,
) -> Method:
    """A method whose adapters sit in single linear layers.

    Args:
        name: see Method.
        config: see Method; has target_modules and what else `patterns.find_targets` reads.
        peft_type: see Method.
        wrapper: the class that takes a layer's place.
        add: (bare layer or wrapper, config, adapter name, plain module name) -> wrapper with the
            adapter added.
        check: (bare layer, config, plain module name); raises if the layer cannot take such an
            adapter.
        mergeable: whether the wrapper has merge and unmerge.
        outermost: the wrapper goes around all others on the layer, whoever came first; else around
            the bare layer.
    """

    def wrapped(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[Place, Any]]:
        for place in list(places(model)):
            layer = place.wrapper(wrapper)
            if layer is not None and (adapter is None or adapter in layer.adapters):
                yield place, layer

    def attach(model: nn.Module, given: Any, adapter: str) -> Any:
        if getattr(given, "bias", "none") != "none":
            raise refuse(
                ConfigError,
                "bias",
                repr(given.bias),
                "'none', for the base's own biases stay frozen",
                "Train lora_bias=True, or whole modules by modules_to_save.",
            )
        if given.target_modules is None:
            given = replace(given, target_modules=default_targets(model))
        warn_experts(model, given)
        chosen = find_targets(model, given)
        warn_unused(model, given, chosen)
        if given.target_modules == ALL_LINEAR:
            given = replace(given, target_modules=target_names(model, given, chosen))
        if check is not None:
            for place in chosen:
                check(place.module, given, place.name)
        try:
            for place in chosen:
                layer = place.wrapper(wrapper)
                if layer is not None:
                    add(layer, given, adapter, place.name)
                    continue
                parent, attribute, base = place.chain[0 if outermost else -1]
                if is_conv1d(base):
                    base = TransposedLinear(base)
                setattr(parent, attribute, add(base, given, adapter, place.name))
        except BaseException:
            detach(model, adapter)
            raise
        return given

    def detach(model: nn.Module, adapter: str) -> None:
        for place, layer in wrapped(model, adapter):
            layer.remove_adapter(adapter)
            if not layer.adapters:
                place.unwrap(wrapper)

    def activate(model: nn.Module, adapters: tuple[str, ...]) -> None:
        for _, layer in wrapped(model):
            layer.set_active(tuple(a for a in adapters if a in layer.adapters))

    def parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
        return {
            f"{place.name}.{key}": parameter
            for place, layer in wrapped(model, adapter)
            for key, parameter in layer.adapters[adapter].named_parameters()
        }

    def merge(model: nn.Module, adapter: str, requantize: bool) -> dict[str, float]:
        errors: dict[str, float] = {}
        try:
            for place, layer in wrapped(model, adapter):
                errors[place.name] = layer.merge(adapter, requantize=requantize)
        except BaseException:
            for _, layer in wrapped(model, adapter):
                if layer.merged:
                    layer.unmerge()
            raise
        return errors

    def mix(model: nn.Module, rows: Rows | None) -> None:
        for _, layer in wrapped(model):
            layer.rows = rows

    def unmerge(model: nn.Module, adapter: str) -> None:
        for _, layer in wrapped(model, adapter):
            layer.unmerge()

    return Method(
        name,
        config,
        peft_type,
        attach,
        detach,
        activate,
        parameters,
        merge=merge if mergeable else None,
        unmerge=unmerge if mergeable else None,
        mix=mix,
    )
