"""Linear4bit and Linear8bit: the quantised layers a user meets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FormatError, refuse
from .format import FORMATS, check_blocksize, get_format
from .frozen import QuantizedLinear, dense_parts
from .tensor import QuantizedTensor, quantize_tensor


def _fresh(
    in_features: int,
    out_features: int,
    bias: bool,
    format: str,
    blocksize: int,
    double_quant: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[QuantizedTensor, Tensor | None]:
    """Weight and bias of a layer that is made from sizes alone, initialised like nn.Linear where
    there is memory.
    """
    dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
    w = dense.weight.detach()
    if w.is_meta or format == "fp4":  # fp4 is only read: zeros until a checkpoint is loaded
        empty = FORMATS[format].empty
        q = empty(out_features, in_features, blocksize, double_quant, w.device, w.dtype)
    else:
        q = quantize_tensor(w, format, blocksize, double_quant)
    return q, None if dense.bias is None else dense.bias.detach()


class Linear4bit(QuantizedLinear):
    """nn.Linear with a 4-bit weight: NF4 (or FP4, read only) in blocks, absmax scales, optionally
    quantised themselves.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N]; it is frozen.
        format: "nf4" or "fp4".
        blocksize: power of two in 32 ... 4096.
        double_quant: quantise the scales to 8 bits (0.516 instead of 0.5625 bytes a weight).
        device, dtype: as for nn.Linear; the weight is initialised like nn.Linear's and quantised.
            On the meta device (and for fp4) it stands for no weight until a state dict is loaded.

    Input [..., K] float32, bfloat16 or float16; output [..., N] in the same dtype. Dettmers et al.
    2023, "QLoRA".

    Raises:
        FormatError: unknown format or block size.
    """

    _formats = ("nf4", "fp4")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_format(format, self._formats)
        check_blocksize(blocksize)
        parts = _fresh(
            in_features, out_features, bias, format, blocksize, double_quant, device, dtype
        )
        super().__init__(*parts)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: Tensor | None = None) -> Linear4bit:
        """A layer over a quantised weight; shares its tensors. bias: [N] or None."""
        _check_format(q.format, cls._formats)
        layer = cls.__new__(cls)
        QuantizedLinear.__init__(layer, q, bias)
        return layer

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> Linear4bit:
        """Quantises a weight [N, K]; on meta only the sizes are taken.

        Errors as `quantize_tensor`.
        """
        _check_format(format, cls._formats)
        if weight.is_meta:
            N, K = weight.shape
            q = FORMATS[format].empty(N, K, blocksize, double_quant, "meta", weight.dtype)
        else:
            q = quantize_tensor(weight, format, blocksize, double_quant)
        return cls.from_quantized(q, bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, blocksize: int = 64, double_quant: bool = True, format: str = "nf4"
    ) -> Linear4bit:
        """Quantises an nn.Linear; the source stays as it is.

        Raises:
            StateError: it is quantised already.
            ConfigError: it is no nn.Linear.
            FormatError: as `quantize_tensor`.
        """
        weight, bias = dense_parts(linear)
        return cls.from_weight(weight, bias, format, blocksize, double_quant).train(linear.training)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested is not None

    def _format_repr(self) -> str:
        return f"blocksize={self.blocksize}, double_quant={self.double_quant}"


class Linear8bit(QuantizedLinear):
    """nn.Linear with an int8 weight, a float32 scale per row.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N]; it is frozen.
        threshold: > 0: LLM.int8(): activations in int8, columns where any |x| >= threshold in x's
            dtype; 0: all activations in int8; None: weight only, activations as they are.
        device, dtype: as for nn.Linear, see Linear4bit.

    Input [..., K] float32, bfloat16 or float16; output [..., N] in the same dtype. The gradient of
    x is dy W in every mode. Dettmers et al. 2022, "LLM.int8()".

    Raises:
        ConfigError: threshold negative or no number.
    """

    _formats = ("int8",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float | None = 6.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        threshold = check_threshold(threshold)
        super().__init__(*_fresh(in_features, out_features, bias, "int8", 0, False, device, dtype))
        self.threshold = threshold

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, bias: Tensor | None = None, threshold: float | None = 6.0
    ) -> Linear8bit:
        """A layer over a quantised weight; shares its tensors. bias: [N] or None."""
        _check_format(q.format, cls._formats)
        layer = cls.__new__(cls)
        QuantizedLinear.__init__(layer, q, bias)
        layer.threshold = check_threshold(threshold)
        return layer

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None = None, threshold: float | None = 6.0
    ) -> Linear8bit:
        """Quantises a weight [N, K]; on meta only the sizes are taken.

        Errors as `quantize_tensor`.
        """
        if weight.is_meta:
            N, K = weight.shape
            q = FORMATS["int8"].empty(N, K, K, False, "meta", weight.dtype)
        else:
            q = quantize_tensor(weight, "int8")
        return cls.from_quantized(q, bias, threshold)

    @classmethod
    def from_linear(cls, linear: nn.Module, threshold: float | None = 6.0) -> Linear8bit:
        """Quantises an nn.Linear; the source stays as it is. Errors as Linear4bit.from_linear."""
        weight, bias = dense_parts(linear)
        return cls.from_weight(weight, bias, threshold).train(linear.training)

    def _threshold(self) -> float:
        return -1.0 if self.threshold is None else self.threshold

    def _loaded_dtype(self, dtype: torch.dtype) -> None:
        """The file does not tell the dtype: the layer keeps its own."""

    def _format_repr(self) -> str:
        return f"threshold={self.threshold}"


def _check_format(format: str, allowed: tuple[str, ...]) -> None:
    get_format(format)
    if format not in allowed:
        raise refuse(
            FormatError,
            "format",
            repr(format),
            " or ".join(map(repr, allowed)),
            "Linear4bit holds nf4 and fp4, Linear8bit int8.",
        )


def check_threshold(threshold: float | None) -> float | None:
    """LLM.int8()'s threshold as a float or None; ConfigError if it is negative or no number."""
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise refuse(
            ConfigError,
            "threshold",
            repr(threshold),
            "None (weight only), 0 or a positive number",
            "6.0 is the value of the paper.",
        )
    return float(threshold)
