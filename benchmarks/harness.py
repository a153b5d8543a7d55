"""How a figure is obtained: values first, then interleaved timing, then a row.

CUDA: one CUDA graph a provider that calls it once with every copy of its weight (all copies
together more than twice L2, so L2 never holds a weight); rounds in which the providers take turns;
median, p20 and p80 of time / copies. The GPU is kept busy until the replays of a round are queued,
so that no launch of a graph is waited for inside the time. `eager_us` is wall time a call in a
Python loop. CPU: rounds in which the providers take turns, each timed over a few calls; same
percentiles.
"""

from __future__ import annotations

import datetime
import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (ROOT / "tests", ROOT / "python"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

RESULTS = HERE / "results"
ROUNDS = 9
MIN_ROUNDS = 5  # of problems whose rounds are long
LONG_ROUND_US = 20_000.0
ROUND_US = 300.0  # a graph shorter than this is replayed several times a round
MAX_REPLAYS = 8
MAX_COPIES = 1024


@dataclass
class Work:
    """One provider at one problem."""

    provider: str
    run: Callable[[int], Any]  # one call, on weight copy i
    copies: int
    bytes: float  # fewest bytes through memory, with the weight as this provider stores it
    values: Callable[[], dict[str, torch.Tensor]] | None = None  # results of a call, for the check
    graph: bool = True  # False: it waits for the GPU inside a call and cannot be captured
    format: str | None = None  # how this provider stores the weight
    weight: torch.Tensor | None = None  # W as this provider quantised it, where that may differ
    note: str = ""
    pdl: bool = (
        False  # with programmatic dependent launch (fastpeft's kernels alone have the switch)
    )

    @property
    def label(self) -> str:
        """Provider and variant: what tells works of one race apart."""
        return f"{self.provider} pdl" if self.pdl else self.provider


@dataclass(frozen=True)
class Roof:
    """What this machine was measured to do at the start of the run."""

    read_gbs: float
    tflops: dict[str, float]  # by what is multiplied: float32, bfloat16, ..., int8

    def us(self, moved_bytes: float, flops: float, unit: str) -> float:
        """The time that no provider can beat: the slower of the bytes and the operations."""
        return max(moved_bytes / self.read_gbs / 1e3, flops / self.tflops[unit] / 1e6)

    def __str__(self) -> str:
        rates = ", ".join(f"{unit} {rate:.4g}" for unit, rate in self.tflops.items())
        return f"{self.read_gbs:.0f} GB/s read, TFLOP/s by torch's matmul: {rates}"


@dataclass(frozen=True)
class Timing:
    """Of one call: microseconds, and the peak of temporary memory in MiB (CUDA)."""

    us: float
    us_p20: float
    us_p80: float
    eager_us: float | None = None
    peak_mib: float | None = None
    note: str = ""


@dataclass
class Budget:
    """Seconds that a run may take."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def spent(self) -> bool:
        """Whether nothing is left."""
        return time.monotonic() - self.started >= self.seconds


# ---- the machine


def device_name(device: str) -> str:
    """ "NVIDIA H200", or the CPU's model name and threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)
        model = found.group(1) if found else model
    return f"{model.strip()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Commit of the code that runs: FASTPEFT_COMMIT, or git's HEAD, with "+" where tracked files
    differ from it.
    """
    if "FASTPEFT_COMMIT" in os.environ:
        return os.environ["FASTPEFT_COMMIT"]
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        )
        if head.returncode:
            return "unknown"
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "csrc", "cuda", "python"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        return head.stdout.strip() + ("+" if changed else "")
    except OSError:
        return "unknown"


def results_file(device: str) -> Path:
    """benchmarks/results/<device>.jsonl"""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".jsonl")


class RowWriter:
    """Appends rows to a file, one JSON object a line; keys without a value are left out."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.rows = Path(path), []
        self.common = {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "device": device_name(device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if device == "cuda" else None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, race: str = "", floor_us: float = 0.0, **keys: Any) -> dict[str, Any]:
        """Appends one row and returns it; `race` (what providers that store the weight differently
        compete in) and `floor_us` (by the Roof) stay in memory, for tables and plots.
        """
        row = {k: v for k, v in {**self.common, **keys}.items() if v not in (None, "")}
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = float(f"{value:.5g}")
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        row = {**row, "race": race, "floor_us": floor_us}
        self.rows.append(row)
        return row


def copies_for(weight_bytes: float, device: str) -> int:
    """Copies of a weight so that together they are more than twice L2 (CPU: 64 MiB, more than a
    core's own caches).
    """
    total = 64 * 2**20
    if device == "cuda":
        total = max(128 * 2**20, 2 * torch.cuda.get_device_properties(0).L2_cache_size)
    return int(min(MAX_COPIES, max(2, -(-total // weight_bytes) + 1)))


# ---- timing


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """Median, p20, p80."""
    ordered = sorted(times)
    at = [ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.2, 0.8)]
    return at[0], at[1], at[2]


def variants(work: Work, with_pdl: bool) -> list[Work]:
    """The work, and once more with dependent launch where that is asked for and has a meaning."""
    return [work, replace(work, pdl=True)] if with_pdl and work.provider == "fastpeft" else [work]


def switch(work: Work) -> None:
    """Dependent launch as the work's row will say: off for whatever is compared with peers."""
    from fastpeft.ops.launch import dependent_launch

    dependent_launch(work.pdl)


def measure(works: list[Work], device: str, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Times the providers against each other: label -> Timing."""
    return (_measure_cuda if device == "cuda" else _measure_cpu)(works, rounds)


def _capture(work: Work) -> tuple[Callable[[], None], str]:
    """(one pass over all copies, note)."""
    switch(work)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(work.copies):  # all: some libraries re-pack a weight at its first call
            work.run(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    def loop() -> None:
        switch(work)
        for i in range(work.copies):
            work.run(i)

    if not work.graph:
        return loop, "no graph"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph.replay, ""


def _eager_cuda(work: Work, us: float) -> tuple[float, float]:
    """(wall time of a call in a loop, us; peak of temporary memory, MiB); us: a call's kernels."""
    switch(work)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work.run(0)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times, calls = [], int(max(3, min(20, 2e4 / us)))
    for _ in range(3):
        start = time.perf_counter()
        for i in range(calls):
            work.run(i % work.copies)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return sorted(times)[1], peak


def _timed(once: Callable[[], None], replays: int) -> float:
    """GPU time of a pass, us. The sleep lasts until everything is queued."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000 + 20_000 * replays)  # clock cycles: 60 us and 12 a replay
    start.record()
    for _ in range(replays):
        once()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / replays


def _measure_cuda(works: list[Work], rounds: int) -> dict[str, Timing]:
    passes = {work.label: _capture(work) for work in works}
    times: dict[str, list[float]] = {work.label: [] for work in works}
    first = {label: _timed(once, 1) for label, (once, _) in passes.items()}  # warms up
    replays = {label: int(max(1, min(MAX_REPLAYS, ROUND_US / us))) for label, us in first.items()}
    if sum(first.values()) > LONG_ROUND_US:
        rounds = min(rounds, MIN_ROUNDS)
    for number in range(rounds):
        for work in works if number % 2 else works[::-1]:
            label = work.label
            times[label].append(_timed(passes[label][0], replays[label]) / work.copies)
    results = {}
    for work in works:
        us, us_p20, us_p80 = percentiles(times[work.label])
        eager, peak = _eager_cuda(work, us)
        results[work.label] = Timing(us, us_p20, us_p80, eager, peak, passes[work.label][1])
    return results


def give_memory_back() -> None:
    """Memory that graphs of earlier problems left behind, once it is half of the device's: to do it
    after every problem costs more than the problem.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    if torch.cuda.memory_reserved() > total // 2:
        gc.collect()
        torch.cuda.empty_cache()


def _measure_cpu(works: list[Work], rounds: int, slice_s: float = 0.02) -> dict[str, Timing]:
    calls, times = {}, {work.label: [] for work in works}
    for work in works:
        for i in range(work.copies):  # all: some libraries re-pack a weight at its first call
            work.run(i)
        start = time.perf_counter()
        work.run(1 % work.copies)
        once = time.perf_counter() - start
        calls[work.label] = max(1, min(200, int(slice_s / max(once, 1e-6))))
    turn = 0
    for number in range(rounds):
        for work in works if number % 2 else works[::-1]:
            count = calls[work.label]
            start = time.perf_counter()
            for i in range(count):
                work.run((turn + i) % work.copies)
            times[work.label].append((time.perf_counter() - start) / count * 1e6)
        turn += max(calls.values())
    return {work.label: Timing(*percentiles(times[work.label])) for work in works}


def copy_gbs(device: str) -> float:
    """Speed of a large copy, GB/s, bytes read plus bytes written."""
    return _memory_gbs(device, "copy")


def read_gbs(device: str) -> float:
    """Speed of reading, GB/s: torch's sum, or what a copy moves where that is more (the sum is not
    the fastest reader on every device).
    """
    return max(_memory_gbs(device, "sum"), _memory_gbs(device, "copy"))


def _memory_gbs(device: str, what: str) -> float:
    size = 1_100_000_256 if device == "cuda" else 2**26
    source = torch.empty(size // 4, dtype=torch.float32, device=device).uniform_()
    target = torch.empty_like(source)
    # By a kernel: what a graph makes of torch's copy reached 2.7 TB/s where kernels copy at 4.1.
    call = (lambda: torch.neg(source, out=target)) if what == "copy" else source.sum
    moved = size * (2.0 if what == "copy" else 1.0)
    work = Work(what, lambda i: call(), 4, moved)
    # The best of three: the first finds the card's clocks and the allocator cold.
    best = min(measure([work], device)[what].us for _ in range(3))
    return moved / best / 1e3


def matmul_tflops(device: str, unit: str) -> float:
    """Speed of a large matmul of torch in a dtype, or of its int8 product: the better of x W^T and
    dy W, with W as a layer's weight lies.
    """
    side = 8192 if device == "cuda" else 1024
    x, W = (torch.randn(side, side, device=device) for _ in range(2))
    dtype = torch.int8 if unit == "int8" else getattr(torch, unit)
    x, W = ((t * 20).to(dtype) for t in (x, W))
    matmul = torch._int_mm if unit == "int8" else torch.matmul
    works = [Work("fwd", lambda i: matmul(x, W.t()), 2, 0.0)]
    works += [] if unit == "int8" else [Work("dgrad", lambda i: matmul(x, W), 2, 0.0)]
    best = min(timing.us for timing in measure(works, device, 5).values())
    return 2.0 * side**3 / best / 1e6


@functools.cache
def measure_roof(device: str, units: tuple[str, ...]) -> Roof:
    """Measures what the floors of a race are made of, once a process."""
    rates = {unit: matmul_tflops(device, unit) for unit in units}
    roof = Roof(read_gbs(device), rates)
    if device == "cuda":
        torch.cuda.empty_cache()
    return roof


def checked(
    work: Work,
    formulas: Callable[[torch.dtype, torch.Tensor | None, bool], dict[str, torch.Tensor]],
    dtype: torch.dtype,
    quantises_activations: bool = False,
) -> tuple[str | None, str]:
    """(reason to refuse or None, note): holds a provider to the error rule of tests/compare.py.

    A public provider that computes in less than the dtype asked for, or leaves the activations of
    LLM.int8() as they are, is timed all the same if it obeys the rule there, and its row says so.
    formulas(dtype, W or None, whether activations are quantised) -> the right values.
    """
    import compare

    switch(work)
    got, first = work.values(), None
    ours = work.provider == "fastpeft"
    for quantised in (True, False) if quantises_activations and not ours else (True,):
        exact = formulas(torch.float64, work.weight, quantised)
        for lower in (dtype,) if ours else dict.fromkeys((dtype, torch.bfloat16)):
            plain = formulas(lower, work.weight, quantised)
            verdicts = [
                compare.judge(value, exact[name], plain[name], dtype=lower, name=name)
                for name, value in got.items()
            ]
            wrong = [str(verdict) for verdict in verdicts if not verdict.ok]
            if not wrong:
                notes = ["" if lower == dtype else f"as exact as {lower} only"]
                notes += [] if quantised else ["activations not quantised"]
                return None, joined(*notes)
            first = first or wrong[0]
    return first, ""


def joined(*notes: str) -> str:
    """The notes that say something, in one."""
    return "; ".join(note for note in notes if note)
