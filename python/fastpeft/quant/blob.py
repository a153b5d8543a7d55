"""The quant_state blob of a 4-bit checkpoint: UTF-8 JSON inside a uint8 tensor. It comes from a
file, so it is not trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, refuse
from .format import check_blocksize

MAX_BLOB_BYTES = 1 << 20
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_ADVICE = "The checkpoint is damaged or of another format; save it again."


@dataclass(frozen=True)
class QuantState:
    """What the blob says.

    Attributes:
        quant_type: "nf4" or "fp4".
        blocksize: elements that share a scale.
        dtype: of the matrix that was quantised.
        shape: (N, K).
        nested_offset: mean of the scales when they are quantised too, else None.
    """

    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested_offset: float | None


def pack(state: QuantState) -> Tensor:
    """The blob as bitsandbytes writes it: the same fields in the same order.

    Returns:
        uint8 [bytes], on the CPU.
    """
    fields: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    if state.nested_offset is not None:
        fields["nested_blocksize"] = 256
        fields["nested_dtype"] = "float32"
        fields["nested_offset"] = state.nested_offset
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _read_json(blob: Tensor, name: str) -> Mapping[str, Any]:
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() > MAX_BLOB_BYTES:
        raise refuse(
            FormatError,
            name,
            f"{blob.dtype} {list(blob.shape)}",
            f"uint8 [at most {MAX_BLOB_BYTES}]",
            _ADVICE,
        )
    try:
        fields = json.loads(bytes(blob.tolist()).decode(), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise refuse(FormatError, name, f"no JSON ({error})", "UTF-8 JSON", _ADVICE) from error
    if not isinstance(fields, dict):
        raise refuse(FormatError, name, type(fields).__name__, "a JSON object", _ADVICE)
    return fields


def _read_shape(value: object, name: str) -> tuple[int, int]:
    ok = isinstance(value, list) and len(value) == 2
    ok = ok and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value)
    if not ok or value[0] * value[1] >= 2**31:  # type: ignore[index]
        raise refuse(
            FormatError, f"{name}: shape", repr(value), "[N, K], N * K in 1 ... 2^31 - 1", _ADVICE
        )
    return value[0], value[1]  # type: ignore[index]


def parse(blob: Tensor, name: str) -> QuantState:
    """Reads and checks a blob.

    Args:
        blob: uint8 [bytes].
        name: name of the tensor, for messages; its last piece must agree with the quant_type
            inside.

    Raises:
        FormatError: no JSON object, a field missing, unknown or out of range, nested_blocksize
            other than 256.
    """
    fields = _read_json(blob, name)
    nested = [f for f in _NESTED_FIELDS if f in fields]
    expected = ["quant_type", "blocksize", "dtype", "shape", *(_NESTED_FIELDS if nested else ())]
    missing = [f for f in expected if f not in fields]
    surplus = sorted(set(fields) - set(expected))
    if missing or surplus:
        raise refuse(
            FormatError,
            name,
            f"missing fields {missing}, unknown fields {surplus}",
            f"the fields {expected}",
            _ADVICE,
        )
    quant_type = fields["quant_type"]
    if quant_type not in ("nf4", "fp4") or not name.endswith(f"__{quant_type}"):
        raise refuse(
            FormatError,
            f"{name}: quant_type",
            repr(quant_type),
            "'nf4' or 'fp4', the one in the name",
            _ADVICE,
        )
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in _DTYPES:
        raise refuse(
            FormatError, f"{name}: dtype", repr(fields["dtype"]), f"one of {list(_DTYPES)}", _ADVICE
        )
    offset = None
    if nested:
        _check_nested(fields, name)
        offset = float(fields["nested_offset"])
    return QuantState(
        quant_type,
        check_blocksize(fields["blocksize"]),
        _DTYPES[fields["dtype"]],
        _read_shape(fields["shape"], name),
        offset,
    )


def _check_nested(fields: Mapping[str, Any], name: str) -> None:
    for field, expected in (("nested_blocksize", 256), ("nested_dtype", "float32")):
        if fields[field] != expected:
            raise refuse(
                FormatError, f"{name}: {field}", repr(fields[field]), repr(expected), _ADVICE
            )
    offset = fields["nested_offset"]
    if not isinstance(offset, (int, float)) or isinstance(offset, bool):
        raise refuse(FormatError, f"{name}: nested_offset", repr(offset), "a number", _ADVICE)
    # The comparison is exact for integers of any length, where float() would overflow.
    if not abs(offset) <= torch.finfo(torch.float32).max:
        raise refuse(
            FormatError,
            f"{name}: nested_offset",
            f"{str(offset)[:40]}",
            "a finite float32",
            _ADVICE,
        )
