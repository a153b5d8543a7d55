"""QuantizedTensor, a quantised weight as a dataclass of plain tensors, and quantize_tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..errors import FormatError, refuse
from .format import FORMATS, check_weight, get_format


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantised matrix W [N, K] in the in-memory layout every kernel reads (csrc/core/formats.h).

    Attributes:
        codes: 4-bit: tiled uint8 [ceil(N/16), ceil(K/64), 512]; int8: int8 [N, K].
        scales: 4-bit: float32, or uint8 when double-quantised; [K/blocksize, N padded to 16] when
            blocksize divides K, else flat [ceil(N*K/blocksize)]. int8: float32 [N], the largest |w|
            of each row.
        nested: float32 [257 + ceil(blocks/256)] = offset | map | nested absmax; None without double
            quantisation.
        format: "nf4", "fp4" or "int8".
        blocksize: elements of the flat row-major matrix that share a scale; for int8 it is K (a
            row).
        shape: (N, K).
        dtype: dtype of the matrix that was quantised; the default of `dequantize`.
    """

    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    format: str
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The exact weight [N, K]: float32(code * absmax), rounded once, then cast.

        Args:
            dtype: floating-point dtype of the result; default: the dtype that was quantised.
        """
        return ops.quant.dequantize(
            self.codes,
            self.scales,
            self.nested,
            FORMATS[self.format].id,
            self.blocksize,
            *self.shape,
            dtype or self.dtype,
        )

    def weight(self, threshold: float = -1.0) -> ops.qlinear.Weight:
        """The view the operators take; threshold: int8 only, see ops.qlinear.Weight."""
        return ops.qlinear.Weight(
            self.codes,
            self.scales,
            self.nested,
            FORMATS[self.format].id,
            self.blocksize,
            *self.shape,
            threshold,
        )

    def to(self, device: torch.device | str | int) -> QuantizedTensor:
        """The same tensor on another device; dtypes are part of the format and never change."""
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            nested=None if self.nested is None else self.nested.to(device),
        )

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested is not None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and nested scales in memory."""
        parts = (self.codes, self.scales, self.nested)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def canonical(self) -> dict[str, Tensor]:
        """The tensors a bitsandbytes checkpoint holds for this weight, bit for bit.

        Returns:
            4-bit: weight uint8 [ceil(N*K/2), 1], weight.absmax, weight.quant_map,
            weight.quant_state.bitsandbytes__<fmt> and, double-quantised, weight.nested_absmax,
            weight.nested_quant_map. int8: weight int8 [N, K], SCB float32 [N], weight_format uint8
                []. New tensors, except that int8 shares its memory.
        """
        return FORMATS[self.format].to_canonical(self)

    @staticmethod
    def from_canonical(
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> QuantizedTensor:
        """Reads the tensors of a bitsandbytes checkpoint; everything in them is checked before use.

        Args:
            tensors: names as in `canonical`.
            shape: the (N, K) that the module expects; None takes the stored one.
            device: where to put it; default: where the codes are.

        Raises:
            FormatError: unknown format, missing or surplus fields, sizes that contradict each
                other, a block size that is no power of two in 32 ... 4096, a foreign codebook, NaN
                or Inf in a scale.
        """
        for format in FORMATS.values():
            if format.marker(tensors):
                return format.from_canonical(tensors, shape, device)
        raise refuse(
            FormatError,
            "quantised weight",
            f"tensors {sorted(tensors)}",
            "a name ending in quant_state.bitsandbytes__nf4 or __fp4, or SCB",
            "A 4-bit weight cannot be read without its quant_state; save it again.",
        )


def quantize_tensor(
    W: Tensor, format: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedTensor:
    """Quantises a matrix; codes and scales are bit for bit those of bitsandbytes.

    Args:
        W: [N, K], float32, bfloat16 or float16 (float64 is accepted and treated like float32),
            finite.
        format: "nf4" (Dettmers et al. 2023) or "int8" (a scale per row; Dettmers et al. 2022).
            "fp4" is only read.
        blocksize: 4-bit only: a power of two in 32 ... 4096.
        double_quant: 4-bit only: quantise the scales to 8 bits too.

    Raises:
        FormatError: unknown format or block size, W no finite floating-point matrix.
        StateError: W is quantised already or on meta.
    """
    chosen = get_format(format)
    return chosen.quantize(check_weight(W).detach(), blocksize, double_quant)
