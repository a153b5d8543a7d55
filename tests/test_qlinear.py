"""y = x W^T + bias + scaling * drop(x) A^T B^T and its gradients, against float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cases
import compare
import kernelkit
import pytest
import reference
import torch
from cases import COVERING, MODEL_SIZED, Case
from fastpeft.ops import lora as lora_ops
from fastpeft.ops import quant as quant_ops
from fastpeft.ops.lora import LowRank
from fastpeft.ops.qlinear import qlinear

ISA_LEVELS = ("plain", "avx2", "avx512", "avx512-bf16")  # each holds the ones before it


@pytest.mark.parametrize("case", COVERING + MODEL_SIZED, ids=str)
def test_values_and_gradients(device, case):
    kernelkit.check(case, device)


def test_every_pair_of_settings_meets():
    met = set().union(*(cases.pairs(case) for case in COVERING))
    for first, second in itertools.combinations(cases.AXES, 2):
        for a, b in itertools.product(cases.AXES[first], cases.AXES[second]):
            if {first, second} == {"R", "dropout"} and a == 0 and b > 0:
                continue  # without LoRA there is nothing to drop
            assert ((first, a), (second, b)) in met, f"{first}={a} never meets {second}={b}"


@pytest.mark.parametrize("case", COVERING[::4], ids=str)
def test_second_run_is_bitwise_equal(device, case):
    inputs = case.build(device)
    first, second = kernelkit.run(inputs), kernelkit.run(inputs)
    for name in first:
        compare.assert_bitwise(first[name], second[name], f"{case} {name}")


def inside(t: torch.Tensor | None) -> torch.Tensor | None:
    """t as the middle of a tensor three times as long: packed, but with an offset."""
    if t is None:
        return None
    around = torch.cat([torch.full_like(t, 1e4), t.detach(), torch.full_like(t, 1e4)])
    return around[t.shape[0] : 2 * t.shape[0]]


@pytest.mark.parametrize("M", [1, 5, 64])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_slices_of_larger_tensors(device, kind, M):
    inputs = Case(kind, "float32", M, 64, 128, 8, bias=True).build(device)
    names = ("x", "dy", "bias", "A", "B")
    sliced = replace(inputs, **{name: inside(getattr(inputs, name)) for name in names})
    assert all(getattr(sliced, name).storage_offset() > 0 for name in names)
    first, second = kernelkit.run(inputs), kernelkit.run(sliced)
    for name in first:
        compare.assert_bitwise(first[name], second[name], f"{kind} {name}")


@pytest.mark.parametrize("case", [c for c in COVERING if c.R][::9], ids=str)
def test_low_rank_factors_in_the_activations_dtype(device, case):
    kernelkit.check(case, device, lora_dtype=case.torch_dtype)


@pytest.mark.parametrize("case", COVERING[::6], ids=str)
def test_without_gradients_the_same_bits(device, case):
    inputs = case.build(device)
    low = None
    if inputs.A is not None:
        low = LowRank(inputs.A, inputs.B, inputs.scaling, inputs.p, inputs.seed)
    with torch.no_grad():
        y = qlinear(inputs.x, kernelkit.weight_of(inputs), inputs.bias, low)
    compare.assert_bitwise(y.reshape(-1, y.shape[-1]), kernelkit.run(inputs)["y"], f"{case} y")


@pytest.mark.parametrize("kind", [k for k, v in cases.KINDS.items() if v[0] in ("nf4", "fp4")])
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_weight_in_tiled_layout_is_the_exact_one(device, kind, shape):
    """The layout is packed here by reference.py and read there by the kernel."""
    N, K, blocksize = shape
    w = Case(kind, "float32", 1, N, K, blocksize=blocksize).build(device).weight
    for dtype in cases.DTYPES.values():
        got = quant_ops.dequantize(
            w.codes, w.scales, w.nested, w.format_id, w.blocksize, N, K, dtype
        )
        compare.assert_bitwise(got, w.exact.to(dtype), f"{kind} {shape} {dtype}")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 341), (3, 5, 64), (0, 8), (1025, 33)], ids=str)
def test_dropout_is_the_philox_mask(device, shape, dtype, p):
    seed = torch.tensor([2**40 + 77], dtype=torch.int64, device=device)
    x = torch.randn(shape, device="cpu").to(device, dtype)
    x[x == 0] = 1.0
    keep = reference.keep_mask(shape, p, int(seed), device)
    got = lora_ops.dropout(x, p, seed)
    assert torch.equal(got != 0, keep)
    exact = reference.dropout(x.double(), keep, float(torch.tensor(p, dtype=torch.float32)))
    compare.assert_close(got, exact, reference.dropout(x, keep, p))


def test_philox_known_answer():
    """The published test vector of Philox4x32-10 for counter 0 and key 0."""
    words = reference.philox(0, torch.zeros(1, dtype=torch.int64))[0].tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_rate_and_seed(device):
    x = torch.ones(100_000, device=device)
    draws = [lora_ops.dropout(x, 0.25, torch.tensor([s], device=device)) for s in (1, 2, 1)]
    rate = float((draws[0] == 0).double().mean())
    assert abs(rate - 0.25) < 0.01  # 7 standard deviations
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4", "int8", "dense"])
@pytest.mark.parametrize("M", [1, 3, 20])
def test_gradcheck_in_float64(kind, M):
    case = Case(kind, "float32", M, 6, 35, 3, 32, bias=True, number=1)
    inputs = case.build()
    w = kernelkit.weight_of(inputs)
    if kind == "dense":
        w = w._replace(codes=w.codes.double())
    seed = torch.tensor([5])
    leaves = [t.double().requires_grad_(True) for t in (inputs.x, inputs.bias, inputs.A, inputs.B)]

    def layer(x, bias, A, B):
        return qlinear(x, w, bias, LowRank(A, B, 0.5, 0.25, seed))

    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("kind", [k for k in cases.KINDS if k != "dense"])
def test_backward_keeps_no_dequantised_weight(device, kind):
    case = Case(kind, "bfloat16", 4, 96, 128, 8)
    inputs = case.build(device)
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    x = inputs.x.detach().requires_grad_(True)
    A, B = inputs.A.requires_grad_(True), inputs.B.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        qlinear(x, kernelkit.weight_of(inputs), None, LowRank(A, B))
    assert sizes and max(sizes) <= case.N * case.K, f"saved {sorted(sizes)} bytes"


def test_only_what_asks_gets_a_gradient(device):
    inputs = Case("nf4", "float32", 5, 32, 64, 4, bias=True).build(device)
    w = kernelkit.weight_of(inputs)
    for wanted in itertools.product((False, True), repeat=4):
        leaves = [
            t.detach().clone().requires_grad_(want)
            for t, want in zip((inputs.x, inputs.bias, inputs.A, inputs.B), wanted, strict=True)
        ]
        y = qlinear(leaves[0], w, leaves[1], LowRank(leaves[2], leaves[3], 2.0))
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        y.backward(inputs.dy)
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_instruction_set(level):
    _C = pytest.importorskip("fastpeft._C", reason="fastpeft._C is not built: it tells the level")
    best = _C.build_facts()["cpu_isa"]
    if best not in ISA_LEVELS or ISA_LEVELS.index(level) > ISA_LEVELS.index(best):
        pytest.skip(f"this machine runs {best}, not {level}")
    env = {**os.environ, "FASTPEFT_CPU_ISA": level, "OMP_NUM_THREADS": "2"}
    script = Path(__file__).with_name("kernelkit.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == level
