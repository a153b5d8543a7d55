"""Bottleneck adapter K -> D -> K with residual: forward, and forward and backward. Providers:
fastpeft, torch (eager) and torch.compile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import harness
import reference
import torch
from bench_qlinear import Options
from cases import DTYPES

PROVIDERS = ("fastpeft", "torch", "torch.compile")


@dataclass(frozen=True)
class Size:
    """One problem: M tokens, K features, D bottleneck width."""

    M: int
    K: int
    D: int
    dtype: str
    direction: str
    activation: str = "gelu"

    def bytes(self) -> float:
        """x read and y written; in the backward pass dy and x read, dx written; both weights once a
        pass.
        """
        size, weights = DTYPES[self.dtype].itemsize, 2 * self.D * self.K
        once = size * (2 * self.M * self.K + weights)
        back = size * (3 * self.M * self.K + 2 * weights)
        return once + (back if self.direction == "fwd+bwd" else 0)

    def flops(self) -> float:
        """Two products forward; recomputing one and four more backward."""
        return 4.0 * self.M * self.K * self.D * (3.5 if self.direction == "fwd+bwd" else 1)


def _draw(size: Size, device: str):
    draw = torch.Generator(device).manual_seed(3)

    def normal(*shape, scale=1.0):
        values = torch.randn(*shape, generator=draw, device=device) * scale
        return values.to(DTYPES[size.dtype])

    M, K, D = size.M, size.K, size.D
    parts = [normal(D, K, scale=K**-0.5), normal(D), normal(K, D, scale=D**-0.5), normal(K)]
    return normal(M, K), normal(M, K), parts


def setup(size: Size, provider: str, device: str, tensors) -> harness.Work:
    """The call that is timed; weights are small, so x is what rotates."""
    x, dy, parts = tensors
    training = size.direction == "fwd+bwd"
    copies = min(32, harness.copies_for(2 * x.numel() * x.element_size(), device))
    inputs = [x.clone().requires_grad_(training) for _ in range(copies)]
    leaves = [p.clone().requires_grad_(training) for p in parts]

    def plain(x, *parts):
        return reference.bottleneck(x.dtype, x, *parts, size.activation, 1.0, x)

    if provider == "fastpeft":
        from fastpeft.ops.bottleneck import bottleneck

        def layer(x, *parts):
            return bottleneck(x, *parts, size.activation, 1.0, x)
    elif provider == "torch.compile":
        torch.compiler.reset()  # it gives up after a few sizes otherwise
        layer = torch.compile(plain)
    else:
        layer = plain

    def run(i: int):
        if not training:
            with torch.no_grad():
                return (layer(inputs[i], *leaves),)
        y = layer(inputs[i], *leaves)
        return (y.detach(), *torch.autograd.grad(y, (inputs[i], *leaves), dy))

    names = ("y", "dx", "ddown", "ddown_bias", "dup", "dup_bias")

    def values():
        return dict(zip(names, run(copies - 1), strict=False))

    return harness.Work(provider, run, copies, size.bytes(), values)


def _formulas(size: Size, tensors, dtype, *_) -> dict[str, torch.Tensor]:
    x, dy, parts = tensors
    results = {"y": reference.bottleneck(dtype, x, *parts, size.activation, 1.0, x)}
    if size.direction == "fwd+bwd":
        grads = reference.bottleneck_grads(dtype, dy, x, *parts, size.activation, 1.0)
        grads["dx"] = grads["dx"] + dy.to(dtype)  # through the residual
        results.update(grads)
    return results


def run(sizes: list[Size], options: Options) -> int:
    """Races until the list or the budget ends; how many problems were left out."""
    for number, size in enumerate(sizes):
        if options.budget.spent():
            return len(sizes) - number
        tensors = _draw(size, options.device)
        works = []
        right = functools.partial(_formulas, size, tensors)
        for provider in options.providers:
            work = setup(size, provider, options.device, tensors)
            try:
                refused, work.note = harness.checked(work, right, DTYPES[size.dtype])
            except RuntimeError as error:  # torch.compile without a working compiler
                if provider != "torch.compile":
                    raise
                options.say(f"{provider}: not raced: {str(error).splitlines()[0]}")
                continue
            if refused:
                options.say(f"{provider}: WRONG VALUES, not timed: {size}: {refused}")
                continue
            works += harness.variants(work, options.pdl)  # the same bits: checked once
        timings = harness.measure(works, options.device, options.rounds) if works else {}
        for work in works:
            timing = timings[work.label]
            options.writer.write(
                race=size.activation,
                op="bottleneck",
                provider=work.provider,
                pdl=work.pdl or None,
                direction=size.direction,
                M=size.M,
                K=size.K,
                D=size.D,
                dtype=size.dtype,
                us=timing.us,
                us_p20=timing.us_p20,
                us_p80=timing.us_p80,
                eager_us=timing.eager_us,
                tflops=size.flops() / timing.us / 1e6,
                gbs=size.bytes() / timing.us / 1e3,
                peak_mib=timing.peak_mib,
                note=harness.joined(size.activation, work.note, timing.note),
            )
    return 0
