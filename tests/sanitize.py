"""`make sanitize`: compute-sanitizer's four tools over every kernel. Prints a table, a line a
kernel and a column a tool; exit code 1 where a kernel did wrong.

    python tests/sanitize.py [--tools memcheck,racecheck] [--groups WORD] [--native PATH]
                             [--torch-tools memcheck] [--jobs 8] [--limit 60] [--time-budget 300]
                             [--keep DIR]

The torch-free test_kernels (tests/native) carries it: every group of its cases under every tool, in
processes of their own, several at a time; racecheck, the slow one, in several parts. So one case of
which a tool dies hides little else, and what was not checked is said so, by name, and never counts
as clean. sanitize_small.py does the same with the ops on top, through torch, under --torch-tools:
not racecheck, which dies ("failed to handle a hardware exception") wherever it is told to look at
some of a process's kernels only. Where the tool or a GPU is missing it says SKIPPED and ends with
0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")  # the longest first
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
OURS = "fastpeft"
SMALL = "sanitize_small"
NO_REPORT = (
    "COMPUTE-SANITIZER",
    "ERROR SUMMARY",
    "RACECHECK SUMMARY",
    "LEAK SUMMARY",
    "Target app",
)
DEATH = ("Internal Sanitizer Error", "Sanitizer failed to handle")
# what a tool's death drags behind it in the program
AFTER_DEATH = ("Error: process didn't terminate successfully", "Program hit")
PARTS = {"racecheck": 8}  # processes a group, at most; the others take one
# initcheck: it does not see what TMA stores, and would object to copying such an output back
OPTIONS = {"initcheck": ("--check-api-memory-access", "no")}


@dataclass(frozen=True)
class Result:
    """What one tool found in one process."""

    program: str  # a group of test_kernels, perhaps a part of it, or sanitize_small
    tool: str
    kernels: tuple[str, ...]  # that were launched, or might have been where the tool died
    found: tuple[str, ...]  # the reports, each in one string
    death: str  # why the tool did not come to an end, or ""
    code: int
    seconds: float

    def of(self, kernel: str) -> int:
        """Reports that name a kernel, or none of the process's: a frame of an inlined function."""
        others = [k for k in self.kernels if k != kernel]
        return sum(
            names(report, kernel) or not any(names(report, k) for k in others)
            for report in self.found
        )

    @property
    def ours(self) -> int:
        """Reports about fastpeft's kernels."""
        return sum(OURS in report for report in self.found)

    @property
    def state(self) -> str:
        """What came of it, in words."""
        if self.found or not (self.death or self.code):
            return f"{len(self.found)} reports ({self.ours} of fastpeft)" if self.found else "clean"
        return short(self.death) if self.death else f"ended with {self.code}"


def names(report: str, kernel: str) -> bool:
    """Whether a report is about a kernel (tile_bytes_kernel is not untile_bytes_kernel)."""
    return re.search(rf"\b{kernel}\b", report) is not None


def find_tool() -> str | None:
    """compute-sanitizer on the PATH or in the CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    return found or shutil.which("compute-sanitizer", path=os.pathsep.join(PLACES))


def find_native() -> Path | None:
    """The newest test_kernels of any build folder of this checkout."""
    return max(
        ROOT.glob("build/**/test_kernels"), key=lambda path: path.stat().st_mtime, default=None
    )


def kernels_of_source() -> list[str]:
    """Every __global__ function of cuda/."""
    text = "".join(path.read_text() for path in sorted((ROOT / "cuda").glob("**/*.cu*")))
    found = re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", text)
    return sorted(set(found))


# ---- what a tool says


def reports(log: str) -> list[str]:
    """The reports in a tool's output, each the line "========= what" and the deeper ones below it.

    Frames of the host are no witness and are left out: fastpeft's library also launches torch's
    matmul.
    """
    found: list[list[str]] = []
    for line in log.splitlines():
        match = re.match(r"=========( +)(.+)", line)
        if match is None or match[2].startswith(("Host Frame", "Saved host backtrace")):
            continue
        if len(match[1]) > 1:
            if found:
                found[-1].append(match[2])
        elif not match[2].startswith(NO_REPORT):
            found.append([match[2]])
    return ["\n".join(lines) for lines in found]


def death_of(log: str) -> str:
    """The line in which the tool gives up, or ""."""
    return next((r.splitlines()[0] for r in reports(log) if r.startswith(DEATH)), "")


def faults(log: str) -> list[str]:
    """The reports that are about the program. Once the tool has died, only those that name a
    kernel of ours: the rest is the program falling down behind it.
    """
    found = [r for r in reports(log) if not r.startswith(DEATH)]
    if death_of(log):
        found = [r for r in found if OURS in r and not r.startswith(AFTER_DEATH)]
    return found


def excerpt(log: str) -> str:
    """The first reports and what the program said of its end."""
    lines = [line[:200] for report in reports(log)[:6] for line in report.splitlines()[:4]]
    lines += [
        line for line in log.splitlines() if re.match(r"\S*(Error|Exception|what\(\)):", line)
    ]
    lines += [line for line in log.splitlines() if line.startswith("FAILED")][:4]
    cases = [line for line in log.splitlines() if line.startswith("case ")]
    lines += [f"last of {len(cases)} cases: {cases[-1]}"] if cases and lines else []
    return "\n".join(f"    {line}" for line in lines or log.splitlines()[-10:])


# ---- the runs


@dataclass(frozen=True)
class Runner:
    """How a tool is started."""

    sanitizer: str
    limit: float  # seconds a process
    deadline: float  # of time.monotonic(): what has not begun by then is not checked
    keep: Path | None

    def run(self, tool: str, program: str, command: list[str], kernels: Iterable[str]) -> Result:
        """One tool over one program, which may launch these kernels."""
        options = ["--tool", tool, "--print-limit", "1000", "--report-api-errors", "no"]
        options += OPTIONS.get(tool, ())
        if program == SMALL and tool != "initcheck":  # that one must see what every kernel writes
            options += ["--kernel-regex", f"kns={OURS}"]
        start = time.monotonic()
        limit = min(self.limit, self.deadline - start)
        if limit < 1:
            return Result(program, tool, tuple(kernels), (), "no time left", 124, 0.0)
        log, code = self._output([self.sanitizer, *options, *command], limit)
        death = death_of(log) or ("" if code is not None else f"not done in {limit:.0f} s")
        result = Result(
            program,
            tool,
            tuple(kernels if death else launches(log).get(group_of(program), ())),
            tuple(faults(log)),
            death,
            124 if code is None else code,
            time.monotonic() - start,
        )
        if self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "-", f"{program}-{tool}")
            (self.keep / f"{name}.log").write_text(log)
        print(f"{program}, {tool}: {result.state}, {result.seconds:.1f} s", flush=True)
        if result.found or (result.code and not death):
            print(excerpt(log), flush=True)
        return result

    def _output(self, command: list[str], limit: float) -> tuple[str, int | None]:
        """(what it printed, its exit code or None past the limit). The tool and the program that it
        starts end together.
        """
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                return process.communicate(timeout=limit)[0], process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return process.communicate()[0], None


def group_of(program: str) -> str:
    """ "int8 2/5" -> "int8"."""
    return re.sub(r" \d+/\d+$", "", program)


def launches(log: str) -> dict[str, dict[str, int]]:
    """group -> kernel -> how often test_kernels launched it, from its lines."""
    found: dict[str, dict[str, int]] = {}
    for line in log.splitlines():
        if match := re.fullmatch(r"launched (.+)/(\w+) (\d+)", line):
            found.setdefault(match[1], {})[match[2]] = int(match[3])
    return found


def plan(native: str, tools: list[str], word: str) -> list[tuple[str, str, list[str], list[str]]]:
    """(tool, program, command, kernels) of every process over test_kernels, the longest first.

    Raises:
        RuntimeError: the program fails without any tool.
    """
    command = [native, "--small", "--bare", "--launches"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    cases = {m[1]: int(m[2]) for m in re.finditer(r"^ran (.+) (\d+)$", done.stdout, re.M)}
    found = []
    for group, kernels in launches(done.stdout).items():
        if word not in group:
            continue
        for tool in tools:
            parts = max(1, min(PARTS.get(tool, 1), cases[group]))
            for i in range(parts):
                name = f"{group} {i + 1}/{parts}" if parts > 1 else group
                more = ["--part", f"{i}/{parts}", f"={group}"]
                found.append((tool, name, command + more, list(kernels)))
    return sorted(found, key=lambda job: tools.index(job[0]))


# ---- the table


def verdict(results: list[Result], kernel: str) -> str:
    """What a tool says of a kernel, over all processes: "clean", "3 reports", or why it is not
    known; "clean in part" where the tool died in a process that may have launched it too.
    """
    seen = [r for r in results if kernel in r.kernels]
    if count := sum(r.of(kernel) for r in seen):
        return f"{count} reports"
    dead = [r for r in seen if r.death]
    if not seen:
        return "NOT RUN"
    if len(dead) == len(seen):
        return f"NOT CHECKED: {short(dead[0].death)}"
    return "clean in part" if dead else "clean"


def short(death: str) -> str:
    """The cause in a word or two, for the table."""
    return death if death.startswith(("not done", "no time")) else "tool dies"


def table(results: list[Result], kernels: list[str], tools: list[str]) -> str:
    """One line a kernel, one column a tool."""
    width = max(map(len, kernels))
    cells = {
        (kernel, tool): verdict([r for r in results if r.tool == tool], kernel)
        for kernel in kernels
        for tool in tools
    }
    wide = {tool: max(len(tool), *(len(cells[k, tool]) for k in kernels)) for tool in tools}
    lines = ["  ".join(["kernel".ljust(width), *(tool.ljust(wide[tool]) for tool in tools)])]
    for kernel in kernels:
        row = (cells[kernel, tool].ljust(wide[tool]) for tool in tools)
        lines.append("  ".join([kernel.ljust(width), *row]).rstrip())
    for tool in tools:
        texts = [cells[kernel, tool] for kernel in kernels]
        clean = sum(text == "clean" for text in texts)
        unknown = sum(text.startswith("NOT") for text in texts)
        seconds = sum(r.seconds for r in results if r.tool == tool)
        reported = sum(text.endswith("reports") for text in texts)
        lines.append(
            f"{tool}: {clean} of {len(texts)} kernels clean, {reported} with reports, "
            f"{unknown} not checked; {seconds:.0f} s of processes"
        )
    return "\n".join(lines)


def wrong(results: list[Result]) -> list[str]:
    """The processes that show a fault: reports (through torch: those about fastpeft's kernels), or
    a program that failed with the tool alive.
    """
    lines = []
    for r in results:
        if count := r.ours if r.program == SMALL else len(r.found):
            lines.append(f"{r.program}, {r.tool}: {count} reports")
        elif r.code and not r.death:
            lines.append(f"{r.program}, {r.tool}: ended with {r.code}")
    return lines


def skip_reason() -> str | None:
    """Why nothing can be run here, or None."""
    if find_tool() is None:
        return f"compute-sanitizer is neither on the PATH nor in {PLACES[0]} (CUDA toolkit)"
    if not list(Path("/dev").glob("nvidia[0-9]*")) and not shutil.which("nvidia-smi"):
        return "no NVIDIA GPU"
    return None


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="over test_kernels")
    parser.add_argument("--torch-tools", default="memcheck,synccheck", help="over the ops")
    parser.add_argument("--groups", default="", help="only groups whose name has this word")
    parser.add_argument("--native", type=Path, help="test_kernels (default: the newest build's)")
    parser.add_argument("--M", nargs="*", default=[], help="tokens of sanitize_small.py")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a process")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--keep", type=Path, help="folder for the tools' whole output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: no fault or skipped; 1: a report about fastpeft, or a program that failed."""
    args = arguments(argv)
    if reason := skip_reason():
        print(f"SKIPPED: no sanitizer was run: {reason}")
        return 0
    runner = Runner(find_tool(), args.limit, time.monotonic() + args.time_budget, args.keep)
    tools, torch_tools = ([t for t in s.split(",") if t] for s in (args.tools, args.torch_tools))
    native = args.native or find_native()
    jobs = plan(str(native), tools, args.groups) if native and tools else []
    small = [sys.executable, str(HERE / "sanitize_small.py")]
    small += ["--M", *args.M] if args.M else []
    jobs = [(tool, SMALL, small, []) for tool in torch_tools] + jobs
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(runner.run, *job) for job in jobs]
        results = [future.result() for future in futures]
    if native and tools:
        print(table(results, kernels_of_source(), tools))
    elif tools:
        print("SKIPPED: tests/native is not built (cmake -DFASTPEFT_NATIVE_TESTS=ON)")
    faulty = wrong(results)
    print("\n".join(f"WRONG: {line}" for line in faulty) or "no fault found")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
