"""LoRA: y = base(x) + scaling * drop(x) A^T B^T with the base frozen (Hu et al. 2021, "LoRA").

LoRA knows no weight format: a quantised base is asked for `linear(x, lora)` and runs the first
active adapter in its own pass; a plain nn.Linear goes through the dense format of the same
operator.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import AdapterError, ConfigError, StateError, refuse
from ..functional import dense_weight
from ..ops.autocast import autocast_input
from ..ops.lora import LowRank
from ..quant.frozen import QuantizedLinear
from ..transposed import TransposedLinear
from . import lora_dora, lora_init, lora_merge
from .lora_adapter import LoRAAdapter
from .lora_config import LoRA, check_name
from .rows import Rows, low_rank_by_rows

__all__ = ["LoRA", "LoRAAdapter", "LoRALinear"]


def _base_linear(
    base: nn.Module, x: Tensor, lora: LowRank | None, with_bias: bool = True
) -> Tensor:
    """base(x), plus the low-rank branch."""
    if isinstance(base, QuantizedLinear):
        return base.linear(x, lora, with_bias)
    x = autocast_input(x)
    weight, bias = base.weight, base.bias if with_bias else None
    if lora is None or weight.requires_grad:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y if lora is None else y + ops.lora.low_rank(x, lora)
    return ops.qlinear.qlinear(x, dense_weight(weight, x), bias, lora)


class LoRALinear(nn.Module):
    """A frozen linear layer with any number of LoRA adapters, of which any selection is active.

    Args:
        base_layer: nn.Linear, TransposedLinear, Linear4bit or Linear8bit; it is kept as it is and
            frozen.

    Attributes:
        base_layer: the layer below.
        adapters: {name: LoRAAdapter}.

    Input [..., K], output [..., N] in the input's dtype (under autocast in the autocast dtype).
    Without an active adapter the output is the base's, bit for bit. The first active adapter runs
    fused with the base, further ones are added.

    The base's own `forward`, and hooks on it, are not called: the operator reads its weight.

    Raises:
        ConfigError: base_layer is no layer of these types.
    """

    fastpeft_wraps = "base_layer"
    _bases: ClassVar[tuple[type, ...]] = (nn.Linear, TransposedLinear, QuantizedLinear)
    _adapter_class: ClassVar[type[nn.Module]] = LoRAAdapter

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(base_layer, self._bases):
            raise refuse(
                ConfigError,
                "base_layer",
                type(base_layer).__name__,
                "nn.Linear, TransposedLinear, Linear4bit or Linear8bit",
                "Wrap the layer that holds the weight, once.",
            )
        self.base_layer = base_layer.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        self._merged: tuple[str, ...] = ()
        self.rows: Rows | None = None  # inside fastpeft.adapter_ids
        # The base as it was before a merge; in a tuple, so that it is no submodule and not in
        # state_dict.
        self._kept: tuple[nn.Module, ...] = ()
        self.train(base_layer.training)
        self.register_load_state_dict_post_hook(_weights_loaded)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        name: str = "default",
        use_dora: bool = False,
    ) -> LoRALinear:
        """The layer with one active adapter. `linear` becomes the base and is frozen; errors as
        `add_adapter`.
        """
        layer = cls.__new__(cls)
        LoRALinear.__init__(layer, linear)
        layer.add_adapter(
            name,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            lora_bias,
            dtype,
            use_dora,
        )
        layer.set_active((name,))
        return layer

    @property
    def in_features(self) -> int:
        """K."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.base_layer.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's bias [N]."""
        return self.base_layer.bias

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters; the first runs fused with the base."""
        return self._active

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are merged into the base now."""
        return self._merged

    @property
    def lora_A(self) -> nn.Linear:
        """A of the single active (or only) adapter, weight [r, in]."""
        return self._single().lora_A

    @property
    def lora_B(self) -> nn.Linear:
        """B of the single active (or only) adapter, weight [out, r]."""
        return self._single().lora_B

    def _single(self) -> LoRAAdapter:
        names = self._active if len(self._active) == 1 else tuple(self.adapters)
        if len(names) != 1:
            raise refuse(
                StateError,
                "adapter",
                f"{len(self._active)} active of {list(self.adapters)}",
                "exactly one",
                "Ask layer.adapters[name] instead.",
            )
        return self.adapters[names[0]]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "_modules" in self.__dict__:
            return self.base_layer.weight  # a quantised base explains why it has none
        return super().__getattr__(name)

    def add_adapter(
        self,
        name: str,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        dtype: torch.dtype = torch.float32,
        use_dora: bool = False,
    ) -> LoRAAdapter:
        """Adds an adapter on the base's device; it is not active yet.

        Args:
            name: new, not empty, without "." and path separators.
            r, ...: see LoRAAdapter.

        Raises:
            AdapterError: the name cannot be used or is taken.
            ConfigError: see LoRAAdapter.
            StateError: an adapter is merged.
        """
        self._refuse_merged("add an adapter to")
        check_name(name)
        if name in self.adapters:
            raise refuse(
                AdapterError, "name", repr(name), "a new name", f"Taken: {list(self.adapters)}."
            )
        base = self.base_layer
        device = (base.codes if isinstance(base, QuantizedLinear) else base.weight).device
        adapter = self._adapter_class(
            self.in_features,
            self.out_features,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights,
            lora_bias,
            dtype,
            device,
            use_dora,
        )
        lora_init.start_from_weight(adapter, base, init_lora_weights)
        if use_dora:
            lora_dora.start_magnitude(adapter, base)
        self.adapters[name] = adapter.train(self.training)
        return adapter

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter, active or not.

        Raises:
            AdapterError: there is none of that name.
            StateError: an adapter is merged.
        """
        self._refuse_merged("remove an adapter from")
        self._check_known((name,))
        del self.adapters[name]
        self._active = tuple(n for n in self._active if n != name)

    def set_active(self, names: Sequence[str]) -> None:
        """Makes exactly these adapters active, the first fused; an empty tuple leaves the bare
        base.

        Raises:
            AdapterError: an unknown name, or one given twice.
            StateError: an adapter is merged.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        if names == self._active:
            return
        self._refuse_merged("activate adapters of")
        self._check_known(names)
        if len(set(names)) != len(names):
            raise refuse(AdapterError, "names", list(names), "each name once", "Drop the double.")
        self._active = names

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.adapters:
                near = difflib.get_close_matches(str(name), list(self.adapters), n=1)
                advice = f"Did you mean {near[0]!r}?" if near else "Add it first."
                raise refuse(
                    AdapterError, "adapter", repr(name), f"one of {list(self.adapters)}", advice
                )

    def _refuse_merged(self, action: str) -> None:
        if self._merged:
            raise refuse(
                StateError,
                "layer",
                f"a call to {action} a layer with {list(self._merged)} merged",
                "an unmerged layer",
                "Call unmerge() first.",
            )

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N].

        Raises:
            StateError: training while an adapter is merged: it would get no gradient.
        """
        if self._merged and self.training and torch.is_grad_enabled():
            self._refuse_merged("train")
        if self.rows is not None:
            return low_rank_by_rows(self, x, self.rows)
        return self.compute(x, () if self._merged else self._active)

    def compute(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """What `forward` returns with these adapters active."""
        # Children are read from their dictionaries: nn.Module's attribute look-ups cost 1 us each.
        children = self._modules
        if not names:
            return _base_linear(children["base_layer"], x, None)
        base, modules = children["base_layer"], children["adapters"]._modules
        adapters = [modules[name] for name in names]
        # DoRA scales all but the bias: then it comes last.
        late_bias = base.bias if any(adapter.use_dora for adapter in adapters) else None
        y = None
        for adapter in adapters:
            lora = adapter.low_rank()
            if y is None:
                y = _base_linear(base, x, lora, late_bias is None)
            else:
                y = y + ops.lora.low_rank(autocast_input(x), lora)
            if adapter.lora_bias:
                y = y + (adapter.lora_B.bias * adapter.scaling).to(y.dtype)
            if adapter.use_dora:
                bias = late_bias if adapter is adapters[-1] else None
                y = lora_dora.rescale(y, adapter, base, lora, bias)
        if late_bias is None or adapters[-1].use_dora:
            return y
        return y + late_bias.to(y.dtype)

    def merge(
        self,
        name: str | Sequence[str],
        requantize: bool = False,
        dtype: torch.dtype | None = None,
    ) -> float:
        """Puts adapters into the weight: base_layer becomes a layer of W + scaling * B A, summed in
        float32. The base as it was is kept (its memory too) for `unmerge`.

        Args:
            name: the adapter, or several.
            requantize: quantise the sum to the base's format again instead of leaving an nn.Linear.
            dtype: of the merged weight; default: the base weight's (for a quantised base: the one
                it was quantised from).

        Returns:
            |stored weight - exact sum| / |exact sum| (Frobenius): what rounding to dtype, or
            quantising again, costs.

        Raises:
            StateError: something is merged already; requantize on a dense base.
            AdapterError: unknown name.
            FormatError: requantize to a format that is only read (fp4).
        """
        names = (name,) if isinstance(name, str) else tuple(name)
        self._refuse_merged("merge into")
        self._check_known(names)
        if not names:
            raise refuse(AdapterError, "name", "no name", "an adapter", "Name what to merge.")
        chosen = [self.adapters[n] for n in names]
        merged, error = lora_merge.merged_layer(self.base_layer, chosen, requantize, dtype)
        self._kept, self._merged = (self.base_layer,), names
        self.base_layer = merged.train(self.training)
        return error

    def unmerge(self) -> None:
        """Restores the base as it was before `merge`, bit for bit: the very same layer.

        Raises:
            StateError: nothing is merged.
        """
        if not self._merged:
            raise refuse(
                StateError,
                "layer",
                "unmerge() of an unmerged layer",
                "a merged one",
                "Merge first.",
            )
        self.base_layer = self._kept[0]
        self._kept, self._merged = (), ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRALinear:
        for base in self._kept:
            base._apply(fn, recurse)
        scaled = [adapter for adapter in self.adapters.values() if adapter.use_dora]
        before = [adapter.weight_sq.dtype for adapter in scaled]
        super()._apply(fn, recurse)
        for adapter, dtype in zip(scaled, before, strict=True):
            if adapter.weight_sq.dtype != dtype:
                lora_dora.remember_norms(adapter, (*self._kept, self.base_layer)[0])
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_modules", {}).get("base_layer") if name == "base_layer" else None
        super().__setattr__(name, value)
        if old is not None and not self._merged:
            self._base_replaced(old)

    def _base_replaced(self, old: nn.Module) -> None:
        """Another base took the old one's place, most often because it was quantised."""
        base = self.base_layer
        packed = isinstance(base, QuantizedLinear) and not isinstance(old, QuantizedLinear)
        for adapter in self.adapters.values():
            is_new = adapter.use_dora and lora_dora.is_at_start(adapter, old)
            if adapter.is_loftq and packed:
                lora_init.compensate(adapter, old.weight, base)
            if adapter.use_dora:
                lora_dora.remember_norms(adapter, base)
            if is_new:  # as if attached afterwards
                lora_dora.restart(adapter, base)

    def extra_repr(self) -> str:
        """Active and merged adapters."""
        return f"active={list(self._active)}, merged={list(self._merged)}"


def _weights_loaded(layer: LoRALinear, incompatible_keys: Any) -> None:
    """After load_state_dict: what is remembered of the base's weight is of the one before."""
    for adapter in layer.adapters.values():
        if adapter.use_dora:
            lora_dora.remember_norms(adapter, (*layer._kept, layer.base_layer)[0])
