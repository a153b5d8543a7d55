"""QuantFormat and FORMATS: what a weight format must offer. A format adds itself when its module is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FormatError, refuse

if TYPE_CHECKING:
    from .tensor import QuantizedTensor


@dataclass(frozen=True)
class QuantFormat:
    """A way to store a weight [N, K].

    Attributes:
        name: the word a user types ("nf4").
        id: fastpeft::Format of csrc/core/formats.h.
        bits: bits of a code.
        quantize: (W, blocksize, double_quant) -> QuantizedTensor; raises FormatError where a format
            is only read.
        to_canonical: QuantizedTensor -> {name: tensor}, the names and bytes of a bitsandbytes
            checkpoint.
        from_canonical: ({name: tensor}, (N, K) or None, device or None) -> QuantizedTensor,
            validated.
        marker: whether a canonical dictionary has this format, by its names.
        keys: (double_quant) -> the canonical names, `weight` first.
        empty: (N, K, blocksize, double_quant, device, dtype) -> QuantizedTensor with memory of the
            right size that stands for no weight yet; for layers that are built first and loaded
            later (meta device).
    """

    name: str
    id: int
    bits: int
    quantize: Callable[[Tensor, int, bool], QuantizedTensor]
    to_canonical: Callable[[QuantizedTensor], dict[str, Tensor]]
    from_canonical: Callable[..., QuantizedTensor]
    marker: Callable[[Mapping[str, Tensor]], bool]
    keys: Callable[[bool], tuple[str, ...]]
    empty: Callable[..., QuantizedTensor]


FORMATS: dict[str, QuantFormat] = {}


def register_format(format: QuantFormat) -> QuantFormat:
    """Adds a format; a name can be taken once.

    Raises:
        FormatError: the name is registered already.
    """
    if format.name in FORMATS:
        raise FormatError(
            f"format {format.name!r} is registered already. Choose another name for the new one."
        )
    FORMATS[format.name] = format
    return format


def get_format(name: str) -> QuantFormat:
    """The format of that name.

    Raises:
        FormatError: unknown name; the message lists the known ones.
    """
    if name not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise refuse(FormatError, "format", repr(name), f"one of {known}", "Take one of these.")
    return FORMATS[name]


def check_weight(w: object, what: str = "W") -> Tensor:
    """Refuses what cannot be quantised.

    Args:
        w: must be a floating-point matrix [N, K] with data, N and K at least 1, finite.
        what: its name for messages.

    Raises:
        FormatError: it is not such a matrix, or holds NaN or Inf.
        StateError: it is quantised already, or on the meta device.
    """
    from ..errors import StateError
    from .tensor import QuantizedTensor

    if isinstance(w, QuantizedTensor):
        raise refuse(
            StateError,
            what,
            f"a {w.format} QuantizedTensor",
            "a floating-point matrix",
            "It is quantised already; call .dequantize() first to quantise it anew.",
        )
    if not isinstance(w, Tensor):
        raise refuse(
            FormatError, what, type(w).__name__, "a torch.Tensor [N, K]", "Pass the weight."
        )
    given = f"{w.dtype} {list(w.shape)}"
    if not w.is_floating_point():
        raise refuse(
            StateError if w.dtype in (torch.uint8, torch.int8) else FormatError,
            what,
            given,
            "a floating-point matrix",
            "Integer data is quantised already or no weight at all.",
        )
    if w.dim() != 2 or 0 in w.shape:
        raise refuse(
            FormatError, what, given, "[N, K] with N, K >= 1", "Reshape or skip this weight."
        )
    if w.is_meta:
        raise refuse(
            StateError, what, f"{given} on meta", "data", "Load the weight before quantising it."
        )
    if w.numel() >= 2**31:
        raise refuse(
            FormatError, what, given, "fewer than 2^31 elements", "Split the weight by rows."
        )
    if not bool(torch.isfinite(w).all()):
        raise refuse(
            FormatError, what, f"{given} with NaN or Inf", "finite numbers", "Repair the weight."
        )
    return w


def check_blocksize(blocksize: object) -> int:
    """Refuses a block size that is no power of two in 32 ... 4096.

    Raises:
        FormatError: see above.
    """
    ok = isinstance(blocksize, int) and not isinstance(blocksize, bool)
    if not ok or not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):  # type: ignore[operator]
        raise refuse(
            FormatError,
            "blocksize",
            repr(blocksize),
            "a power of two in 32 ... 4096",
            "64 is the usual one.",
        )
    return blocksize  # type: ignore[return-value]
