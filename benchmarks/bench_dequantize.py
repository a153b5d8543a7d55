"""Packed weight -> 16- or 32-bit matrix: GB/s, and its share of the speed of a large copy measured
in the same run.
"""

from __future__ import annotations

import bench_qlinear
import harness
import peers
import torch
from cases import KINDS, Case
from peers import Unavailable


def setup(case: Case, provider: str, device: str) -> harness.Work:
    """fastpeft's dequantise in one call, or bitsandbytes'.

    Raises:
        Unavailable: the provider cannot run it.
    """
    job = bench_qlinear.make_job(case, "fwd", device)
    dtype, size = case.torch_dtype, case.torch_dtype.itemsize
    copies = job.copies(case.weight_bytes())
    moved = case.weight_bytes() + size * case.N * case.K
    own = None
    if provider == "fastpeft":
        from fastpeft.ops.quant import dequantize

        weights = [peers._copy_weight(job.inputs.weight) for _ in range(copies)]

        def once(w) -> torch.Tensor:
            packed = (w.codes, w.scales, w.nested, w.format_id, w.blocksize, w.N, w.K)
            return dequantize(*packed, dtype)

    elif provider == "bitsandbytes":
        if KINDS[case.kind][0] not in ("nf4", "fp4"):
            raise Unavailable("only its 4-bit formats have a dequantise of their own")
        layer = peers._bnb_layer(job).train()
        bnb = peers.import_bitsandbytes()
        state, own = layer.weight.quant_state, peers._own_weight(layer)
        weights = [layer.weight.data.clone() for _ in range(copies)]

        def once(w) -> torch.Tensor:
            return bnb.functional.dequantize_4bit(w, state)

    else:
        raise Unavailable("no dequantise")
    results: dict[int, torch.Tensor] = {}

    def run(i: int) -> torch.Tensor:
        results[i] = once(weights[i])  # kept, so that the next call writes other memory
        return results[i]

    return harness.Work(
        provider,
        run,
        copies,
        moved,
        lambda: {"W": run(copies - 1)},
        format=peers.format_name(case),
        weight=own,
    )


def run(cases: list[Case], options: bench_qlinear.Options) -> int:
    """Races until the list or the budget ends; how many problems were left out."""
    ceiling = harness.copy_gbs(options.device)
    options.say(f"copy: {ceiling:.0f} GB/s (read plus written)")
    for number, case in enumerate(cases):
        if options.budget.spent():
            return len(cases) - number
        job = bench_qlinear.make_job(case, "fwd", options.device)
        works = []

        def right(dtype, W, _, exact=job.inputs.weight.exact):
            return {"W": (exact if W is None else W).to(dtype)}

        for provider in options.providers:
            try:
                work = setup(case, provider, options.device)
            except Unavailable as reason:
                options.tell(f"{provider}: not raced: {reason}")
                continue
            for variant in harness.variants(work, options.pdl):
                refused, variant.note = harness.checked(variant, right, case.torch_dtype)
                if refused:
                    options.say(f"{variant.label}: WRONG VALUES, not timed: {case}: {refused}")
                    continue
                works.append(variant)
        timings = harness.measure(works, options.device, options.rounds) if works else {}
        for work in works:
            _row(case, work, timings[work.label], ceiling, options)
    return 0


def _row(case, work, timing, ceiling, options) -> None:
    gbs = work.bytes / timing.us / 1e3
    share = f"{gbs / ceiling:.2f} of copy speed {ceiling:.0f} GB/s"
    options.say(f"{work.label} {case.kind} {case.N}x{case.K}: {timing.us:.1f} us, {share}")
    options.writer.write(
        race=case.kind,
        op="dequantize",
        provider=work.provider,
        pdl=work.pdl or None,
        N=case.N,
        K=case.K,
        dtype=case.dtype,
        format=work.format,
        us=timing.us,
        us_p20=timing.us_p20,
        us_p80=timing.us_p80,
        eager_us=timing.eager_us,
        gbs=gbs,
        peak_mib=timing.peak_mib,
        note=harness.joined(share, work.note, timing.note),
    )
