"""Runs a Case through fastpeft and through the formulas, and holds the results against each other.

`python tests/kernelkit.py` checks a slice of the covering cases on the CPU and prints the
instruction set that ran: test_qlinear starts it once for every level. With `--device cuda` it
prints whose kernels ran, "sm_80": test_cuda_launch starts it with FASTPEFT_ARCH.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace

import compare
import reference
import torch
from cases import COVERING, Case, Inputs
from fastpeft.ops.launch import plan_text
from fastpeft.ops.lora import LowRank
from fastpeft.ops.qlinear import Weight, qlinear

# One case and more for every kernel of the CUDA plan: skinny, general fused, wgmma, dequantise +
# matmul, LLM.int8(), dense; with LoRA and bias, and with ragged edges.
FAMILIES = [
    Case(kind, dtype, M, N, K, R, blocksize, bias=R > 0, number=M)
    for kind, dtype, N, K, blocksize in (
        ("nf4", "bfloat16", 256, 512, 64),
        ("nf4-single", "float16", 192, 576, 64),
        ("fp4", "bfloat16", 264, 640, 128),
        ("nf4", "bfloat16", 130, 341, 64),
        ("nf4", "float32", 192, 576, 64),
        ("int8", "bfloat16", 192, 576, 64),
        ("llm.int8", "bfloat16", 256, 512, 64),
        ("dense", "bfloat16", 192, 576, 64),
    )
    for M, R in ((1, 16), (16, 16), (24, 0), (100, 8), (300, 16))
]
ORDERS = 3  # other orders of summation in which plain torch's error is measured


def weight_of(inputs: Inputs) -> Weight:
    """The packed weight as the ops take it."""
    w = inputs.weight
    return Weight(w.codes, w.scales, w.nested, w.format_id, w.blocksize, w.N, w.K, w.threshold)


def run(inputs: Inputs, lora_dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Forward and backward through fastpeft: y [M, N], dx [M, K] and, where they exist, dbias, dA,
    dB.
    """
    x = inputs.x.detach().requires_grad_(True)
    leaves = {"x": x}
    if inputs.bias is not None:
        leaves["bias"] = inputs.bias.detach().clone().requires_grad_(True)
    lora = None
    if inputs.A is not None:
        leaves["A"] = inputs.A.to(lora_dtype).requires_grad_(True)
        leaves["B"] = inputs.B.to(lora_dtype).requires_grad_(True)
        lora = LowRank(leaves["A"], leaves["B"], inputs.scaling, inputs.p, inputs.seed)
    y = qlinear(x, weight_of(inputs), leaves.get("bias"), lora)
    assert y.shape == inputs.dy.shape and y.dtype == x.dtype
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    results = {"y": y.detach().reshape(-1, y.shape[-1])}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype, name
        results["d" + name] = grad.reshape(-1, grad.shape[-1]) if name == "x" else grad
    return results


def formulas(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same results by reference.py, computed in `dtype`."""
    w, low = inputs.weight, (inputs.A, inputs.B, inputs.scaling, inputs.keep, inputs.p)
    if w.threshold >= 0:
        y, _ = reference.llm_int8(
            dtype, inputs.x2d, w.codes, w.scales, w.threshold, inputs.bias, *low
        )
    else:
        y, _ = reference.qlinear(dtype, inputs.x2d, w.exact, inputs.bias, *low)
    grads = reference.qlinear_grads(dtype, inputs.dy2d, inputs.x2d, w.exact, *low)
    grads.pop("ds", None)
    if inputs.bias is not None:
        grads["dbias"] = inputs.dy2d.to(dtype).sum(0)
    return {"y": y, **grads}


def shuffled(inputs: Inputs, number: int) -> dict[str, torch.Tensor]:
    """Plain torch's results with tokens, out and in features in another order, put back in order.

    The same formula, other sums: one order alone may be exact by luck, above all where a result
    hangs on a single number (M = 1, R = 1).
    """
    draw = torch.Generator().manual_seed(number)
    M, N, K = len(inputs.x2d), inputs.weight.N, inputs.weight.K
    m, n, k = (torch.randperm(size, generator=draw).to(inputs.x.device) for size in (M, N, K))

    def pick(t, rows, columns=None):
        if t is None:
            return None
        t = t if rows is None else t[rows]
        return t if columns is None else t[:, columns]

    w = inputs.weight
    int8 = w.threshold >= 0
    other = replace(
        inputs,
        x=pick(inputs.x2d, m, k),
        dy=pick(inputs.dy2d, m, n),
        bias=pick(inputs.bias, n),
        A=pick(inputs.A, None, k),
        B=pick(inputs.B, n),
        keep=pick(inputs.keep, m, k),
        weight=replace(
            w,
            exact=pick(w.exact, n, k),
            codes=pick(w.codes, n, k) if int8 else w.codes,
            scales=pick(w.scales, n) if int8 else w.scales,
        ),
    )
    m, n, k = (torch.argsort(order) for order in (m, n, k))
    back = {"y": (m, n), "dx": (m, k), "dA": (None, k), "dB": (n,), "dbias": (n,)}
    results = formulas(other, inputs.x.dtype)
    return {name: pick(value, *back[name]) for name, value in results.items()}


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same numbers on another device; strides are not kept."""

    def there(part):
        tensors = {k: v.to(device) for k, v in vars(part).items() if isinstance(v, torch.Tensor)}
        return replace(part, **tensors)

    return replace(there(inputs), weight=there(inputs.weight))


def check_from_afar(case: Case, device: str) -> None:
    """Like check, but all that is not fastpeft's runs on the CPU: for tools that slow every kernel
    of the device down.
    """
    inputs = case.build()
    got = {name: value.cpu() for name, value in run(moved(inputs, device)).items()}
    hold(case, inputs, got)


def check(case: Case, device="cpu", lora_dtype=torch.float32) -> None:
    """Raises AssertionError with the worst element when a result breaks the error rule."""
    inputs = case.build(device)
    hold(case, inputs, run(inputs, lora_dtype))


def hold(case: Case, inputs: Inputs, got: dict[str, torch.Tensor]) -> None:
    """Holds results against the formulas, which run where `inputs` are."""
    exact = formulas(inputs, torch.float64)
    plain = [formulas(inputs, case.torch_dtype)]
    plain += [shuffled(inputs, number) for number in range(ORDERS)]
    assert set(got) == set(exact), f"{sorted(got)} against {sorted(exact)}"
    for name, value in got.items():
        yardsticks = [p[name] for p in plain]
        compare.assert_close(
            value, exact[name], yardsticks, dtype=case.torch_dtype, name=f"{case} {name}"
        )


def machine(device: str) -> str:
    """Whose kernels run: the CPU's instruction set, or sm_90 and the like."""
    if device == "cpu":
        from fastpeft import _C

        return _C.build_facts()["cpu_isa"]
    return re.search(r"sm_\d+", plan_text(1, 64, 64, is_cuda=True)).group()


def main() -> int:
    """Every fifth case: all kinds, dtypes and token counts are among them. On CUDA FAMILIES too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    chosen = COVERING[::5] + (FAMILIES if device == "cuda" else [])
    for case in chosen:
        check(case, device)
    print(f"{machine(device)} {len(chosen)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
