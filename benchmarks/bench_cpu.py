"""The CPU race: NF4 with double quantisation and LLM.int8() against bitsandbytes' CPU backend and
peft + bitsandbytes, paired in one process.

`python benchmarks/bench_cpu.py [options of run.py]`: the problems that fastpeft promises never to
be slower at. Options given here come after the preset, so they win. Ends with 1 where a public
library was faster by more than a tie.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness  # noqa: E402  (puts tests/ and python/ on the path)
import report  # noqa: E402
import run  # noqa: E402

PRESET = {
    "--device": "cpu",
    "--shapes": "576x1536,1536x576,4096x4096",
    "--M": "1,16,512",
    "--R": "0,16",
    "--dtype": "float32,bfloat16",
    "--format": "nf4,llm.int8",
    "--directions": "fwd,fwd+bwd",
    "--providers": "fastpeft,torch,bitsandbytes,peft+bitsandbytes",
    "--rounds": "7",
    "--time-budget": "1500",
}
PEERS = ("bitsandbytes", "peft+bitsandbytes")


def losses(rows: list[report.Row]) -> list[str]:
    """Problems at which a peer was faster by more than a tie."""
    lost = []
    for problem, row_of in report.by_problem(rows).items():
        ours = row_of.get("fastpeft")
        for peer in PEERS:
            if ours and peer in row_of:
                ratio = report.time_of(row_of[peer]) / report.time_of(ours)
                if ratio < 1 - report.TIE:
                    lost.append(f"{peer} {ratio:.3f}x: {problem}")
    return lost


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 never slower, 1 slower somewhere or nothing timed, 2 the input was wrong."""
    preset = [word for pair in PRESET.items() for word in pair]
    written: list[report.Row] = []

    class Writer(harness.RowWriter):
        def write(self, *args, **keys):
            row = super().write(*args, **keys)
            written.append(row)
            return row

    keep, harness.RowWriter = harness.RowWriter, Writer
    try:
        code = run.main(["qlinear", *preset, *(sys.argv[1:] if argv is None else argv)])
    finally:
        harness.RowWriter = keep
    lost = losses(written)
    for line in lost:
        print(f"slower than {line}")
    return code or int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
