"""Runs every op of the library on tiny shapes, for compute-sanitizer (tests/sanitize.py, `make
sanitize`):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python tests/sanitize_small.py

Without torch's caching allocator a read past a tensor's end is a read past an allocation. Values
are checked too. Exit code 1 when an op of the library was not run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "python")]

import cases  # noqa: E402
import compare  # noqa: E402
import kernelkit  # noqa: E402
import reference  # noqa: E402
import torch  # noqa: E402
from fastpeft.ops import bottleneck, launch, lora, quant  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


class Recorder(TorchDispatchMode):
    """Notes which ops of the library ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpeft":
            self.ran.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def every_op() -> set[str]:
    """Names of all ops that the library registers."""
    return {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastpeft::")}


def check(case: cases.Case, device: str) -> None:
    """Names the case first and waits for it: a fault of the device is then known to be its own."""
    print(f"case {case}", flush=True)
    kernelkit.check_from_afar(case, device)
    if device == "cuda":
        torch.cuda.synchronize()


def quantise(device: str) -> None:
    """quantize, quantize_absmax, tile, untile, dequantize on odd shapes."""
    for fmt in ("nf4", "fp4"):
        for N, K, blocksize in ((7, 341, 64), (33, 96, 32), (1, 64, 64), (17, 100, 4096)):
            W = torch.randn(N, K, device=device)
            codes, absmax = quant.quantize(W, reference.FORMAT_IDS[fmt], blocksize)
            tiled = quant.tile(codes, reference.FORMAT_IDS[fmt], N, K)
            elements = reference.unpack_canonical(codes, N * K)
            back = reference.unpack_canonical(
                quant.untile(tiled, reference.FORMAT_IDS[fmt], N, K), N * K
            )
            assert torch.equal(back, elements)
            scales = reference.scales_in_memory(absmax, N, K, blocksize)
            back = quant.dequantize(
                tiled, scales, None, reference.FORMAT_IDS[fmt], blocksize, N, K, torch.float32
            )
            want = reference.dequantize_4bit(elements, absmax, fmt, blocksize, N, K)
            compare.assert_bitwise(back, want, f"{fmt} {N}x{K}")
            quant.quantize_absmax(absmax, reference.dynamic_map(device), absmax.mean().view(1))
    quant.quantize(torch.randn(7, 341, device=device), reference.FORMAT_IDS["int8"], 0)


def layers(device: str) -> None:
    """qlinear forward and backward, LoRA gradients, dropout."""
    shapes = ((7, 341, 64), (33, 96, 32), (48, 192, 128))
    number = 0
    for kind in cases.KINDS:
        for M in (1, 5, 33):
            number += 1
            N, K, blocksize = shapes[number % len(shapes)]
            dtype = list(cases.DTYPES)[number % len(cases.DTYPES)]
            R = (0, 8, 13)[(number // 3) % 3]
            case = cases.Case(
                kind, dtype, M, N, K, R, blocksize, number % 2 == 0, 0.25 if R else 0.0
            )
            check(case, device)
    seed = torch.tensor([3], device=device)
    lora.dropout(torch.randn(3, 67, device=device), 0.5, seed)


def small_layers(device: str, tokens: list[int]) -> None:
    """Every M class of the plan, forward, input gradient and LoRA's, with bias, on whole tiles and
    on ragged ones; in 4 bits also bare. Dependent launch is what it is.
    """
    for number, M in enumerate(tokens):
        for N, K in ((192, 576), (256, 512)):
            for kind in ("nf4", "fp4", "int8", "llm.int8", "dense"):
                dtype = "float16" if (number + len(kind)) % 3 == 0 else "bfloat16"
                check(cases.Case(kind, dtype, M, N, K, 16, bias=True), device)
            check(cases.Case("nf4", "bfloat16", M, N, K), device)
        check(cases.Case("nf4", "float32", M, 130, 341, 8, bias=True), device)


def switches() -> None:
    """Ops without tensors."""
    launch.dependent_launch(launch.dependent_launch())
    launch.plan_text(1, 64, 64)


def adapters(device: str) -> None:
    """Bottleneck forward and backward."""
    for number, activation in enumerate(reference.ACTIVATIONS):
        M, K, D = ((1, 96, 8), (9, 341, 7), (33, 64, 40))[number % 3]
        dtype = list(cases.DTYPES.values())[number % 3]
        x, dy = (torch.randn(M, K, device=device).to(dtype) for _ in range(2))
        parts = [
            torch.randn(*s, device=device).to(dtype).requires_grad_(True)
            for s in ((D, K), (D,), (K, D), (K,))
        ]
        x.requires_grad_(True)
        bottleneck.bottleneck(x, *parts, activation, 2.0, x).backward(dy)


def main() -> int:
    """0: all ran and were right; 1: an op is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--M", type=int, nargs="*", default=[1, 5, 16, 24, 64, 100, 300])
    args = parser.parse_args()
    device = args.device
    torch.manual_seed(0)
    with Recorder() as recorder:
        quantise(device)
        layers(device)
        small_layers(device, args.M)
        adapters(device)
        switches()
    if device == "cuda":
        torch.cuda.synchronize()
    missing = every_op() - recorder.ran
    state = "on" if launch.dependent_launch() else "off"
    print(
        f"ran {len(recorder.ran)} ops on {device}, dependent launch {state}; "
        f"not run: {sorted(missing) or 'none'}"
    )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
