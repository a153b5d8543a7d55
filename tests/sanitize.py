"""`make sanitize`: compute-sanitizer's four tools over sanitize_small.py and, where it is built,
over tests/native's test_kernels. Prints a table; exit code 1 where fastpeft's kernels did wrong.

    python tests/sanitize.py [--tools memcheck,racecheck] [--native PATH] [--M 1 16] [--keep DIR]

Counted are reports that name a kernel of fastpeft; torch's and cuBLAS's own stand apart. Where the
tool or a GPU is missing it says SKIPPED and ends with 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
OURS = "fastpeft"
NO_REPORT = (
    "COMPUTE-SANITIZER",
    "ERROR SUMMARY",
    "RACECHECK SUMMARY",
    "LEAK SUMMARY",
    "Target app",
)
# initcheck must see what torch's kernels write; the others need look at ours alone
WATCHES_ALL = ("initcheck",)


@dataclass(frozen=True)
class Result:
    """What one tool found in one program."""

    program: str
    tool: str
    ours: int
    others: int
    code: int
    seconds: float

    @property
    def is_clean(self) -> bool:
        """No report about fastpeft, and the program itself ended well."""
        return self.ours == 0 and self.code == 0


def find_tool() -> str | None:
    """compute-sanitizer on the PATH or in the CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    return found or shutil.which("compute-sanitizer", path=os.pathsep.join(PLACES))


def find_native() -> Path | None:
    """The newest test_kernels of any build folder of this checkout."""
    found = [*ROOT.glob("build/**/test_kernels"), *ROOT.glob(".nat/test_kernels")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def reports(log: str) -> list[list[str]]:
    """The reports in a tool's output, each a line "========= what" and the deeper lines below it.

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
    return found


def count(log: str) -> tuple[int, int]:
    """(reports that name a kernel of fastpeft, other reports)."""
    found = reports(log)
    ours = sum(any(OURS in line for line in report) for report in found)
    return ours, len(found) - ours


def excerpt(log: str) -> str:
    """The first reports and what the program said of its end."""
    lines = [line[:200] for report in reports(log)[:6] for line in report[:4]]
    lines += [
        line for line in log.splitlines() if re.match(r"\S*(Error|Exception|what\(\)):", line)
    ]
    cases = [line for line in log.splitlines() if line.startswith("case ")]
    lines += [f"last of {len(cases)} cases: {cases[-1]}"] if cases and lines else []
    return "\n".join(f"    {line}" for line in lines or log.splitlines()[-10:])


def run(tool: str, sanitizer: str, name: str, command: list[str], keep: Path | None) -> Result:
    """One tool over one program."""
    options = ["--tool", tool, "--print-limit", "1000", "--report-api-errors", "no"]
    if tool not in WATCHES_ALL:
        options += ["--kernel-regex", f"kns={OURS}"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sanitizer, *options, *command], env=environment, capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    log = done.stdout + done.stderr
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{name}-{tool}.log").write_text(log)
    ours, others = count(log)
    if ours or done.returncode:
        print(f"{name}, {tool}:\n{excerpt(log)}", flush=True)
    return Result(name, tool, ours, others, done.returncode, seconds)


def table(results: list[Result]) -> str:
    """One line a program and tool."""
    lines = [f"{'program':<16}{'tool':<11}{'fastpeft':>9}{'others':>8}{'exit':>6}{'seconds':>9}"]
    for r in results:
        line = f"{r.program:<16}{r.tool:<11}{r.ours:>9}{r.others:>8}{r.code:>6}{r.seconds:>9.1f}"
        lines.append(line + ("" if r.is_clean else "  WRONG"))
    return "\n".join(lines)


def skip_reason() -> str | None:
    """Why nothing can be run here, or None."""
    if find_tool() is None:
        return f"compute-sanitizer is neither on the PATH nor in {PLACES[0]} (CUDA toolkit)"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


def main(argv: list[str] | None = None) -> int:
    """0: clean or skipped; 1: a report about fastpeft, or a program that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--native", type=Path, help="test_kernels (default: the newest build's)")
    parser.add_argument("--M", nargs="*", default=[], help="tokens of sanitize_small.py")
    parser.add_argument("--keep", type=Path, help="folder for the tools' whole output")
    args = parser.parse_args(argv)
    if reason := skip_reason():
        print(f"SKIPPED: no sanitizer was run: {reason}")
        return 0
    small = [sys.executable, str(HERE / "sanitize_small.py")]
    programs = {"sanitize_small": small + (["--M", *args.M] if args.M else [])}
    native = args.native or find_native()
    if native:
        programs["test_kernels"] = [str(native)]
    else:
        print("SKIPPED: tests/native is not built (cmake -DFASTPEFT_NATIVE_TESTS=ON)")
    results = [
        run(tool, find_tool(), name, command, args.keep)
        for name, command in programs.items()
        for tool in args.tools.split(",")
    ]
    print(table(results))
    return 0 if all(result.is_clean for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
