"""y = x W^T (+ LoRA) over a frozen, quantised weight: forward, input gradient, forward and
backward.

One row a provider, problem and direction. Values are held against float64 before anything is timed.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import harness
import peers
import reference
import report
import torch
from cases import KINDS, Case, Weight
from fastpeft.ops.launch import plan_text
from peers import Job, Unavailable

CHECK_ROWS = {"cuda": 256, "cpu": 32}  # tokens whose y and dx are compared; dA and dB hang on all


@dataclass
class Options:
    """What to race."""

    device: str
    providers: tuple[str, ...]
    directions: tuple[str, ...]
    rounds: int
    budget: harness.Budget
    writer: harness.RowWriter
    say: Callable[[str], None]
    pdl: bool = False  # fastpeft once more, with dependent launch
    roof: harness.Roof | None = None
    told: set[str] = field(default_factory=set)

    def tell(self, text: str) -> None:
        """Says it, the first time only."""
        if text not in self.told:
            self.told.add(text)
            self.say(text)


@functools.lru_cache(maxsize=1)
def _weights(case: Case, device: str) -> tuple[Weight, torch.Tensor, dict[str, Any]]:
    """The packed weight, the matrix before packing, and a place for the providers' copies of it:
    none depends on M, R or the direction, so they are kept from one problem to the next.
    """
    draw = torch.Generator(device).manual_seed(1 + case.number)
    W = torch.randn(case.N, case.K, generator=draw, device=device) * case.K**-0.5
    W = W.to(case.torch_dtype)
    return case.pack(W), W, {}


def make_job(case: Case, direction: str, device: str) -> Job:
    """Tensors of a case; the factors anew for every R, x and dy for every M."""
    weight, dense, kept = _weights(replace(case, M=1, R=0), device)
    inputs = replace(case, M=1, N=1, K=1, R=0).build(device)  # scaling and the like
    draw = torch.Generator(device).manual_seed(2 + case.R)
    if case.R:
        A = torch.randn(case.R, case.K, generator=draw, device=device) * case.K**-0.5
        B = torch.randn(case.N, case.R, generator=draw, device=device) * 0.5
        inputs = replace(inputs, A=A, B=B)
    draw.manual_seed(2 + case.M)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, device=device).to(case.torch_dtype)

    x, dy = normal(case.M, case.K), normal(case.M, case.N)
    if weight.threshold > 0:  # a few outlier columns, as in real activations
        x[case.M // 2, :: max(case.K // 8, 1)] = 8.0
    return Job(case, replace(inputs, x=x, dy=dy, weight=weight), dense, direction, device, kept)


def setup(job: Job, provider: str) -> harness.Work:
    """The provider's work for a job: the call that is timed and the values that are compared.

    Raises:
        Unavailable: the provider cannot run it.
    """
    peer = peers.make(provider, job)
    if job.direction == "dgrad" and peer.dgrad is None:
        raise Unavailable("no input gradient on its own")
    x = job.inputs.x.detach().requires_grad_(job.direction == "fwd+bwd")
    dy, copies = job.inputs.dy, len(peer.forward)

    def run(i: int) -> tuple[torch.Tensor, ...]:
        if job.direction == "dgrad":
            with torch.no_grad():
                return (peer.dgrad[i](dy),)
        if job.direction == "fwd":
            with torch.no_grad():
                return (peer.forward[i](x),)
        y = peer.forward[i](x)
        return (y.detach(), *torch.autograd.grad(y, (x, *peer.factors[i]), dy))

    def values() -> dict[str, torch.Tensor]:
        names = {"dgrad": ("dx",), "fwd": ("y",)}.get(job.direction, ("y", "dx", "dA", "dB"))
        return _sampled(dict(zip(names, run(copies - 1), strict=False)), job)

    return harness.Work(
        provider,
        run,
        copies,
        peer.bytes,
        values,
        peer.graph,
        peer.format,
        peer.exact,
        _note(job) if provider == "fastpeft" else threshold_note(job.case),
    )


def threshold_note(case: Case) -> str:
    """What tells the two kinds of LLM.int8() apart in a row."""
    return "threshold 0" if case.kind == "llm.int8-0" else ""


def _note(job: Job) -> str:
    """Of fastpeft's rows: which kernels ran, and for which device where not for this one."""
    arch = os.environ.get("FASTPEFT_ARCH")
    return harness.joined(
        threshold_note(job.case), _kernels(job), f"{report.AS_ARCH}{arch}" if arch else ""
    )


def _kernels(job: Job) -> str:
    """What the plan chose, "wgmma tile=128x256 ..."; forward / input gradient where both ran."""
    case, (fmt, _, threshold) = job.case, KINDS[job.case.kind]
    texts = []
    for direction in ("fwd", "dgrad"):
        if direction not in job.direction and job.direction != "fwd+bwd":
            continue
        if direction == "fwd" and threshold >= 0:
            texts.append("int8 product")  # not in the plan's hands
            continue
        text = plan_text(
            *(case.M, case.N, case.K, case.R, fmt, case.blocksize, direction, case.torch_dtype),
            is_cuda=job.device == "cuda",
        )
        texts.append(text.rsplit(": ", 1)[-1].replace(" workspace_bytes=0", ""))
    return " / ".join(dict.fromkeys(texts))


def floor_us(case: Case, direction: str, roof: harness.Roof | None) -> float:
    """The time that no provider can beat here; 0 without a roof."""
    if roof is None:
        return 0.0
    is_int8 = case.kind.startswith("llm.int8") and direction != "dgrad"
    unit = "int8" if is_int8 and "int8" in roof.tflops else case.dtype
    return roof.us(case.bytes(direction), case.flops(direction), unit)


def _rows(job: Job) -> torch.Tensor:
    count = min(job.case.M, CHECK_ROWS[job.device])
    return torch.linspace(0, job.case.M - 1, count, device=job.device).round().long()


def _sampled(results: dict[str, torch.Tensor], job: Job) -> dict[str, torch.Tensor]:
    rows = _rows(job)
    return {n: v[rows] if n in ("y", "dx") else v for n, v in results.items()}


def formulas(
    job: Job, dtype: torch.dtype, W: torch.Tensor | None, quantised: bool
) -> dict[str, torch.Tensor]:
    """y and dx of the sampled tokens, dA and dB, by reference.py in `dtype`; W: instead of the
    job's; quantised: whether LLM.int8()'s activations are.
    """
    inputs, w = job.inputs, job.inputs.weight
    w = w if W is None else replace(w, exact=W)
    rows, low = _rows(job), (inputs.A, inputs.B, inputs.scaling)
    x, dy = inputs.x[rows], inputs.dy[rows]
    results = {}
    if job.direction != "dgrad":
        if w.threshold >= 0 and quantised:
            y, _ = reference.llm_int8(
                dtype, inputs.x, w.codes, w.scales, w.threshold, inputs.bias, *low
            )
            results["y"] = y[rows]
        else:
            results["y"], _ = reference.qlinear(dtype, x, w.exact, inputs.bias, *low)
    if job.direction != "fwd":
        results["dx"] = reference.qlinear_grads(dtype, dy, x, w.exact, *low)["dx"]
    if job.direction == "fwd+bwd" and inputs.A is not None:
        x, dy, A, B = (t.to(dtype) for t in (inputs.x, inputs.dy, inputs.A, inputs.B))
        results["dA"] = (inputs.scaling * (dy @ B)).t() @ x
        results["dB"] = inputs.scaling * (dy.t() @ (x @ A.t()))
    return results


def race(case: Case, direction: str, options: Options, op: str) -> None:
    """Checks and times all providers at one problem and writes their rows."""
    job = make_job(case, direction, options.device)
    right = functools.lru_cache(maxsize=6)(functools.partial(formulas, job))
    works = []
    for provider in options.providers:
        try:
            work = setup(job, provider)
        except Unavailable as reason:
            if reason.worth_telling:
                options.tell(f"{provider}: not raced: {reason}")
            continue
        for variant in harness.variants(work, options.pdl):
            refused, note = harness.checked(
                variant, right, case.torch_dtype, job.inputs.weight.threshold >= 0
            )
            if refused:
                where = f"{variant.label}: WRONG VALUES, not timed: {case} {direction}"
                options.say(f"{where}: {refused}")
                continue
            variant.note = harness.joined(variant.note, note)
            works.append(variant)
    if not works:
        return
    right.cache_clear()
    floor = floor_us(case, direction, options.roof)
    timings = harness.measure(works, options.device, options.rounds)
    times = ", ".join(f"{label} {timing.us:.4g}" for label, timing in timings.items())
    print(f"{case} {direction}, us: {times}", file=sys.stderr, flush=True)
    for work, timing in zip(works, timings.values(), strict=True):
        options.writer.write(
            race=case.kind,
            floor_us=floor,
            op=op,
            provider=work.provider,
            pdl=work.pdl or None,
            direction=direction,
            M=case.M,
            N=case.N,
            K=case.K,
            R=case.R,
            dtype=case.dtype,
            format=work.format,
            us=timing.us,
            us_p20=timing.us_p20,
            us_p80=timing.us_p80,
            eager_us=timing.eager_us,
            tflops=case.flops(direction) / timing.us / 1e6,
            gbs=work.bytes / timing.us / 1e3,
            peak_mib=timing.peak_mib,
            note=harness.joined(work.note, timing.note),
        )


def problems(kinds, dtypes, shapes, ranks, tokens, directions) -> Iterator[tuple[Case, str]]:
    """Shapes outside, tokens inside: a weight is packed once. The input gradient alone is raced
    without LoRA.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"format: got {kind!r}, expected one of {', '.join(KINDS)}")
        for dtype in dtypes:
            for N, K in shapes:
                for R in ranks:
                    for M in tokens:
                        for direction in directions:
                            if direction != "dgrad" or R == 0:
                                yield Case(kind, dtype, M, N, K, R), direction


def run(cases: list[tuple[Case, str]], options: Options, op: str = "qlinear") -> int:
    """Races until the list or the budget ends; how many problems were left out."""
    for number, (case, direction) in enumerate(cases):
        if options.budget.spent():
            return len(cases) - number
        race(case, direction, options, op)
        if options.device == "cuda":
            harness.give_memory_back()
    return 0
