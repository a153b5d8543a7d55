"""The plan and the floor: pure functions of a problem, printable, without a GPU."""

from __future__ import annotations

import itertools
import random

import pytest
from cases import KINDS, Case

_C = pytest.importorskip("fastpeft._C", reason="fastpeft._C is not built: it prints plans")

FORMATS = ("dense", "nf4", "fp4", "int8")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KERNELS = {
    "fused",
    "wgmma",
    "narrow",
    "dequantize+matmul",
    "panels+matmul",
    "dense",
}  # LLM.int8() is no problem of plan()
MACHINES = ((0, 2), (0, 64), (80, 108), (90, 132))  # (arch, multiprocessors or threads)
SIZES = ((1, 1), (7, 341), (576, 1536), (4096, 4096), (28672, 8192))  # (N, K)
PROBLEMS = list(
    itertools.product(
        FORMATS, ("fwd", "dgrad"), DTYPE_BYTES, MACHINES, SIZES, (0, 1, 8, 9, 64, 200, 4096)
    )
)


def plan(M, N, K, machine, **more):
    arch, sm_count = machine
    return _C.plan(M, N, K, arch=arch, sm_count=sm_count, **more)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_problem_has_a_sound_plan(fmt):
    for format, direction, dtype, machine, (N, K), M in PROBLEMS:
        if format != fmt:
            continue
        p = plan(M, N, K, machine, format=format, direction=direction, dtype=dtype)
        where = f"{format} {direction} {dtype} {machine} N={N} K={K} M={M}: {p}"
        assert p["kernel"] in KERNELS, where
        assert (p["kernel"] == "dense") == (format == "dense"), where
        assert p["workspace_bytes"] >= 0, where
        # a temporary never exceeds the whole 16- or 32-bit weight, padded to whole strips
        whole = (N + 15) // 16 * 16 * ((K + 63) // 64 * 64) * DTYPE_BYTES[dtype]
        assert p["workspace_bytes"] <= max(whole, 1 << 20), where
        if p["kernel"] == "panels+matmul":
            assert machine[0] == 0 and 1 <= p["panel_rows"] <= max(N, 16), where
        if p["kernel"] == "dense":
            assert p["workspace_bytes"] == 0, where
        if p["kernel"] == "wgmma" and format == "int8":
            assert machine[0] == 90 and dtype != "float32", where
            assert K % 16 == 0 and N % 8 == 0 and p["tile_tokens"] in (64, 128, 256), where
            assert p["split"] in (1, 3, 4), where
        elif p["kernel"] in ("wgmma", "narrow"):
            assert machine[0] == 90 and format == "nf4", where
            assert dtype in ("bfloat16", "float16"), where
            assert K % 64 == 0 and p["tile_rows"] in (64, 128), where
            widths = (128, 256) if p["kernel"] == "wgmma" else (16, 32, 64, 128)
            assert p["tile_tokens"] in widths and p["split"] in (1, 2, 4, 8), where


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("direction", ["fwd", "dgrad"])
def test_few_tokens_are_fused_and_many_are_not_split_back(machine, direction):
    """Once the plan has left the small-M kernel it does not come back to it with more tokens."""
    kernels = [
        plan(M, 4096, 4096, machine, direction=direction)["kernel"] for M in range(1, 2049, 7)
    ]
    assert kernels[0] == "fused"
    left = [k != "fused" for k in kernels]
    assert left == sorted(left)


@pytest.mark.skipif(not _C.build_facts()["sm90a"], reason="built without sm_90a kernels")
@pytest.mark.parametrize("direction", ["fwd", "dgrad"])
def test_many_tokens_run_on_tensor_cores_of_sm_90(direction):
    p = plan(2048, 4096, 4096, (90, 132), direction=direction)
    assert p["kernel"] == "wgmma" and p["workspace_bytes"] == 0
    # its limits send a problem elsewhere, not into an error
    for other in ({"K": 4100}, {"N": 4097}, {"dtype": "float32"}, {"blocksize": 32}):
        sizes = {"M": 2048, "N": 4096, "K": 4096, **other}
        assert _C.plan(**sizes, arch=90, sm_count=132, direction=direction)["kernel"] != "wgmma"


@pytest.mark.skipif(not _C.build_facts()["sm90a"], reason="built without sm_90a kernels")
def test_int8_on_sm_90():
    """Weight only: one pass for few tokens, then tensor cores; never a 16-bit copy of W."""
    for M, kernel in ((1, "fused"), (16, "fused"), (17, "wgmma"), (8192, "wgmma")):
        p = plan(M, 4096, 4096, (90, 132), format="int8")
        assert p["kernel"] == kernel and p["workspace_bytes"] == 0, p
    for M in (1, 64, 8192):
        for dtype in ("bfloat16", "float16"):
            p = plan(M, 4096, 4096, (90, 132), format="int8", direction="dgrad", dtype=dtype)
            assert p["kernel"] == "wgmma", p
    for M, N, K, tokens, split in ((64, 1024, 4096, 64, 4), (64, 14336, 4096, 64, 1)):
        p = plan(M, N, K, (90, 132), format="int8")
        assert (p["tile_tokens"], p["split"]) == (tokens, split), p
    for other in ({"K": 4100}, {"N": 4097}, {"dtype": "float32"}):
        sizes = {"M": 2048, "N": 4096, "K": 4096, **other}
        assert _C.plan(**sizes, format="int8", arch=90, sm_count=132)["kernel"] != "wgmma"


@pytest.mark.skipif(not _C.build_facts()["sm90a"], reason="built without sm_90a kernels")
@pytest.mark.parametrize("direction", ["fwd", "dgrad"])
def test_dense_base_takes_its_branch_along(direction):
    """One product: many tokens, and tiles of 256 x 256 that fill the card."""

    def is_one(M, N=4096, K=4096, R=16, machine=(90, 132), **more):
        p = plan(M, N, K, machine, R=R, format="dense", direction=direction, **more)
        assert p["kernel"] == "dense" and p["workspace_bytes"] == 0, p
        return p["fuses_lora"]

    assert is_one(8192) and is_one(4096) and is_one(8192, 14336, 4096, R=64)
    assert not is_one(2048 + 256)  # 144 tiles on 66 pairs: three waves
    assert not is_one(1000) and not is_one(8192, R=0) and not is_one(8192, R=72)
    assert not is_one(8192, R=12) and not is_one(8192, K=4100) and not is_one(8192, N=4100)
    assert not is_one(8192, dtype="float16") and not is_one(8192, machine=(80, 108))


def test_same_problem_same_plan():
    for M in (1, 5, 100):
        first = _C.plan(M, 576, 1536, R=16, format="nf4", arch=90, sm_count=132)
        assert first == _C.plan(M, 576, 1536, R=16, format="nf4", arch=90, sm_count=132)


def test_text_names_the_problem_and_the_kernel():
    p = _C.plan(33, 576, 1536, R=16, format="nf4", dtype="bfloat16", arch=90, sm_count=132)
    for part in ("nf4", "fwd", "bfloat16", "M=33", "N=576", "K=1536", "R=16", "sm_90", p["kernel"]):
        assert part in p["text"], p["text"]
    assert "cpu" in _C.plan(33, 576, 1536)["text"]


@pytest.mark.parametrize(
    "bad",
    [
        {"M": -1},
        {"N": 0},
        {"K": 0},
        {"R": -1},
        {"format": "int3"},
        {"dtype": "float8"},
        {"direction": "sideways"},
        {"blocksize": 0},
    ],
    ids=str,
)
def test_refuses_what_is_no_problem(bad):
    for ask in (_C.plan, _C.floor):
        with pytest.raises(ValueError, match="expected"):
            ask(**{"M": 1, "N": 64, "K": 64, **bad})


def families(M, N, K, **more) -> str:
    return plan(M, N, K, (90, 132), **more)["kernel"]


@pytest.mark.skipif(not _C.build_facts()["sm90a"], reason="built without sm_90a kernels")
@pytest.mark.parametrize(
    ("M", "N", "K", "more", "kernels"),
    [
        (1, 4096, 4096, {}, {"fused"}),
        (8, 14336, 4096, {"R": 16}, {"fused"}),
        (16, 14336, 4096, {"R": 16}, {"narrow"}),
        (64, 4096, 4096, {"direction": "dgrad"}, {"narrow"}),
        (64, 4096, 4096, {"dtype": "float16"}, {"narrow", "wgmma"}),
        (2048, 4096, 4096, {"dtype": "float16"}, {"wgmma"}),
        (2048, 14336, 4096, {"format": "int8"}, {"wgmma"}),
        (1, 28672, 8192, {"direction": "dgrad"}, {"fused"}),
        (512, 14336, 4096, {}, {"wgmma"}),
        (8192, 4096, 14336, {"direction": "dgrad"}, {"wgmma"}),
        (4096, 4096, 4096, {"dtype": "float32"}, {"dequantize+matmul"}),
        (300, 576, 577, {}, {"dequantize+matmul"}),
        (8192, 576, 1536, {}, {"dequantize+matmul"}),
        (1024, 576, 1536, {}, {"narrow"}),
        (16384, 4096, 4096, {"direction": "dgrad"}, {"wgmma"}),
        (4096, 4096, 4096, {"format": "dense"}, {"dense"}),
    ],
    ids=str,
)
def test_kernel_families_of_known_problems(M, N, K, more, kernels):
    assert families(M, N, K, **more) in kernels


def test_portable_devices_get_portable_kernels():
    for arch, sms in ((80, 108), (86, 82), (89, 128), (120, 170)):
        for M in (1, 16, 300, 4096):
            assert plan(M, 4096, 4096, (arch, sms))["kernel"] not in ("wgmma", "narrow")


def test_no_problem_crashes():
    """Sizes, blocks and devices drawn at random, far outside what a model has."""
    draw = random.Random(0)
    for _ in range(3000):
        N, K = (draw.choice((1, 3, 17, 64, 1000, 2**20 + 5)) for _ in range(2))
        M, R = draw.choice((0, 1, 17, 64, 4097, 2**31 + 5)), draw.randint(0, 300)
        sizes = {"M": M, "N": N, "K": K, "R": R}
        more = {
            "format": draw.choice(FORMATS),
            "blocksize": draw.choice((1, 7, 32, 64, 96, 4096, 2**20)),
            "direction": draw.choice(("fwd", "dgrad")),
            "dtype": draw.choice((*DTYPE_BYTES, "float64")),
        }
        arch, sms = draw.choice((0, 75, 80, 86, 89, 90, 100, 120)), draw.choice((0, 1, 132, 1000))
        p = _C.plan(**sizes, **more, arch=arch, sm_count=sms)
        assert p["kernel"] in KERNELS and p["workspace_bytes"] >= 0, (sizes, more, arch, sms, p)
        f = _C.floor(**sizes, **more, machine=draw.choice(_C.MACHINES)["name"])
        assert f["us"] == max(f["memory_us"], f["compute_us"]) > 0, (sizes, more, f)


# ---- the floor


@pytest.mark.parametrize("R", [0, 16])
@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "int8", "dense"])
def test_floor_counts_what_the_benchmarks_count(kind, R):
    for M, (N, K) in itertools.product((1, 300), ((4096, 4096), (7, 341))):
        case = Case(kind, "bfloat16", M, N, K, R)
        fmt, double, _ = KINDS[kind]
        for direction in ("fwd", "dgrad"):
            f = _C.floor(M, N, K, R, fmt, direction=direction, double_quant=double)
            assert f["bytes"] == pytest.approx(case.bytes(direction), rel=1e-12)
            assert f["flops"] == case.flops(direction)


def test_floors_by_hand():
    """14336 x 4096 on an H200: 30.3 MB of codes and scales at 4.11 TB/s; 770 TFLOP/s."""
    one = _C.floor(1, 14336, 4096)
    assert one["bound"] == "memory" and one["us"] == pytest.approx(7.38, abs=0.01)
    many = _C.floor(8192, 14336, 4096)
    assert many["bound"] == "compute" and many["us"] == pytest.approx(1249.5, rel=1e-3)
    assert _C.floor(8192, 14336, 4096, dtype="float32")["us"] > 10 * many["us"]
    assert _C.floor(1, 14336, 4096, dtype="float64")["compute_us"] == 0  # no figure


def test_machines_are_real_ones():
    names = [machine["name"] for machine in _C.MACHINES]
    assert names[0] == "H200" and len(set(names)) == len(names)
    for machine in _C.MACHINES:
        assert machine["source"].startswith("measured" if machine["name"] == "H200" else "data")
        assert 80 <= machine["arch"] <= 120 and 80 <= machine["sm_count"] <= 200
        assert 500 < machine["read_gbs"] < 5000
        assert machine["tflops_fp32"] < machine["tflops_16bit"] < 1000
    with pytest.raises(ValueError, match="H100-SXM"):
        _C.floor(1, 64, 64, machine="abacus")


def test_constants_are_the_formats():
    import reference
    import torch

    assert torch.tensor(_C.NF4_CODE).tolist() == torch.tensor(reference.NF4).tolist()
    assert _C.TILE == {"n": 16, "k": 64, "strip_bytes": 512}
