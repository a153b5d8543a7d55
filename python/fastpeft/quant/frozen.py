"""What Linear4bit and Linear8bit share: nn.Linear over a frozen quantised weight.

The weight lives in buffers: `codes` and, double-quantised, `scales` are integers that no float cast
touches; float32 scales are kept float32 by `_apply`. The buffers are not persistent: `state_dict`
speaks the file format (names and bytes of a bitsandbytes checkpoint), so what was saved on one
machine loads on any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError, FormatError, StateError, refuse
from ..ops.autocast import autocast_input
from ..ops.lora import LowRank
from .format import FORMATS
from .tensor import QuantizedTensor


class QuantizedLinear(nn.Module):
    """y = x W^T + bias with W frozen and quantised.

    Attributes:
        in_features, out_features: K, N.
        codes, scales, nested: buffers, see QuantizedTensor.
        bias: Parameter [N], frozen, or None.
        format: "nf4", "fp4" or "int8".
        blocksize: elements that share a scale.
        weight_dtype: dtype of the weight that was quantised; the default of `dequantize`.
    """

    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    _formats: ClassVar[tuple[str, ...]] = ()

    def __init__(self, q: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self._adopt(q, new=True)
        self.weight_dtype = q.dtype
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def _adopt(self, q: QuantizedTensor, new: bool = False) -> None:
        """Takes over the buffers and their description."""
        for name, value in (("codes", q.codes), ("scales", q.scales), ("nested", q.nested)):
            if new:
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self.format, self.blocksize = q.format, q.blocksize
        self._format_id = FORMATS[q.format].id

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as QuantizedTensor; shares the buffers."""
        return QuantizedTensor(
            self.codes,
            self.scales,
            self.nested,
            self.format,
            self.blocksize,
            (self.out_features, self.in_features),
            self.weight_dtype,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight with its scales, without bias."""
        return self.quantized.nbytes

    def _threshold(self) -> float:
        return -1.0

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[N, K]: the exact weight that is computed with; dtype: of the result, default the one
        that was quantised.
        """
        return self.quantized.dequantize(dtype)

    def linear(self, x: Tensor, lora: LowRank | None = None, with_bias: bool = True) -> Tensor:
        """y = x W^T + bias, plus the low-rank branch in the same pass.

        Args:
            x: [..., in_features], floating point.
            lora: the adapter, or None.
            with_bias: False leaves the bias out.

        Returns:
            [..., out_features] in x's dtype, under autocast in the autocast dtype.
        """
        # Read from the dictionary: nn.Module's attribute look-up costs 1 us each.
        packed = self._buffers
        w = ops.qlinear.Weight(
            packed["codes"],
            packed["scales"],
            packed["nested"],
            self._format_id,
            self.blocksize,
            self.out_features,
            self.in_features,
            self._threshold(),
        )
        bias = self._parameters["bias"] if with_bias else None
        return ops.qlinear.qlinear(autocast_input(x), w, bias, lora)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.linear(x)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no `weight`: it is packed ({self.format}) and gets no "
                "gradient. "
                "Use .dequantize() for the exact [N, K] matrix, or .codes for the packed bytes."
            )
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # .half(), .to(bfloat16), .type(...): the buffers move with the module but keep their
        # dtypes.
        packed = [t for t in (self.codes, self.scales, self.nested) if t is not None]

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype == t.dtype or not any(t is p for p in packed):
                return moved
            return t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, value in self.quantized.canonical().items():
            destination[prefix + name] = value
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = {n for f in self._formats for n in FORMATS[f].keys(True)}
        given = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
        rest = {
            key: value
            for key, value in state_dict.items()
            if key.startswith(prefix) and key[len(prefix) :] not in given
        }
        if "weight" in given:
            try:
                self._load_canonical(given, bool(local_metadata.get("assign_to_params_buffers")))
            except (FormatError, StateError) as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
        else:
            expected = FORMATS[self.format].keys(self.nested is not None)
            missing_keys.extend(prefix + n for n in expected if n not in given)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_canonical(self, given: dict[str, Tensor], assign: bool) -> None:
        if given["weight"].is_floating_point() and len(given) == 1:
            raise refuse(
                FormatError,
                "weight",
                f"a plain {given['weight'].dtype} weight",
                f"a weight quantised to {' or '.join(self._formats)}",
                "Load the plain model first, then call fastpeft.quantize.",
            )
        if self.codes.is_meta and not assign:
            raise refuse(
                StateError,
                "weight",
                "a layer on meta",
                "memory to load into",
                "Call load_state_dict(..., assign=True), or to_empty(device=...) before it.",
            )
        shape = (self.out_features, self.in_features)
        device = None if assign else self.codes.device
        q = QuantizedTensor.from_canonical(given, shape, device)
        # In place where sizes agree: a captured CUDA graph keeps reading the right memory.
        old = self.quantized
        pairs = ((old.codes, q.codes), (old.scales, q.scales), (old.nested, q.nested))
        if assign or any(_signature(a) != _signature(b) for a, b in pairs):
            self._adopt(q if assign else _copy(q))
        else:
            for mine, theirs in pairs:
                if mine is not None:
                    mine.copy_(theirs)
            self._adopt(
                QuantizedTensor(
                    old.codes, old.scales, old.nested, q.format, q.blocksize, shape, old.dtype
                )
            )
        self._loaded_dtype(q.dtype)

    def _loaded_dtype(self, dtype: torch.dtype) -> None:
        self.weight_dtype = dtype

    def extra_repr(self) -> str:
        """Sizes, format and bytes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, {self._format_repr()}, "
            f"bytes={self.nbytes}"
        )

    def _format_repr(self) -> str:
        raise NotImplementedError


def _signature(t: Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.dtype, t.shape)


def _copy(q: QuantizedTensor) -> QuantizedTensor:
    nested = None if q.nested is None else q.nested.clone()
    return QuantizedTensor(
        q.codes.clone(), q.scales.clone(), nested, q.format, q.blocksize, q.shape, q.dtype
    )


def dense_parts(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [N, K] and bias of an nn.Linear; the weight is shared, the bias copied.

    Raises:
        StateError: the layer is quantised already.
        ConfigError: it is no nn.Linear.
    """
    if isinstance(linear, QuantizedLinear):
        raise refuse(
            StateError,
            "linear",
            f"{type(linear).__name__}({linear.format})",
            "a dense nn.Linear",
            "It is quantised already.",
        )
    if not isinstance(linear, nn.Linear):
        raise refuse(
            ConfigError,
            "linear",
            type(linear).__name__,
            "torch.nn.Linear",
            "Use from_weight(weight, bias) for other layers with an [N, K] weight.",
        )
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return linear.weight.detach(), bias
