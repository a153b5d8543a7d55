"""NF4 and FP4: 4-bit codes in blocks with an absmax each, optionally with the absmax quantised too.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3. Codes, scales and
file names are bit for bit those of bitsandbytes; memory is tiled (csrc/core/formats.h). FP4 is
read, not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

import torch
from torch import Tensor

from .. import ops
from ..errors import FormatError, refuse
from ..ops.quant import (
    FORMAT_IDS,
    NESTED_BLOCK,
    NESTED_HEAD,
    STRIP_BYTES,
    TILE_K,
    TILE_N,
    ceil_div,
)
from . import blob
from .format import QuantFormat, check_blocksize, register_format
from .tensor import QuantizedTensor

_STATE = "weight.quant_state.bitsandbytes__"
_ADVICE = "The checkpoint is damaged or of another format; save it again."


@cache
def codebook(format: str) -> Tensor:
    """The 16 values of a format, float32 [16] on the CPU, by code.

    Asked from the library (a weight whose codes are 0 ... 15 and whose scale is 1), so that Python
    holds no second copy.
    """
    id = FORMAT_IDS[format]
    codes = torch.tensor([16 * (2 * j) + 2 * j + 1 for j in range(8)], dtype=torch.uint8)
    one = torch.ones(1)
    tiled = ops.quant.tile(codes, id, 1, 16)
    return ops.quant.dequantize(tiled, one, None, id, 32, 1, 16, torch.float32).reshape(16) + 0.0


@cache
def dynamic_map() -> Tensor:
    """The 256 signed values that double quantisation rounds to, sorted, float32 [256] on the CPU.

    Decades 10^-6 ... 1, the i-th with 2^i midpoints of [0.1, 1] of either sign, then 0 and 1.
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        # torch's own linspace, rounded as the reference rounds it: float64 arithmetic differs in 72
        # last bits.
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (edges[1:] + edges[:-1]) / 2.0 * 10.0 ** (i - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _by_column(flat: Tensor, N: int, K: int, blocksize: int) -> Tensor:
    """Scales in file order [blocks] -> memory order (formats.h); padding rows are 0."""
    if K % blocksize:
        return flat.contiguous()
    columns = K // blocksize
    padded = flat.new_zeros([columns, ceil_div(N, TILE_N) * TILE_N])
    padded[:, :N] = flat.view(N, columns).t()
    return padded


def _flat(scales: Tensor, N: int, K: int, blocksize: int) -> Tensor:
    """The inverse of `_by_column`."""
    return scales.clone() if K % blocksize else scales[:, :N].t().reshape(-1)


def _assemble(
    format: str,
    codes: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> QuantizedTensor:
    tiled = ops.quant.tile(codes, FORMAT_IDS[format], *shape)
    scales = _by_column(absmax, *shape, blocksize)
    return QuantizedTensor(tiled, scales, nested, format, blocksize, shape, dtype)


def _quantize(format: str, W: Tensor, blocksize: int, double_quant: bool) -> QuantizedTensor:
    if format != "nf4":
        raise refuse(
            FormatError, "format", repr(format), "'nf4'", "FP4 is only read; NF4 is more accurate."
        )
    check_blocksize(blocksize)
    # float64 has no file form: it is quantised as the float32 it rounds to.
    source = W.float() if W.dtype == torch.float64 else W
    codes, absmax = ops.quant.quantize(source, FORMAT_IDS[format], blocksize)
    nested = None
    if double_quant:
        offset = absmax.mean().reshape(1)
        absmax, nested = ops.quant.quantize_absmax(absmax, dynamic_map().to(W.device), offset)
    N, K = W.shape
    return _assemble(format, codes, absmax, nested, blocksize, (N, K), W.dtype)


def _to_canonical(q: QuantizedTensor) -> dict[str, Tensor]:
    N, K = q.shape
    device = q.codes.device
    offset = None
    if q.nested is not None:  # on meta there is no number; the names and sizes still hold
        offset = 0.0 if q.nested.is_meta else q.nested[0].item()
    state = blob.QuantState(q.format, q.blocksize, q.dtype, q.shape, offset)
    codes = ops.quant.untile(q.codes, FORMAT_IDS[q.format], N, K)
    tensors = {
        "weight": codes.unsqueeze(1),
        "weight.absmax": _flat(q.scales, N, K, q.blocksize),
        "weight.quant_map": codebook(q.format).to(device, copy=True),
    }
    if q.nested is not None:
        tensors["weight.nested_absmax"] = q.nested[NESTED_HEAD:].clone()
        tensors["weight.nested_quant_map"] = q.nested[1:NESTED_HEAD].clone()
    tensors[_STATE + q.format] = blob.pack(state).to(device)
    return tensors


def _keys(format: str, double_quant: bool) -> tuple[str, ...]:
    nested = ("weight.nested_absmax", "weight.nested_quant_map") if double_quant else ()
    return ("weight", "weight.absmax", "weight.quant_map", *nested, _STATE + format)


def _check_vector(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, length: int
) -> Tensor:
    t = tensors[name]
    if t.dtype != dtype or t.numel() != length:
        raise refuse(
            FormatError, name, f"{t.dtype} {list(t.shape)}", f"{dtype} [{length}]", _ADVICE
        )
    if t.is_floating_point() and not bool(torch.isfinite(t).all()):
        raise refuse(FormatError, name, "NaN or Inf", "finite numbers", _ADVICE)
    return t.reshape(-1)


def _read_nested(tensors: Mapping[str, Tensor], offset: float, blocks: int) -> Tensor:
    absmax = _check_vector(
        tensors, "weight.nested_absmax", torch.float32, ceil_div(blocks, NESTED_BLOCK)
    )
    map = _check_vector(tensors, "weight.nested_quant_map", torch.float32, 256)
    if bool((map[1:] < map[:-1]).any()):
        raise refuse(FormatError, "weight.nested_quant_map", "unsorted", "sorted values", _ADVICE)
    largest = float(map.abs().max()) * float(absmax.abs().max()) + abs(offset)
    if largest > torch.finfo(torch.float32).max:
        raise refuse(
            FormatError, "weight.nested_absmax", f"scales up to {largest:g}", "float32", _ADVICE
        )
    head = torch.tensor([offset], dtype=torch.float32, device=absmax.device)
    return torch.cat([head, map.to(absmax.device), absmax])


def _check_shape(stored: tuple[int, int], expected: tuple[int, int] | None) -> None:
    if expected is not None and stored != expected:
        raise refuse(
            FormatError,
            "weight",
            f"a quantised weight of shape {list(stored)}",
            f"{list(expected)}, the module's",
            "This checkpoint belongs to another model.",
        )


def _read_codes(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    # Some writers store the same bytes under another dtype (quant_storage).
    codes = weight.contiguous().reshape(-1).view(torch.uint8)
    if codes.numel() != ceil_div(shape[0] * shape[1], 2):
        raise refuse(
            FormatError,
            "weight",
            f"{codes.numel()} bytes",
            f"{ceil_div(shape[0] * shape[1], 2)} for shape {list(shape)}, two weights a byte",
            _ADVICE,
        )
    return codes


def _from_canonical(
    format: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int] | None,
    device: torch.device | str | None,
) -> QuantizedTensor:
    name = _STATE + format
    state = blob.parse(tensors[name], name)
    keys = _keys(format, state.nested_offset is not None)
    missing = sorted(set(keys) - set(tensors))
    surplus = sorted(set(_keys(format, True)) & set(tensors) - set(keys))
    if missing or surplus:
        raise refuse(
            FormatError,
            "quantised weight",
            f"missing {missing}, surplus {surplus}",
            f"the tensors {list(keys)}",
            _ADVICE,
        )
    _check_shape(state.shape, shape)
    codes = _read_codes(tensors["weight"], state.shape)
    map = _check_vector(tensors, "weight.quant_map", torch.float32, 16)
    if not torch.equal(map.cpu(), codebook(format)):
        raise refuse(
            FormatError,
            "weight.quant_map",
            "other values",
            f"the 16 values of {format}",
            "Only the standard codebooks are supported.",
        )
    blocks = ceil_div(state.shape[0] * state.shape[1], state.blocksize)
    nested = None
    if state.nested_offset is not None:
        absmax = _check_vector(tensors, "weight.absmax", torch.uint8, blocks)
        nested = _read_nested(tensors, state.nested_offset, blocks)
    else:
        absmax = _check_vector(tensors, "weight.absmax", torch.float32, blocks)
    target = codes.device if device is None else torch.device(device)
    return _assemble(
        format,
        codes.to(target),
        absmax.to(target),
        None if nested is None else nested.to(target),
        state.blocksize,
        state.shape,
        state.dtype,
    )


def _empty(
    format: str,
    N: int,
    K: int,
    blocksize: int,
    double_quant: bool,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> QuantizedTensor:
    check_blocksize(blocksize)
    blocks = ceil_div(N * K, blocksize)
    padded_n = ceil_div(N, TILE_N)
    by_column = K % blocksize == 0
    size = [K // blocksize, padded_n * TILE_N] if by_column else [blocks]
    # Zeros: an unloaded layer gives finite numbers, not whatever memory held (NF4's code 0 is -1,
    # so scales must be 0).
    codes = torch.zeros(
        [padded_n, ceil_div(K, TILE_K), STRIP_BYTES], dtype=torch.uint8, device=device
    )
    scales = torch.zeros(size, dtype=torch.uint8 if double_quant else torch.float32, device=device)
    nested = None
    if double_quant:
        nested = torch.zeros(NESTED_HEAD + ceil_div(blocks, NESTED_BLOCK), device=device)
    return QuantizedTensor(codes, scales, nested, format, blocksize, (N, K), dtype)


for _name in ("nf4", "fp4"):
    register_format(
        QuantFormat(
            name=_name,
            id=FORMAT_IDS[_name],
            bits=4,
            quantize=partial(_quantize, _name),
            to_canonical=_to_canonical,
            from_canonical=partial(_from_canonical, _name),
            marker=lambda tensors, name=_STATE + _name: name in tensors,
            keys=partial(_keys, _name),
            empty=partial(_empty, _name),
        )
    )
