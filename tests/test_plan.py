"""The plan: a pure function from problem to kernel, printable, without a GPU."""

from __future__ import annotations

import itertools

import pytest

_C = pytest.importorskip("fastpeft._C", reason="fastpeft._C is not built: it prints plans")

FORMATS = ("dense", "nf4", "fp4", "int8")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KERNELS = {"fused", "wgmma", "narrow", "dequantize+matmul", "panels+matmul", "dense"}
MACHINES = ((0, 2), (0, 64), (80, 108), (90, 132))  # (arch, multiprocessors or threads)
SIZES = ((1, 1), (7, 341), (576, 1536), (4096, 4096), (28672, 8192))  # (N, K)
PROBLEMS = list(
    itertools.product(FORMATS, ("fwd", "dgrad"), DTYPE_BYTES, MACHINES, SIZES, (0, 1, 8, 9, 64, 200, 4096))
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
        if p["kernel"] in ("wgmma", "narrow"):
            assert machine[0] == 90 and format == "nf4" and dtype == "bfloat16", where
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
    for other in ({"K": 4100}, {"N": 4097}, {"dtype": "float16"}, {"blocksize": 32}):
        sizes = {"M": 2048, "N": 4096, "K": 4096, **other}
        assert _C.plan(**sizes, arch=90, sm_count=132, direction=direction)["kernel"] != "wgmma"


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
    ],
    ids=str,
)
def test_refuses_what_is_no_problem(bad):
    with pytest.raises(ValueError, match="expected"):
        _C.plan(**{"M": 1, "N": 64, "K": 64, **bad})


def test_constants_are_the_formats():
    import reference
    import torch

    assert torch.tensor(_C.NF4_CODE).tolist() == torch.tensor(reference.NF4).tolist()
    assert _C.TILE == {"n": 16, "k": 64, "strip_bytes": 512}
