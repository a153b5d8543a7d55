"""Command line of the benchmarks: `python benchmarks/run.py qlinear --device cuda --shapes
llama3-8b --M 1,16,512`.

`fastpeft bench` calls main(argv). Prints tables, appends rows to results/<device>.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness  # noqa: E402  (puts tests/ and python/ on the path)

import torch  # noqa: E402  isort: skip
import bench_bottleneck  # noqa: E402
import bench_dequantize  # noqa: E402
import bench_lora  # noqa: E402
import bench_qlinear  # noqa: E402
import bench_train_step  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
from cases import Case  # noqa: E402
from fastpeft.ops.launch import dependent_launch  # noqa: E402

WHAT = ("dequantize", "qlinear", "lora", "bottleneck", "train-step")
DEFAULT_PROVIDERS = {
    "dequantize": ("fastpeft", "bitsandbytes"),
    "qlinear": (
        *("fastpeft", "torch", "dequant+torch", "bitsandbytes", "peft+bitsandbytes", "humming"),
    ),
    "lora": bench_lora.PROVIDERS,
    "bottleneck": bench_bottleneck.PROVIDERS,
    "train-step": bench_train_step.PROVIDERS,
}


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _tokens(text: str) -> list[int]:
    return list(shapes.TOKENS) if text == "all" else _numbers(text)


def parser() -> argparse.ArgumentParser:
    """The options; each has a default that ends within a minute or two on either device."""
    p = argparse.ArgumentParser(
        prog="fastpeft bench", description="Kernels and steps against what else is installed."
    )
    p.add_argument(
        "what", nargs="*", default=[], help=f"any of {', '.join(WHAT)} (default qlinear)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--shapes", help=f"NxK or {', '.join(shapes.LINEAR)}; comma between")
    p.add_argument("--M", type=_tokens, help="tokens, 1,16,512; all: 1 ... 16384")
    p.add_argument("--R", type=_numbers, default=[0, 16], help="ranks; 0: without LoRA")
    p.add_argument("--D", type=_numbers, default=[64, 256], help="bottleneck widths")
    p.add_argument(
        "--format", type=_words, default=["nf4"], help="nf4, nf4-single, int8, llm.int8, ..."
    )
    p.add_argument("--dtype", type=_words, help="bfloat16, float16, float32")
    p.add_argument(
        *("--directions",),
        type=_words,
        help="fwd, dgrad (without LoRA), fwd+bwd; default fwd,dgrad for qlinear, else fwd,fwd+bwd",
    )
    p.add_argument(
        *("--pdl",),
        action=argparse.BooleanOptionalAction,
        help="fastpeft also with programmatic dependent launch, in rows of its own; train-step: "
        "with it or without",
    )
    p.add_argument("--providers", type=_words, help="default: all that fit")
    p.add_argument("--model", type=_words, help=f"train-step: {', '.join(shapes.MODELS)}")
    p.add_argument("--batch", type=int, help="train-step: sequences a step")
    p.add_argument("--length", type=int, help="train-step: tokens a sequence")
    p.add_argument("--checkpointing", choices=("on", "off", "both"), default="on")
    p.add_argument("--rounds", type=int, default=harness.ROUNDS, help="turns of every provider")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--time-budget", type=float, default=240.0, help="seconds; what is left is said")
    p.add_argument("--out", type=Path, help="rows (default results/<device>.jsonl)")
    p.add_argument(
        "--plot", type=Path, help="BASE of BASE-time.png, BASE-share.png (default beside the rows)"
    )
    p.add_argument("--no-plot", action="store_true", help="qlinear, lora: draw nothing")
    return p


def _defaults(args: argparse.Namespace) -> None:
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = args.device == "cuda"
    args.what = args.what or ["qlinear"]
    unknown = [w for w in args.what if w not in WHAT]
    if unknown:
        raise ValueError(f"what: got {unknown[0]!r}, expected one of {', '.join(WHAT)}")
    args.shapes = shapes.linear_shapes(args.shapes or ("llama3-8b" if cuda else "576x1536"))
    args.M = args.M or (list(shapes.TOKENS) if cuda else [1, 16, 512])
    args.dtype = args.dtype or ["bfloat16" if cuda else "float32"]
    args.model = args.model or ["llama3-8b" if cuda else "smollm2-135m"]
    args.batch = args.batch or (4 if cuda else 2)
    args.length = args.length or (2048 if cuda else 256)
    known = {*peers.PROVIDERS, *bench_bottleneck.PROVIDERS, *bench_train_step.PROVIDERS}
    strange = [p for p in args.providers or [] if p not in known]
    if strange:
        raise ValueError(f"providers: got {strange[0]!r}, expected of {', '.join(sorted(known))}")


def _directions(what: str, args: argparse.Namespace) -> list[str]:
    return args.directions or (["fwd", "dgrad"] if what == "qlinear" else ["fwd", "fwd+bwd"])


def _run(what: str, args: argparse.Namespace, options: bench_qlinear.Options) -> int:
    """Runs one benchmark; how many problems the budget left out."""
    directions = _directions(what, args)
    linear = (args.dtype, args.shapes, args.R, args.M, directions)
    if what == "dequantize":
        cases = [
            Case(kind, dtype, 1, N, K)
            for kind in args.format
            for dtype in args.dtype
            for N, K in args.shapes
        ]
        return bench_dequantize.run(cases, options)
    if what == "qlinear":
        return bench_qlinear.run(list(bench_qlinear.problems(args.format, *linear)), options)
    if what == "lora":
        ranks = [R for R in args.R if R]
        problems = bench_qlinear.problems(["dense"], *linear[:2], ranks, *linear[3:])
        return bench_lora.run(list(problems), options)
    if what == "bottleneck":
        sizes = [
            bench_bottleneck.Size(M, K, D, dtype, direction)
            for dtype in args.dtype
            for K in dict.fromkeys(K for _, K in args.shapes)
            for D in args.D
            for M in args.M
            for direction in directions
            if direction != "dgrad"
        ]
        return bench_bottleneck.run(sizes, options)
    steps = [
        bench_train_step.Step(model, args.batch, args.length, R, kind, dtype, checkpointing)
        for model in args.model
        for kind in args.format
        for dtype in args.dtype
        for R in args.R
        if R
        for checkpointing in {"on": (True,), "off": (False,), "both": (True, False)}[
            args.checkpointing
        ]
    ]
    return bench_train_step.run(steps, options)


def _roof(what: str, args: argparse.Namespace) -> harness.Roof | None:
    """Measured for the benchmarks that have floors."""
    if what not in ("qlinear", "lora"):
        return None
    units = list(args.dtype)
    if what == "qlinear" and any(kind.startswith("llm.int8") for kind in args.format):
        units.append("int8")
    roof = harness.measure_roof(args.device, tuple(units))
    print(f"roof: {roof}")
    return roof


def _plot(args: argparse.Namespace, writer: harness.RowWriter) -> None:
    try:
        for path in report.plots(writer.rows, args.plot or writer.path.with_suffix("")):
            print(f"plot: {path}")
    except ImportError as error:
        print(f"no plot: {error}")


def _races(args: argparse.Namespace, writer: harness.RowWriter) -> None:
    """All that was asked for, one after the other, within the budget."""
    budget, at_start = harness.Budget(args.time_budget), dependent_launch()
    for what in args.what:
        # races of kernels switch for every provider; a training step keeps what it finds here
        can_switch = dependent_launch(at_start if args.pdl is None else args.pdl)
        options = bench_qlinear.Options(
            args.device,
            tuple(p for p in DEFAULT_PROVIDERS[what] if not args.providers or p in args.providers),
            tuple(_directions(what, args)),
            args.rounds,
            budget,
            writer,
            lambda text: print(text, flush=True),
            bool(args.pdl) and can_switch and args.device == "cuda",
            _roof(what, args),
        )
        left = _run(what, args, options)
        if left:
            print(f"{what}: time budget of {args.time_budget:g} s spent, {left} problems NOT run")
    dependent_launch(at_start)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 nothing could be timed, 2 the input was wrong."""
    args = parser().parse_args(argv)
    try:
        _defaults(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    writer = harness.RowWriter(args.out or harness.results_file(args.device), args.device)
    print(
        f"{harness.device_name(args.device)}, torch {torch.__version__}, commit {harness.commit()}"
    )
    _races(args, writer)
    if not writer.rows:
        print("error: nothing was timed", file=sys.stderr)
        return 1
    print(report.table(writer.rows))
    print(report.standing(writer.rows))
    if not args.no_plot:
        _plot(args, writer)
    print(f"{len(writer.rows)} rows appended to {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
