"""Quantise, re-order and dequantise: wrappers and fakes. Layouts: csrc/core/formats.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import load
from .devices import check_one_device

load()
_ops = torch.ops.fastpeft

# fastpeft::Format of csrc/core/formats.h; part of the schemas, so it cannot change.
FORMAT_IDS = {"dense": 0, "nf4": 1, "fp4": 2, "int8": 3}
_INT8 = FORMAT_IDS["int8"]
_DENSE = FORMAT_IDS["dense"]

TILE_N, TILE_K, STRIP_BYTES = 16, 64, 512
NESTED_BLOCK = 256  # absmax values that share one nested absmax
NESTED_HEAD = 257  # offset and map, before the nested absmax


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(a // -b)


def quantize(w: Tensor, format: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """Canonical codes and scales of a weight.

    Args:
        w: [N, K], float32, bfloat16, float16 or float64.
        format: id from FORMAT_IDS.
        blocksize: elements that share a scale (4-bit formats); ignored by int8.

    Returns:
        (codes, absmax). 4-bit: uint8 [ceil(N*K/2)] and float32 [ceil(N*K/blocksize)]; int8: int8
        [N, K] and float32 [N].
    """
    return _ops.quantize(w, format, blocksize)


def quantize_absmax(absmax: Tensor, map: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Second level of double quantisation (Dettmers et al. 2023, "QLoRA", section 3).

    Args:
        absmax: float32 [B].
        map: float32 [256], the sorted code values.
        offset: float32 [1], subtracted before quantising.

    Returns:
        (codes uint8 [B], nested float32 [257 + ceil(B/256)] = offset, map, nested absmax).
    """
    return _ops.quantize_absmax(absmax, map, offset)


def tile(codes: Tensor, format: int, N: int, K: int) -> Tensor:
    """Canonical 4-bit codes uint8 [ceil(N*K/2)] -> tiled uint8 [ceil(N/16), ceil(K/64), 512]."""
    return _ops.tile(codes, format, N, K)


def untile(codes: Tensor, format: int, N: int, K: int) -> Tensor:
    """Tiled 4-bit codes -> canonical uint8 [ceil(N*K/2)]; the exact inverse of `tile`."""
    return _ops.untile(codes, format, N, K)


def dequantize(
    codes: Tensor,
    scales: Tensor | None,
    nested: Tensor | None,
    format: int,
    blocksize: int,
    N: int,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    """The exact weight [N, K]: float32(code * absmax), rounded once, then cast to dtype."""
    return _ops.dequantize(codes, scales, nested, format, blocksize, N, K, dtype)


@torch.library.register_fake("fastpeft::quantize")
def _(w, format, blocksize):
    if format == _INT8:
        return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[:1], dtype=torch.float32)
    count = w.shape[0] * w.shape[1]
    return (
        w.new_empty([ceil_div(count, 2)], dtype=torch.uint8),
        w.new_empty([ceil_div(count, blocksize)], dtype=torch.float32),
    )


@torch.library.register_fake("fastpeft::quantize_absmax")
def _(absmax, map, offset):
    blocks = absmax.shape[0]
    return (
        absmax.new_empty([blocks], dtype=torch.uint8),
        absmax.new_empty([NESTED_HEAD + ceil_div(blocks, NESTED_BLOCK)]),
    )


@torch.library.register_fake("fastpeft::tile")
def _(codes, format, N, K):
    return codes.new_empty([ceil_div(N, TILE_N), ceil_div(K, TILE_K), STRIP_BYTES])


@torch.library.register_fake("fastpeft::untile")
def _(codes, format, N, K):
    return codes.new_empty([ceil_div(N * K, 2)])


@torch.library.register_fake("fastpeft::dequantize")
def _(codes, scales, nested, format, blocksize, N, K, dtype):
    check_one_device(codes=codes, scales=scales, nested=nested)
    return codes.new_empty([N, K], dtype=dtype)
