"""One run from recipe to report: base, adapter, held-out loss, training, held-out loss, files.

A run's folder: recipe.yaml (whole, resolved), adapter/ (peft's format), metrics.jsonl, loss.png,
summary.json (when finished) and, while it runs, checkpoints/.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import StateError, refuse
from .base import pick_device, pick_dtype, quiet_libraries
from .fit import fit
from .folder import finish, prepare_output
from .heldout import heldout_loss, windows
from .memory import memory_bytes, reset_peak, resident_bytes
from .method import adapter_config, adapter_file_bytes, optimizer_plan, plan_text
from .metrics import MetricsLog
from .model import ADAPTER, freeze, load, open_run, texts
from .recipe import Recipe, write_recipe
from .reporter import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_heldout(
    model: PreTrainedModel, tokens: Tensor, seq_len: int, reporter: Reporter, name: str
) -> tuple[float, int]:
    """`heldout_loss` with progress."""
    reporter.phase(name, len(windows(tokens, seq_len)))
    return heldout_loss(model, tokens, seq_len, lambda loss: reporter.advance(1, loss=loss))


def _quantize_progress(reporter: Reporter) -> Callable[[int, int, str], None]:
    def show(done: int, total: int, name: str) -> None:
        if done == 1:
            reporter.phase("quantising", total)
        reporter.advance()

    return show


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Fine-tunes as the recipe says and leaves everything in `output`.

    Args:
        recipe: checked (`resolve`).
        output: folder of the run.
        resume: continue a killed run from its last checkpoint, with its own recipe; the same losses
            follow as without the kill. A finished run is only reported.
        overwrite: replace what an earlier run left in `output`.
        reporter: receives progress.

    Returns:
        The summary, as in summary.json: losses, bytes, tokens_per_s, seconds, ...

    Raises:
        ConfigError: the recipe, the data or the output folder cannot work; StateError: it diverged.
    """
    import fastpeft

    reporter = reporter or Reporter()
    output = Path(output)
    recipe, checkpoint = prepare_output(recipe, output, resume, overwrite)
    if (output / "summary.json").is_file():
        reporter.note(f"{output} is finished already")
        return json.loads((output / "summary.json").read_text(encoding="utf-8"))
    began = time.perf_counter()
    device = pick_device(recipe.device)
    recipe.dtype = str(pick_dtype(recipe.dtype, device)).removeprefix("torch.")
    quiet_libraries()
    from transformers import set_seed

    libraries = resident_bytes(device)
    reporter.phase("loading", 2)
    model, tokenizer = load(recipe, device)
    reporter.advance()
    blocks, held = texts(recipe, tokenizer)
    reporter.advance()
    log = MetricsLog(output / "metrics.jsonl", checkpoint[1] if checkpoint else None)
    if recipe.measure_dense and not log.of("heldout_dense"):
        loss, count = measure_heldout(model, held, recipe.seq_len, reporter, "loss of dense base")
        log.add("heldout_dense", 0, loss=loss, tokens=count)
    facts = freeze(model, recipe, device, _quantize_progress(reporter))
    set_seed(recipe.seed)
    config = adapter_config(recipe, blocks[0].tolist())
    fastpeft.attach(model, config, name=ADAPTER)
    facts["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts |= (plan := optimizer_plan(model, config, recipe))
    # Not earlier: what is refused above leaves no folder that looks like a run.
    write_recipe(recipe, output / "recipe.yaml", [plan_text(plan)])
    if not log.of("heldout"):
        with fastpeft.disabled(model):
            loss, count = measure_heldout(model, held, recipe.seq_len, reporter, "loss before")
        log.add("heldout", 0, loss=loss, tokens=count)
    peak = memory_bytes(device)
    reset_peak(device)
    fit(model, blocks, recipe, output, checkpoint, log, reporter)
    facts["train_memory_bytes"] = memory_bytes(device) - libraries
    fastpeft.save_adapter(model, output / "adapter", name=ADAPTER)
    facts["adapter_bytes"] = adapter_file_bytes(output / "adapter")
    loss, count = measure_heldout(model, held, recipe.seq_len, reporter, "loss after")
    log.add("heldout", recipe.steps or 1, loss=loss, tokens=count)
    reporter.close()
    facts |= {"device": _device_name(device), "seconds": time.perf_counter() - began}
    summary = _summary(recipe, log, facts, max(peak, memory_bytes(device)))
    finish(recipe, output, log, summary)
    return summary


def measure_base(
    recipe: Recipe, output: str | Path, reporter: Reporter | None = None
) -> dict[str, Any]:
    """What quantising alone costs: no adapter, no training.

    Args:
        recipe: checked; its method and steps do not matter.
        output: existing folder, gets metrics.jsonl.
        reporter: receives progress.

    Returns:
        The entries of a run's summary that make sense; loss_before is the dense base's.
    """
    reporter = reporter or Reporter()
    began = time.perf_counter()
    device = pick_device(recipe.device)
    recipe.dtype = str(pick_dtype(recipe.dtype, device)).removeprefix("torch.")
    quiet_libraries()
    libraries = resident_bytes(device)
    model, tokenizer = load(recipe, device)
    _, held = texts(recipe, tokenizer)
    log = MetricsLog(Path(output) / "metrics.jsonl")
    before, count = measure_heldout(model, held, recipe.seq_len, reporter, "loss of dense base")
    log.add("heldout_dense", 0, loss=before, tokens=count)
    facts = freeze(model, recipe, device, _quantize_progress(reporter))
    reset_peak(device)
    after, count = measure_heldout(model, held, recipe.seq_len, reporter, "loss after")
    log.add("heldout", 0, loss=after, tokens=count)
    reporter.close()
    return {
        "dtype": recipe.dtype,
        "device": _device_name(device),
        "loss_before": before,
        "loss_after": after,
        "heldout_tokens": count,
        **facts,
        "trainable": 0,
        "adapter_bytes": 0,
        "train_memory_bytes": memory_bytes(device) - libraries,
        "seconds": time.perf_counter() - began,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _summary(recipe: Recipe, log: MetricsLog, facts: dict[str, Any], memory: int) -> dict[str, Any]:
    rows, held, dense = log.of("train"), log.of("heldout"), log.of("heldout_dense")
    seconds = sum(row["seconds"] for row in rows)
    return {
        "model": recipe.model,
        "method": recipe.method,
        "format": recipe.format,
        "dtype": recipe.dtype,
        "data": ", ".join(recipe.data),
        "heldout": ", ".join(recipe.heldout) or f"last {recipe.heldout_fraction:.0%} of the data",
        "heldout_tokens": held[-1]["tokens"],
        "loss_dense": dense[0]["loss"] if dense else None,
        "loss_before": held[0]["loss"],
        "loss_after": held[-1]["loss"],
        **facts,
        "steps": recipe.steps,
        "tokens": rows[-1]["tokens"],
        "train_seconds": seconds,
        "tokens_per_s": rows[-1]["tokens"] / seconds,
        "memory_bytes": memory,
    }


def evaluate_run(
    run: str | Path, device: str = "auto", reporter: Reporter | None = None
) -> dict[str, Any]:
    """The held-out loss of a finished run, computed again from its files.

    Returns:
        loss, expected (what the run itself had measured), difference, tokens, and `opened`: the
        model, tokenizer and recipe, for further use.

    Raises:
        ConfigError: no finished run there.
    """
    reporter = reporter or Reporter()
    reporter.phase("loading", 2)
    model, tokenizer, recipe = open_run(run, device)
    reporter.advance()
    summary_file = Path(run) / "summary.json"
    if not summary_file.is_file():
        raise refuse(
            StateError, "run", f"{run} without summary.json", "a finished run", "Finish it first."
        )
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    _, held = texts(recipe, tokenizer)
    reporter.advance()
    loss, count = measure_heldout(model, held, recipe.seq_len, reporter, "loss again")
    reporter.close()
    expected = summary["loss_after"]
    return {
        "loss": loss,
        "expected": expected,
        "difference": abs(loss - expected),
        "tokens": count,
        "opened": (model, tokenizer, recipe),
    }
