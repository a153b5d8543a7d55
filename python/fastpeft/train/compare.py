"""Every method on one model and one text, each in a process of its own, as rows of one table.

A row's folder, `<output>/<row>`: row.yaml (what was asked), log.txt (what its process said) and the
files of a run; result.json is written last. A row that has one, for the same question, is not run
again. The processes are fresh so that each one's peak memory is its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, StateError, refuse
from .metrics import read_rows
from .recipe import Recipe, resolve
from .reporter import Reporter

COMMON: dict[str, Any] = {
    "model": "smollm2",
    # the other minor prophets: 38,000 tokens, so that a row starts quickly
    "data": ["kjv:Hosea,Joel,Amos,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi"],
    "heldout": ["kjv:Obadiah"],
    "steps": 12,
    "seq_len": 512,
    "warmup_steps": 2,
    "save_every": 0,
}
_LORA = {"method": "lora", "lr": 1e-3}
_BOTTLENECK = {"method": "bottleneck", "format": "none"}
# What differs between the rows. The rates are for a handful of steps: some times those of a long
# run. method None: quantisation alone, its loss before is the dense base's.
ROWS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "format": "none", "lr": 5e-5},
    "lora": {**_LORA, "format": "none"},
    "qlora": {**_LORA, "format": "nf4"},
    "lora-int8": {**_LORA, "format": "int8"},
    "dora": {**_LORA, "format": "none", "use_dora": True},
    "prefix": {"method": "prefix", "format": "none", "lr": 1e-2},
    "prefix-projection": {"method": "prefix", "format": "none", "projection": True, "lr": 1e-3},
    "prompt": {"method": "prompt", "format": "none", "lr": 3e-2},
    "ia3": {"method": "ia3", "format": "none", "lr": 1e-2},
    "houlsby": {**_BOTTLENECK, "bottleneck": "houlsby", "lr": 1e-3},
    # These two read the residual stream, whose few huge channels want small steps (parallel at
    # 1e-4, of its own width, ends at 3.6 from 3.2) and a start at the base's outputs (pfeiffer's
    # own begins at 4.3 instead of 3.7).
    "pfeiffer": {
        **_BOTTLENECK,
        "bottleneck": "pfeiffer",
        "bottleneck_init": "mam_adapter",
        "lr": 3e-4,
    },
    "parallel": {**_BOTTLENECK, "bottleneck": "parallel", "reduction_factor": 16, "lr": 3e-5},
    "nf4": {"method": None, "format": "nf4"},
    "int8": {"method": None, "format": "int8"},
}
_POLL_SECONDS = 0.3
_CHILD = "import sys; from fastpeft.train.compare import run_row; run_row(sys.argv[1])"


def choose(names: Iterable[str] | None) -> list[str]:
    """The rows of these names in the table's order; None: all.

    Raises:
        ConfigError: an unknown name, or none.
    """
    wanted = list(ROWS) if names is None else [name.strip() for name in names]
    for name in wanted:
        if name not in ROWS:
            near = get_close_matches(name, ROWS, n=2)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Rows: {', '.join(ROWS)}."
            raise refuse(ConfigError, "methods", repr(name), "a row of the comparison", hint)
    if not wanted:
        raise refuse(ConfigError, "methods", "none", "at least one", f"Rows: {', '.join(ROWS)}.")
    return [name for name in ROWS if name in wanted]


def row_entries(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Entries of the recipe of a row; "method" is None where nothing is trained.

    Args:
        name: of ROWS.
        changes: entries that all rows share, None: not given.

    Raises:
        ConfigError: an entry that cannot work.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    entries = {**COMMON, **ROWS[name], **given}
    trained = {key: value for key, value in entries.items() if value is not None}
    resolve(trained)
    return entries


def compare(
    output: str | Path,
    methods: Iterable[str] | None = None,
    changes: dict[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Measures the rows that are not measured yet and draws the plot.

    Args:
        output: folder of the comparison; gets comparison.json and comparison.png.
        methods: names of ROWS; None: all.
        changes: recipe entries shared by all rows (model, data, heldout, steps, seq_len, ...).
        reporter: receives progress.

    Returns:
        A dict a row: name, method, format, dtype, device, trainable, share (of the base's
        parameters), adapter_bytes, memory_bytes (peak while training, base included, libraries
        not), tokens_per_s (median step), loss_before, loss_after, steps, lr, seconds. None where a
        row has no such value.

    Raises:
        ConfigError: an unknown row or impossible entry, before anything runs; StateError: a row
            failed; those before it are kept.
    """
    from .plot import draw_comparison

    reporter, output = reporter or Reporter(), Path(output)
    names = choose(methods)
    changes = dict(changes or {})
    asked = {name: row_entries(name, changes) for name in names}
    changes["dtype"] = _dtype(output, asked[names[0]])
    asked = {name: row_entries(name, changes) for name in names}
    results = []
    for index, name in enumerate(names, 1):
        folder = output / name
        if not _is_done(folder, asked[name]):
            _measure(folder, asked[name], f"{index}/{len(names)} {name}", reporter)
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        results.append({"name": name, **found})
    reporter.close()
    text = json.dumps(results, indent=2) + "\n"
    (output / "comparison.json").write_text(text, encoding="utf-8")
    first = asked[names[0]]
    title = f"{first['model']}, {first['steps']} steps of {first['seq_len']} tokens"
    draw_comparison(results, output / "comparison.png", title)
    return results


def _dtype(output: Path, entries: dict[str, Any]) -> str:
    """One dtype for all rows, those measured earlier included: "auto" is a matter of timing."""
    from .base import pick_device, pick_dtype

    dtype, device = entries.get("dtype", "auto"), entries.get("device", "auto")
    for path in sorted(output.glob("*/row.yaml")) if dtype == "auto" else ():
        row = yaml.safe_load(path.read_text(encoding="utf-8"))
        if row.get("device", "auto") == device:
            return row["dtype"]
    return str(pick_dtype(dtype, pick_device(device))).removeprefix("torch.")


def _is_done(folder: Path, entries: dict[str, Any]) -> bool:
    if not (folder / "result.json").is_file() or not (folder / "row.yaml").is_file():
        return False
    return yaml.safe_load((folder / "row.yaml").read_text(encoding="utf-8")) == entries


def _measure(folder: Path, entries: dict[str, Any], title: str, reporter: Reporter) -> None:
    """Runs a row in a new process and passes its progress on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    (folder / "row.yaml").write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    # two measurements of the held-out loss beside the steps
    reporter.phase(title, 2 + (entries["steps"] if entries["method"] else 0))
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        command = [sys.executable, "-c", _CHILD, str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        seen = 0
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                seen = _pass_on(folder / "metrics.jsonl", seen, reporter)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    _pass_on(folder / "metrics.jsonl", seen, reporter)
    if process.returncode or not (folder / "result.json").is_file():
        lines = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
        raise refuse(
            StateError,
            f"row {folder.name}",
            lines[-1] if lines else f"exit code {process.returncode}",
            "a finished run",
            f"See {folder / 'log.txt'}; the finished rows are kept.",
        )


def _pass_on(path: Path, seen: int, reporter: Reporter) -> int:
    rows = [row for row in read_rows(path) if row["kind"] != "summary"]
    for row in rows[seen:]:
        known = ("loss", "tokens_per_s", "memory_bytes")
        reporter.advance(1, **{key: row[key] for key in known if key in row})
    return len(rows)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone (killed, say): left alone it would
    write into a row that a new comparison measures."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_row(folder: str | Path) -> None:
    """The work of a row's process: trains (or only quantises) as row.yaml says, writes
    result.json."""
    from .run import measure_base, train

    _end_with_parent()
    folder = Path(folder)
    entries = yaml.safe_load((folder / "row.yaml").read_text(encoding="utf-8"))
    recipe: Recipe = resolve({k: v for k, v in entries.items() if v is not None})
    if entries["method"] is None:
        summary = measure_base(recipe, folder)
        speed = steps = rate = None
    else:
        summary = train(recipe, folder, overwrite=True)
        rows = [r for r in read_rows(folder / "metrics.jsonl") if r["kind"] == "train"]
        # the median: other work on the machine disturbs some steps
        speed = recipe.tokens_per_step / statistics.median(row["seconds"] for row in rows)
        steps, rate = recipe.steps, recipe.lr
    result = {
        "method": entries["method"],
        "format": recipe.format,
        "dtype": summary["dtype"],
        "device": summary["device"],
        "trainable": summary["trainable"],
        "share": summary["trainable"] / summary["parameters"],
        "adapter_bytes": summary["adapter_bytes"],
        "memory_bytes": summary["train_memory_bytes"],
        "tokens_per_s": speed,
        "loss_before": summary["loss_before"],
        "loss_after": summary["loss_after"],
        "steps": steps,
        "lr": rate,
        "seconds": summary["seconds"],
    }
    text = json.dumps(result, indent=2) + "\n"
    (folder / "result.json").write_text(text, encoding="utf-8")
