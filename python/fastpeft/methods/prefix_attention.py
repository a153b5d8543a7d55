"""Learned keys and values in front of every attention layer, through the functions a transformers
model looks up by name (AttentionInterface, AttentionMaskInterface).

    cached and new keys   K [B, Hkv, T, D]        P learned ones in front
    what is attended      [ p p p | k k k k k ]   every query sees all p; the rest as without

The keys travel as one more keyword argument of the inner model, which models with an exchangeable
attention hand down to it: no state in modules, so that a recomputed layer (gradient checkpointing)
sees the keys of its own forward pass, whatever ran since. They are put in front at each call and
are never in the cache: lengths, masks and positions of the cache stay those of the text, static
caches and beams need no care, and a prefix cannot enter twice. It costs one more copy of K and V a
layer, as the cache's own growth does.

A causal pass without a mask gets P more queries instead of one: with as many queries as keys the
causal kernels need no mask (a [S, P + S] mask would rule out the fast ones). Their rows are cut
off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, StateError, refuse

KEYWORD = "fastpeft_prefix"
# Attention implementation -> ours. No "flash" in a name: transformers would look for a package of
# that name.
NAMES = {
    "sdpa": "fastpeft_prefix_sdpa",
    "eager": "fastpeft_prefix_eager",
    "flash_attention_2": "fastpeft_prefix_fa2",
    "flash_attention_3": "fastpeft_prefix_fa3",
    "flash_attention_4": "fastpeft_prefix_fa4",
}


class PrefixStates:
    """What one forward pass puts in front.

    Args:
        states: 2 L tensors [Hkv, P, D]: key and value of layer 0, of layer 1, ...

    Attributes:
        length: P.
        used: indices of the layers that took theirs.
    """

    def __init__(self, states: tuple[Tensor, ...]) -> None:
        self.states = states
        self.length = states[0].shape[1]
        self.used: set[int] = set()
        self._mask: tuple[Tensor, Tensor] | None = None

    def of_layer(self, module: nn.Module, key: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [B, Hkv, P, D] for `module`, like `key` [B, Hkv, T, D].

        Raises:
            StateError: the module is no layer of the model, or has other heads.
        """
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or not 0 <= 2 * layer < len(self.states):
            raise refuse(
                StateError,
                f"prefix in {type(module).__name__}",
                f"layer_idx {layer}",
                f"0 to {len(self.states) // 2 - 1}",
                "This architecture is not supported.",
            )
        found = self.states[2 * layer], self.states[2 * layer + 1]
        heads, _, size = found[0].shape
        if (key.shape[1], key.shape[3]) != (heads, size):
            raise refuse(
                StateError,
                f"prefix in {type(module).__name__}, layer {layer}",
                f"{heads} key heads of {size}",
                f"{key.shape[1]} of {key.shape[3]}",
                "The model's config does not tell its true heads: not supported.",
            )
        self.used.add(layer)
        batch = key.shape[0]
        k, v = (t.to(key.device, key.dtype).expand(batch, -1, -1, -1) for t in found)
        return k, v

    def widen(self, mask: Tensor) -> Tensor:
        """The mask with P visible columns in front: bool and integer [..., T] get ones, additive
        ones zeros. All layers get the same mask, so it is made once.
        """
        if self._mask is None or self._mask[0] is not mask:
            value = 0.0 if mask.is_floating_point() else 1
            self._mask = (mask, F.pad(mask, (self.length, 0), value=value))
        return self._mask[1]


class Recorder:
    """Takes a prefix's place and notes the keys and values the layers have by themselves.

    Attributes:
        found: {layer: (key, value)}, each [B, Hkv, S, D].
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[Tensor, Tensor]] = {}


def implementation_with_prefix(implementation: str) -> str:
    """The name under which attention `implementation` is registered with a prefix in front;
    registers it on first use.

    Raises:
        ConfigError: an implementation that is not supported.
    """
    if implementation not in NAMES:
        raise refuse(
            ConfigError,
            "attention implementation",
            repr(implementation),
            f"one of {', '.join(NAMES)}",
            "Load the model with attn_implementation='sdpa'.",
        )
    library = sys.modules["transformers"]  # the model's own: it is loaded
    name = NAMES[implementation]
    attention, masks = library.AttentionInterface, library.AttentionMaskInterface
    if name not in attention():
        attention.register(name, _with_prefix(implementation, attention))
    if name not in masks():
        masks.register(name, masks()[implementation])
    return name


def implementation_without(name: str | None) -> str:
    """The implementation below ours; any other name as it is."""
    return next((own for own, ours in NAMES.items() if ours == name), name or "sdpa")


def _with_prefix(implementation: str, attention: type) -> Callable[..., Any]:
    run = {"sdpa": _sdpa, "eager": _eager}.get(implementation, _flash)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        prefix: PrefixStates | Recorder | None = kwargs.pop(KEYWORD, None)
        inner = _eager_of(module) if implementation == "eager" else attention()[implementation]
        if run is _flash:
            named = _Other(module.config, _attn_implementation=implementation)
            module = _Other(module, config=named)
        if isinstance(prefix, Recorder):
            prefix.found[module.layer_idx] = (key, value)
            prefix = None
        if prefix is None:  # another model with the same config, or a cross-attention
            return inner(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("position_bias") is not None:
            raise refuse(
                StateError,
                f"prefix in {type(module).__name__}",
                "a position bias",
                "none",
                "What bias virtual tokens should get is not defined. Use LoRA.",
            )
        first_key, first_value = prefix.of_layer(module, key)
        key = torch.cat((first_key, key), dim=2)
        value = torch.cat((first_value, value), dim=2)
        return run(inner, prefix, module, query, key, value, attention_mask, kwargs)

    return attend


def _sdpa(inner, prefix, module, query, key, value, mask, kwargs):
    """torch's scaled_dot_product_attention, which masks causally by itself when there is no mask
    and more than one query.
    """
    if mask is not None:
        return inner(module, query, key, value, prefix.widen(mask), **kwargs)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal or query.shape[2] == 1:
        return inner(module, query, key, value, None, **kwargs)
    query = F.pad(query, (0, 0, prefix.length, 0))
    output, weights = inner(module, query, key, value, None, **kwargs)
    return output[:, prefix.length :], weights


def _eager(inner, prefix, module, query, key, value, mask, kwargs):
    """The model's own function: an additive mask, or none for an encoder without padding."""
    return inner(module, query, key, value, None if mask is None else prefix.widen(mask), **kwargs)


def _flash(inner, prefix, module, query, key, value, mask, kwargs):
    """Flash attention: a mask [B, T] of what is no padding, or none; causal from the lower right,
    so that P keys more are seen by every query.
    """
    positions = kwargs.pop("position_ids", None)
    packed = kwargs.get("cu_seq_lens_q") is not None
    if not packed and mask is None and positions is not None and positions.shape[-1] > 1:
        packed = query.shape[0] == 1 and bool((positions.diff(dim=-1) != 1).any())
    if packed:
        raise refuse(
            StateError,
            "prefix with flash attention",
            "several texts packed in one row",
            "one text a row",
            "Pad instead, or load the model with attn_implementation='sdpa'.",
        )
    return inner(module, query, key, value, None if mask is None else prefix.widen(mask), **kwargs)


class _Other:
    """An object seen with other values of some attributes: the flash function looks up by name, in
    its module's config, which package to call.
    """

    def __init__(self, target: Any, **changed: Any) -> None:
        self.__dict__.update(changed, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the model's own source file, as get_interface would fall back to."""
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise refuse(
            StateError,
            f"prefix in {type(module).__name__}",
            "eager attention without a function of its own",
            "one",
            "Load the model with attn_implementation='sdpa'.",
        )
    return found
