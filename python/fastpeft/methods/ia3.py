"""IA3: learned vectors that scale keys, values and the inner activations of the FFN (Liu et al.
2022, "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning").

    feed-forward module   y = W (l * x) + b      l [1, K]
    any other             y = l * (W x + b)      l [N, 1]

All ones at the start: the base. Around every other adapter on the layer, so that the order of
attaching does not matter: with a LoRA, l scales x (or y) of both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, StateError, refuse
from ..patterns import ALL_LINEAR
from .layers import layer_method
from .lora_merge import exact_weight, stored_layer
from .method import register_method
from .rows import Rows, scale_by_rows

__all__ = ["IA3", "IA3Linear"]

# model_type -> (keys and values, the FFN's second layer).
_KV = ("k_proj", "v_proj")
DEFAULT_TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"),
        (_KV, ("down_proj",)),
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), (_KV, ())),  # experts: no linear layers
    **dict.fromkeys(("opt", "phi", "bart"), (_KV, ("fc2",))),
    "gpt2": (("c_attn",), ("mlp.c_proj",)),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), (("query_key_value",), ("dense_4h_to_h",))),
    **dict.fromkeys(("t5", "mt5"), (("k", "v"), ("wo",))),
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "electra", "camembert"),
        (("key", "value"), ("output.dense",)),
    ),
}


@dataclass
class IA3:
    """What `fastpeft.attach` needs to add IA3 vectors. Names and meanings are peft's IA3Config's.

    Attributes:
        target_modules: names, suffixes, one regular expression, "all-linear", or None for keys,
            values and the FFN's second layer of known model families.
        feedforward_modules: those of them whose input is scaled; the others' output is. None: the
            FFN layers of the same families, or none if target_modules is given.
        init_ia3_weights: True: ones, the base's output. False: normal, so that it does something
            from the start.
        exclude_modules, modules_to_save: see LoRA.
        task_type, base_model_name_or_path: kept for the file.

    Raises:
        ConfigError: feedforward_modules that are no part of target_modules.
    """

    target_modules: Sequence[str] | str | None = None
    feedforward_modules: Sequence[str] | str | None = None
    init_ia3_weights: bool = True
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        targets, inner = self.target_modules, self.feedforward_modules
        if targets is None or isinstance(targets, str) or inner is None or isinstance(inner, str):
            return
        if strangers := sorted(set(inner) - set(targets)):
            raise refuse(
                ConfigError,
                "feedforward_modules",
                repr(strangers),
                f"some of target_modules {sorted(targets)}",
                "Name them in both.",
            )


class IA3Linear(nn.Module):
    """A linear layer with any number of IA3 vectors, of which any selection is active; several
    multiply.

    Args:
        base_layer: any linear layer, with or without other adapters; frozen.

    Attributes:
        adapters: {name: module with ia3_l, [1, K] or [N, 1], float32}.
    """

    fastpeft_wraps = "base_layer"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.rows: Rows | None = None  # inside fastpeft.adapter_ids
        self.merged: tuple[str, ...] = ()
        # what merge() replaced, and where; a tuple, so that it is no child
        self._kept: tuple[nn.Module, str, nn.Module] | None = None
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias", "in_features", "out_features") and "_modules" in vars(self):
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def add_adapter(self, name: str, is_feedforward: bool, init_ia3_weights: bool) -> None:
        """Adds a vector; it is not active yet."""
        shape = (1, self.in_features) if is_feedforward else (self.out_features, 1)
        device = next((t.device for t in [*self.base_layer.parameters()]), None)
        if device is None:
            device = next(t.device for t in self.base_layer.buffers())
        adapter = nn.Module()
        start = torch.ones if init_ia3_weights else torch.randn
        adapter.ia3_l = nn.Parameter(start(shape, device=device))
        self.adapters[name] = adapter.train(self.training)

    def remove_adapter(self, name: str) -> None:
        """Removes a vector, active or not."""
        del self.adapters[name]
        self.active = tuple(n for n in self.active if n != name)

    def set_active(self, names: tuple[str, ...]) -> None:
        """Makes exactly these vectors active."""
        self.active = names

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the base's output dtype."""
        if self.rows is not None:
            return self._by_rows(x, self.rows)
        names = () if self.merged else self.active
        vectors = [self.adapters[name].ia3_l for name in names]
        for vector in (v for v in vectors if v.shape[0] == 1):
            x = (x * vector.flatten()).to(x.dtype)
        y = self.base_layer(x)
        for vector in (v for v in vectors if v.shape[0] != 1):
            y = (y * vector.flatten()).to(y.dtype)
        return y

    def merge(self, name: str, requantize: bool = False) -> float:
        """Scales rows or columns of the bare layer's weight, exact in float32; the layer as it was
        is kept for `unmerge`. Other adapters on the layer have to be inactive.

        Returns:
            Relative error of the stored weight, see LoRALinear.merge.

        Raises:
            StateError: a vector is merged already; requantize on a dense base.
        """
        if self.merged:
            raise refuse(
                StateError,
                "layer",
                f"{list(self.merged)} merged already",
                "an unmerged layer",
                "Call unmerge() first.",
            )
        owner, seat = self, self.fastpeft_wraps
        while hasattr(base := getattr(owner, seat), "fastpeft_wraps"):
            owner, seat = base, base.fastpeft_wraps
        exact, bias, dtype = exact_weight(base, requantize, None)
        vector = self.adapters[name].ia3_l.detach().to(exact.dtype)
        exact *= vector  # [1, K] or [N, 1]
        if bias is not None and vector.shape[0] != 1:
            bias = (bias * vector.flatten()).to(bias.dtype)
        layer, error = stored_layer(base, exact, bias, requantize, dtype)
        self._kept, self.merged = (owner, seat, base), (name,)
        setattr(owner, seat, layer.train(self.training))
        return error

    def unmerge(self) -> None:
        """Puts the bare layer back as it was: the very same one.

        Raises:
            StateError: nothing is merged.
        """
        if self._kept is None:
            raise refuse(
                StateError,
                "layer",
                "unmerge() of an unmerged layer",
                "a merged one",
                "Merge first.",
            )
        owner, seat, base = self._kept
        setattr(owner, seat, base)
        self._kept, self.merged = None, ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IA3Linear:
        if self._kept is not None:
            self._kept[2]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        vectors = {n: a.ia3_l for n, a in self.adapters.items() if n in rows.names}
        inner = {n: v.flatten() for n, v in vectors.items() if v.shape[0] == 1}
        outer = {n: v.flatten() for n, v in vectors.items() if n not in inner}
        return scale_by_rows(self.base_layer(scale_by_rows(x, inner, rows)), outer, rows)


def _is_feedforward(config: IA3, name: str) -> bool:
    words = config.feedforward_modules or ()
    if isinstance(words, str):
        return re.fullmatch(words, name) is not None
    return any(name == word or name.endswith(f".{word}") for word in words)


def _add(layer: nn.Module, config: IA3, name: str, module_name: str) -> IA3Linear:
    wrapped = layer if isinstance(layer, IA3Linear) else IA3Linear(layer)
    wrapped.add_adapter(name, _is_feedforward(config, module_name), config.init_ia3_weights)
    return wrapped


_LAYERS = layer_method(
    "ia3", IA3, "IA3", wrapper=IA3Linear, add=_add, mergeable=True, outermost=True
)


def _attach(model: nn.Module, config: IA3, name: str) -> IA3:
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in DEFAULT_TARGETS:
            raise refuse(
                ConfigError,
                "target_modules",
                "None",
                f"names, for model_type {kind!r} has no default row",
                f"Name keys, values and the FFN's second layer, or {ALL_LINEAR!r}.",
            )
        outer, inner = DEFAULT_TARGETS[kind]
        config = replace(
            config, target_modules=[*outer, *inner], feedforward_modules=list(inner) or None
        )
    return _LAYERS.attach(model, config, name)


register_method(replace(_LAYERS, attach=_attach))
