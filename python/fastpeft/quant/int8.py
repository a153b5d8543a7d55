"""INT8 with a scale per row (Dettmers et al. 2022, "LLM.int8()", section 2.1): w = code * SCB /
127.

The threshold for outlier columns is a property of the layer, not of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import ops
from ..errors import FormatError, refuse
from ..ops.quant import FORMAT_IDS
from .format import QuantFormat, register_format
from .tensor import QuantizedTensor

_ID = FORMAT_IDS["int8"]
_ROW_MAJOR = 0  # weight_format: the other values are orders of GPU generations long gone
_ADVICE = "The checkpoint is damaged or of another format; save it again."


def _quantize(W: Tensor, blocksize: int, double_quant: bool) -> QuantizedTensor:
    source = W.float() if W.dtype == torch.float64 else W
    codes, absmax = ops.quant.quantize(source, _ID, W.shape[1])
    N, K = W.shape
    return QuantizedTensor(codes, absmax, None, "int8", K, (N, K), W.dtype)


def _to_canonical(q: QuantizedTensor) -> dict[str, Tensor]:
    layout = torch.tensor(_ROW_MAJOR, dtype=torch.uint8, device=q.codes.device)
    return {"weight": q.codes, "SCB": q.scales, "weight_format": layout}


def _keys(double_quant: bool) -> tuple[str, ...]:
    return ("weight", "SCB", "weight_format")


def _check(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if t.dtype != dtype or tuple(t.shape) != shape:
        raise refuse(
            FormatError, name, f"{t.dtype} {list(t.shape)}", f"{dtype} {list(shape)}", _ADVICE
        )
    return t


def _from_canonical(
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int] | None,
    device: torch.device | str | None,
) -> QuantizedTensor:
    missing = sorted({"weight", "SCB"} - set(tensors))
    if missing:
        raise refuse(
            FormatError, "quantised weight", f"missing {missing}", "weight and SCB", _ADVICE
        )
    weight = tensors["weight"]
    if weight.dim() == 3 and weight.shape[2] == 1:  # as fastpeft/folders.py writes it
        weight = weight.squeeze(2)
    if weight.dim() != 2:
        raise refuse(FormatError, "weight", list(weight.shape), "[N, K]", _ADVICE)
    N, K = shape if shape is not None else tuple(weight.shape)
    codes = _check("weight", weight, torch.int8, (N, K))
    scales = _check("SCB", tensors["SCB"], torch.float32, (N,))
    if not bool(torch.isfinite(scales).all()):
        raise refuse(FormatError, "SCB", "NaN or Inf", "finite numbers", _ADVICE)
    layout = tensors.get("weight_format")
    if layout is not None and (layout.numel() != 1 or int(layout) != _ROW_MAJOR):
        raise refuse(
            FormatError,
            "weight_format",
            layout.tolist(),
            "0 (row-major)",
            "Save it again row-major.",
        )
    target = codes.device if device is None else torch.device(device)
    # The file does not tell what was quantised; float16 is what bitsandbytes quantises from.
    return QuantizedTensor(
        codes.to(target).contiguous(),
        scales.to(target).contiguous(),
        None,
        "int8",
        K,
        (N, K),
        torch.float16,
    )


def _empty(
    N: int,
    K: int,
    blocksize: int,
    double_quant: bool,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> QuantizedTensor:
    codes = torch.zeros([N, K], dtype=torch.int8, device=device)
    scales = torch.zeros([N], device=device)
    return QuantizedTensor(codes, scales, None, "int8", K, (N, K), dtype)


register_format(
    QuantFormat(
        name="int8",
        id=_ID,
        bits=8,
        quantize=_quantize,
        to_canonical=_to_canonical,
        from_canonical=_from_canonical,
        marker=lambda tensors: "SCB" in tensors,
        keys=_keys,
        empty=_empty,
    )
)
