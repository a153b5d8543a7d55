"""What is particular to the CPU backend: bits that do not depend on threads, 16-bit rounding at
every instruction set, the refusal of an unknown one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import Case
from compare import assert_bitwise
from fastpeft.ops.quant import dequantize
from test_qlinear import ISA_LEVELS

fp = torch.ops.fastpeft
THREADS = (1, 2, 3)


def facts():
    return pytest.importorskip("fastpeft._C", reason="fastpeft._C is not built: it tells the plan")


@pytest.fixture
def threads():
    """Sets the number of threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same_at_any_thread_count(threads, run) -> None:
    first = None
    for count in THREADS:
        threads(count)
        results = run()
        for result, expected in zip(results, first or results, strict=True):
            assert_bitwise(result, expected, f"with {count} threads")
        first = first or results


# M: kernels for few tokens, one tile, several tiles, more than one piece of work; N, K: whole and
# ragged strips; blocks that lie in a row and blocks that straddle rows; the edges of int8
@pytest.mark.parametrize("M", (1, 5, 13, 200))
@pytest.mark.parametrize(
    ("kind", "N", "K", "blocksize"),
    (
        ("nf4", 640, 576, 64),
        ("nf4", 77, 96, 32),
        ("fp4", 48, 100, 128),
        ("int8", 90, 200, 64),
        ("llm.int8", 90, 200, 64),
    ),
)
def test_bits_do_not_depend_on_threads(threads, kind, N, K, blocksize, M):
    form = "int8" if kind == "llm.int8" else kind
    for direction in ("fwd", "dgrad"):
        plan = facts().plan(
            M, N, K, format=form, blocksize=blocksize, direction=direction, dtype="float32"
        )
        if plan["kernel"] != "fused":
            pytest.skip(f"{plan['kernel']} here: torch's matmul decides the order of its sums")
    inputs = Case(kind, "float32", M, N, K, blocksize=blocksize).build("cpu")
    w = inputs.weight
    packed = (w.codes, w.scales, w.nested, w.format_id, w.blocksize)

    def run():
        y, _ = fp.qlinear_fwd(inputs.x, *packed, N, w.threshold, None, None, None, 1.0, 0.0, None)
        dx = fp.qlinear_dgrad(inputs.dy, *packed, K, None, None, 0.0, None)
        return y, dx, dequantize(*packed, N, K, torch.bfloat16)

    same_at_any_thread_count(threads, run)


def test_bits_of_the_quantisers_do_not_depend_on_threads(threads):
    W = torch.randn(130, 201, generator=torch.Generator().manual_seed(0))
    x = W.clone()
    x[3, 7] = 9.0

    def run():
        codes, absmax = fp.quantize(W, 1, 64)
        tiled = fp.tile(codes, 1, *W.shape)
        kept = fp.dropout(x, 0.25, torch.tensor([5]))
        return codes, absmax, tiled, fp.untile(tiled, 1, *W.shape), *fp.quantize(W, 3, 64), kept

    same_at_any_thread_count(threads, run)


# Values whose 16-bit rounding is not plain: ties, the largest finite, overflow, subnormals, zero,
# infinity, nan; enough of them to fill a vector, and a rest.
AWKWARD = """
import sys, torch
import fastpeft.ops.quant as quant
from fastpeft._C import build_facts
base = [1.0, -1.0, 1.00390625, 1.01171875, 65504.0, 65519.9, 65520.0, 3.3895e38, 3.4e38, 1e-7,
        6.0e-8, 2.98e-8, 2.99e-8, 1e-39, -1e-40, 0.0, -0.0, float("inf"), float("-inf"),
        float("nan"), 0.333333, 2049.0, 2051.0]
absmax = torch.tensor(base * 3)  # an int8 weight of code 127: its value is about its scale
codes = torch.full((absmax.numel(), 64), 127, dtype=torch.int8)
wide = quant.dequantize(codes, absmax, None, 3, 64, *codes.shape, torch.float32)
for dtype in (torch.bfloat16, torch.float16, torch.float64):
    got = quant.dequantize(codes, absmax, None, 3, 64, *codes.shape, dtype)
    want = wide.to(dtype)
    nan = want.isnan()
    assert torch.equal(nan, got.isnan()), dtype
    as_bits = torch.int64 if dtype == torch.float64 else torch.int16
    wrong = (got.view(as_bits) != want.view(as_bits)) & ~nan
    assert not wrong.any(), (dtype, wide[wrong].unique(), got[wrong].unique())
print(build_facts()["cpu_isa"])
"""


def run_at(level: str, script: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "FASTPEFT_CPU_ISA": level}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_sixteen_bits_round_like_torch(level):
    best = facts().build_facts()["cpu_isa"]
    if ISA_LEVELS.index(level) > ISA_LEVELS.index(best):
        pytest.skip(f"this machine runs {best}, not {level}")
    done = run_at(level, AWKWARD)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == level


def test_unknown_instruction_set_is_refused():
    done = run_at(
        "mmx", "import torch, fastpeft; from fastpeft._C import build_facts; build_facts()"
    )
    assert done.returncode != 0
    assert "FASTPEFT_CPU_ISA is 'mmx', expected plain, avx2, avx512" in done.stderr
