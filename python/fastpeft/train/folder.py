"""The folder of a run: what may be written there, what a resumed or finished run holds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError, refuse
from .metrics import MetricsLog
from .plot import draw
from .recipe import Recipe, load_recipe, resolve


def last_checkpoint(output: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint of a run and its step; a half-written one is passed over."""
    whole = []
    for folder in (output / "checkpoints").glob("checkpoint-*"):
        try:
            # The Trainer writes its state last.
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append((int(state["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            continue
    if not whole:
        return None
    step, folder = max(whole)
    return folder, step


def prepare_output(
    recipe: Recipe, output: Path, resume: bool, overwrite: bool
) -> tuple[Recipe, tuple[Path, int] | None]:
    """The recipe to run (a resumed run keeps its own) and the checkpoint to continue from."""
    written = output / "recipe.yaml"
    if resume and not written.is_file():
        raise refuse(
            ConfigError,
            "output",
            f"{output} without recipe.yaml",
            "the folder of an earlier run",
            "Correct --output, or leave out --resume.",
        )
    if resume:
        old = resolve(load_recipe(written))
        for name, value in dataclasses.asdict(recipe).items():
            before = getattr(old, name)
            if value != before and not (value == "auto" and name in ("dtype", "device")):
                raise refuse(
                    ConfigError,
                    name,
                    repr(value),
                    f"{before!r} as in {written}",
                    "Resume with the run's own recipe, or start a new --output.",
                )
        return old, last_checkpoint(output)
    if written.is_file() and not overwrite:
        raise refuse(
            ConfigError,
            "output",
            f"{output}, which holds a run",
            "a new folder",
            "Add --resume to continue it, or --overwrite to start again.",
        )
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("metrics.jsonl", "summary.json", "loss.png"):
        (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    return recipe, None


def finish(recipe: Recipe, output: Path, log: MetricsLog, summary: dict[str, Any]) -> None:
    log.add("summary", recipe.steps or 1, **summary)
    title = f"{recipe.method} on {recipe.model} ({recipe.format}), {summary['device']}"
    draw(log.rows, output / "loss.png", title)
    text = json.dumps(summary, indent=2) + "\n"
    (output / "summary.json").write_text(text, encoding="utf-8")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
