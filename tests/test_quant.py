"""Quantised tensors against the bitsandbytes wheel, bit for bit, both ways; and what is refused."""

from __future__ import annotations

import json
import math

import fastpeft
import pytest
import torch
from fastpeft.quant import FORMATS, QuantizedTensor, quantize_tensor
from fastpeft.quant.blob import MAX_BLOB_BYTES
from fastpeft.quant.nf4 import codebook, dynamic_map

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

STATE = "weight.quant_state.bitsandbytes__nf4"
# shape, blocksize: multiples of everything; odd K; blocks that straddle rows; a ragged last block;
# an odd number of elements; one block only; more than 256 blocks (two nested blocks).
SHAPES = [
    ((64, 128), 64),
    ((7, 341), 64),
    ((24, 80), 32),
    ((5, 33), 128),
    ((1, 3), 32),
    ((130, 192), 32),
    ((40, 4096), 4096),
    ((16, 1024), 512),
]


def theirs(W, blocksize, double_quant, kind="nf4") -> dict[str, torch.Tensor]:
    """The tensors bitsandbytes writes for W."""
    codes, state = bnb.quantize_4bit(
        W, blocksize=blocksize, compress_statistics=double_quant, quant_type=kind
    )
    packed = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    return {"weight": codes, **packed}


def assert_same(ours: dict, other: dict) -> None:
    assert set(ours) == set(other)
    for name, t in other.items():
        assert ours[name].dtype == t.dtype and ours[name].shape == t.shape, name
        assert torch.equal(ours[name], t), name


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, blocksize", SHAPES)
def test_nf4_is_bitsandbytes(shape, blocksize, dtype, double_quant):
    W = (torch.randn(shape) * 0.05).to(dtype)
    other = theirs(W, blocksize, double_quant)
    q = quantize_tensor(W, "nf4", blocksize, double_quant)
    assert_same(q.canonical(), other)
    again = QuantizedTensor.from_canonical(other)
    assert_same(again.canonical(), other)
    for name in ("codes", "scales", "nested"):
        a, b = getattr(q, name), getattr(again, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    assert (again.format, again.blocksize, again.shape) == ("nf4", blocksize, shape)
    assert again.dtype == dtype


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_blocksize(blocksize):
    W = torch.randn(6, 2048)
    assert_same(quantize_tensor(W, "nf4", blocksize, True).canonical(), theirs(W, blocksize, True))


def test_nf4_at_its_edges():
    """Zero blocks, single outliers, values on a threshold, tiny and large numbers."""
    W = torch.randn(8, 256)
    W[0] = 0
    W[1, :64] = 0
    W[2, 5] = 1000.0
    W[3, :64] = torch.linspace(-1, 1, 64)
    middles = (codebook("nf4")[1:] + codebook("nf4")[:-1]) / 2
    W[4, :15], W[4, 15] = middles, 1.0
    W[5] *= 1e-30
    W[6] *= 1e30
    W[7] = -0.0
    for double_quant in (False, True):
        ours = quantize_tensor(W, "nf4", 64, double_quant).canonical()
        assert_same(ours, theirs(W, 64, double_quant))


def test_dynamic_map_and_codebooks():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    for kind in ("nf4", "fp4"):
        assert torch.equal(codebook(kind), bnb.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape, blocksize", SHAPES[:5])
def test_dequantise(kind, shape, blocksize, double_quant):
    """The exact weight: codebook times scale, rounded once to float32; fp4 is read."""
    other = theirs(torch.randn(shape), blocksize, double_quant, kind)
    q = QuantizedTensor.from_canonical(other)
    assert_same(q.canonical(), other)
    absmax = other["weight.absmax"]
    if double_quant:
        nested = other["weight.nested_absmax"].repeat_interleave(256)[: absmax.numel()]
        offset = json.loads(bytes(other[f"weight.quant_state.bitsandbytes__{kind}"].tolist()))
        absmax = dynamic_map()[absmax.long()] * nested + torch.tensor(offset["nested_offset"])
    packed = other["weight"].reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: math.prod(shape)].long()
    scale = absmax.repeat_interleave(blocksize)[: codes.numel()]
    exact = (codebook(kind)[codes] * scale).reshape(shape)
    assert torch.equal(q.dequantize(torch.float32), exact)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(q.dequantize(dtype), exact.to(dtype))
    assert q.dequantize().dtype == q.dtype == torch.float32


@pytest.mark.parametrize("shape", [(64, 128), (7, 341), (1, 1)])
def test_int8_is_bitsandbytes(shape):
    W = torch.randn(shape).half()
    codes, scales, _ = bnb.int8_vectorwise_quant(W)
    q = quantize_tensor(W, "int8")
    ours = q.canonical()
    assert torch.equal(ours["weight"], codes) and torch.equal(ours["SCB"], scales)
    assert ours["weight_format"].item() == 0 and ours["weight_format"].dtype == torch.uint8
    again = QuantizedTensor.from_canonical(ours)
    assert torch.equal(again.dequantize(), q.dequantize())
    exact = codes.double() * scales.double()[:, None] / 127
    torch.testing.assert_close(q.dequantize(torch.float64), exact, rtol=2e-7, atol=0)


def test_int8_zero_row():
    W = torch.randn(3, 8)
    W[1] = 0
    assert torch.equal(quantize_tensor(W, "int8").dequantize()[1], torch.zeros(8))


def test_other_storage_dtype_holds_the_same_bytes():
    W = torch.randn(16, 128)
    other = theirs(W, 64, True)
    plain = QuantizedTensor.from_canonical(other)
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        retyped = {**other, "weight": other["weight"].view(-1).view(dtype).unsqueeze(1)}
        assert torch.equal(QuantizedTensor.from_canonical(retyped).codes, plain.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format, double_quant", [("nf4", False), ("nf4", True), ("int8", False)])
@pytest.mark.parametrize("shape", [(64, 1024), (7, 341), (130, 192)])
def test_every_device_makes_the_same_tensor(device, shape, format, double_quant, dtype):
    """The mean of the scales is torch's own and may differ in its last bits between devices, and a
    nested scale with it; everything else is equal bit for bit.
    """
    W = torch.randn(shape).to(dtype)
    here = quantize_tensor(W, format, 64, double_quant)
    there = quantize_tensor(W.to(device), format, 64, double_quant)
    assert there.device.type == device
    file = {name: t.cpu() for name, t in there.canonical().items()}
    if device == "cpu" or not double_quant:
        assert_same(file, here.canonical())
    assert torch.equal(there.codes.cpu(), here.codes)
    moved = QuantizedTensor.from_canonical(here.canonical(), device=device)
    assert_same({n: t.cpu() for n, t in moved.canonical().items()}, here.canonical())
    for out in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(moved.dequantize(out).cpu(), here.dequantize(out))


def test_nbytes_and_move():
    q = quantize_tensor(torch.randn(256, 1024))
    assert q.nbytes == 256 * 1024 // 2 + 256 * 1024 // 64 + 4 * (257 + 16)
    moved = q.to("cpu")
    assert torch.equal(moved.dequantize(), q.dequantize()) and moved.device == q.codes.device


def test_float64_is_quantised_like_float32():
    W = torch.randn(8, 64)
    a, b = quantize_tensor(W), quantize_tensor(W.double())
    assert torch.equal(a.codes, b.codes) and b.dequantize().dtype == torch.float64
    assert QuantizedTensor.from_canonical(b.canonical()).dtype == torch.float64


def test_views_are_quantised_by_value():
    W = torch.randn(128, 64)
    assert torch.equal(quantize_tensor(W.t()).codes, quantize_tensor(W.t().contiguous()).codes)


def damaged(**changes) -> dict[str, torch.Tensor]:
    """A good double-quantised file of a [8, 128] weight with some tensors replaced (None: gone)."""
    tensors = quantize_tensor(torch.randn(8, 128)).canonical()
    for name, value in changes.items():
        name = {"state": STATE}.get(name, "weight" if name == "weight" else f"weight.{name}")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


def blob(drop=(), **changes) -> torch.Tensor:
    fields = json.loads(bytes(damaged()[STATE].tolist()))
    fields = {k: v for k, v in {**fields, **changes}.items() if k not in drop}
    return text(json.dumps(fields))


def text(value: str | bytes) -> torch.Tensor:
    raw = value.encode() if isinstance(value, str) else value
    return torch.tensor(list(raw), dtype=torch.uint8)


NAN = float("nan")
REFUSED = {
    "unknown type": ({"state": blob(quant_type="int3")}, "quant_type: got 'int3'"),
    "type against name": ({"state": blob(quant_type="fp4")}, "quant_type: got 'fp4'"),
    "type no text": ({"state": blob(quant_type=["nf4"])}, r"quant_type: got \['nf4'\]"),
    "blocksize 48": ({"state": blob(blocksize=48)}, "blocksize: got 48, expected a power of two"),
    "blocksize 16": ({"state": blob(blocksize=16)}, "blocksize: got 16, expected a power of two"),
    "blocksize 8192": ({"state": blob(blocksize=8192)}, "blocksize: got 8192"),
    "blocksize text": ({"state": blob(blocksize="64")}, "blocksize: got '64'"),
    "blocksize true": ({"state": blob(blocksize=True)}, "blocksize: got True"),
    "shape product": ({"state": blob(shape=[8, 130])}, r"weight: got 512 bytes, expected 520"),
    "shape negative": ({"state": blob(shape=[-8, -128])}, r"shape: got \[-8, -128\]"),
    "shape huge": ({"state": blob(shape=[1 << 40, 1 << 40])}, "shape: got"),
    "shape flat": ({"state": blob(shape=[1024])}, r"shape: got \[1024\]"),
    "dtype": ({"state": blob(dtype="__class__")}, "dtype: got '__class__'"),
    "offset gone": ({"state": blob(drop=["nested_offset"])}, r"missing fields \['nested_offset'\]"),
    "shape gone": ({"state": blob(drop=["shape"])}, r"missing fields \['shape'\]"),
    "surplus field": ({"state": blob(extra=1)}, r"unknown fields \['extra'\]"),
    "nested blocksize": ({"state": blob(nested_blocksize=128)}, "nested_blocksize: got 128"),
    "offset NaN": ({"state": blob(nested_offset=NAN)}, "nested_offset: got nan"),
    "offset huge": ({"state": blob(nested_offset=10**400)}, "nested_offset: got 1000"),
    "offset text": ({"state": blob(nested_offset="0")}, "nested_offset: got '0'"),
    "no JSON": ({"state": text("{")}, "got no JSON"),
    "no UTF-8": ({"state": text(b"\xff\xfe")}, "got no JSON"),
    "a list": ({"state": text("[1]")}, "got list, expected a JSON object"),
    "double key": ({"state": text('{"shape": [1, 1], "shape": [8, 128]}')}, "a key occurs twice"),
    "long blob": ({"state": torch.zeros(MAX_BLOB_BYTES + 1, dtype=torch.uint8)}, "expected uint8"),
    "float blob": ({"state": torch.zeros(10)}, "expected uint8"),
    "absmax short": (
        {"absmax": torch.zeros(15, dtype=torch.uint8)},
        r"weight.absmax: got .*\[15\]",
    ),
    "absmax dtype": ({"absmax": torch.zeros(16)}, "weight.absmax: got torch.float32"),
    "absmax gone": ({"absmax": None}, r"missing \['weight.absmax'\]"),
    "nested absmax gone": ({"nested_absmax": None}, r"missing \['weight.nested_absmax'\]"),
    "nested absmax long": ({"nested_absmax": torch.ones(2)}, r"weight.nested_absmax: got .*\[2\]"),
    "nested absmax NaN": ({"nested_absmax": torch.tensor([NAN])}, "nested_absmax: got NaN or Inf"),
    "nested absmax huge": (
        {"nested_absmax": torch.tensor([3.4e38]), "nested_quant_map": dynamic_map() * 2},
        "weight.nested_absmax: got scales up to",
    ),
    "map unsorted": ({"nested_quant_map": dynamic_map().flip(0)}, "nested_quant_map: got unsorted"),
    "map short": ({"nested_quant_map": dynamic_map()[1:]}, r"nested_quant_map: got .*\[255\]"),
    "codebook": ({"quant_map": torch.linspace(-1, 1, 16)}, "quant_map: got other values"),
    "codebook of fp4": ({"quant_map": codebook("fp4")}, "quant_map: got other values"),
    "codes short": ({"weight": torch.zeros(511, 1, dtype=torch.uint8)}, "weight: got 511 bytes"),
    "state gone": ({"state": None}, "cannot be read without its quant_state"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_damaged_file_is_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(fastpeft.FormatError, match=message) as caught:
        QuantizedTensor.from_canonical(damaged(**changes))
    assert "expected" in str(caught.value) or "a power of two" in str(caught.value)


def test_single_level_scales_are_checked():
    tensors = quantize_tensor(torch.randn(8, 128), double_quant=False).canonical()
    for bad in (float("inf"), NAN):
        absmax = tensors["weight.absmax"].clone()
        absmax[3] = bad
        with pytest.raises(fastpeft.FormatError, match="weight.absmax: got NaN or Inf"):
            QuantizedTensor.from_canonical({**tensors, "weight.absmax": absmax})
    with pytest.raises(fastpeft.FormatError, match="surplus .*nested_absmax"):
        QuantizedTensor.from_canonical({**tensors, "weight.nested_absmax": torch.ones(1)})


def test_damaged_int8_is_refused():
    good = quantize_tensor(torch.randn(4, 8), "int8").canonical()
    for name, value, message in (
        ("SCB", torch.ones(3), r"SCB: got torch.float32 \[3\], expected torch.float32 \[4\]"),
        ("SCB", torch.full((4,), NAN), "SCB: got NaN or Inf"),
        ("weight", torch.zeros(4, 8), "weight: got torch.float32"),
        ("weight", torch.zeros(32, dtype=torch.int8), r"weight: got \[32\]"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "weight_format: got 2"),
    ):
        with pytest.raises(fastpeft.FormatError, match=message):
            QuantizedTensor.from_canonical({**good, name: value})
    with pytest.raises(fastpeft.FormatError, match=r"got torch.int8 \[4, 8\].*\[4, 9\]"):
        QuantizedTensor.from_canonical(good, shape=(4, 9))


def test_foreign_shape_is_refused():
    with pytest.raises(fastpeft.FormatError, match=r"shape \[8, 128\], expected \[128, 8\]"):
        QuantizedTensor.from_canonical(damaged(), shape=(128, 8))


@pytest.mark.parametrize(
    "W, error, message",
    [
        (torch.zeros(4, 4, dtype=torch.uint8), fastpeft.StateError, "quantised already"),
        (torch.zeros(4, 4, dtype=torch.int64), fastpeft.FormatError, "floating-point matrix"),
        (torch.zeros(4, 4, device="meta"), fastpeft.StateError, "on meta, expected data"),
        (torch.zeros(4), fastpeft.FormatError, r"\[4\], expected \[N, K\]"),
        (torch.zeros(0, 4), fastpeft.FormatError, r"N, K >= 1"),
        (torch.full((4, 4), NAN), fastpeft.FormatError, "NaN or Inf"),
        ([[1.0]], fastpeft.FormatError, r"got list, expected a torch.Tensor"),
    ],
)
def test_what_cannot_be_quantised(W, error, message):
    with pytest.raises(error, match=message):
        quantize_tensor(W)


def test_refused_options():
    W = torch.randn(8, 64)
    with pytest.raises(fastpeft.StateError, match="nf4 QuantizedTensor.*It is quantised already"):
        quantize_tensor(quantize_tensor(W))
    with pytest.raises(fastpeft.FormatError, match="format: got 'nf5', expected one of fp4, int8"):
        quantize_tensor(W, "nf5")
    with pytest.raises(fastpeft.FormatError, match="FP4 is only read"):
        quantize_tensor(W, "fp4")
    for blocksize in (0, 16, 96, 8192, 64.0):
        with pytest.raises(fastpeft.FormatError, match="blocksize: got .* power of two in 32"):
            quantize_tensor(W, "nf4", blocksize)
    with pytest.raises(fastpeft.FormatError, match="'nf4' is registered already"):
        from fastpeft.quant.format import register_format

        register_format(FORMATS["nf4"])
