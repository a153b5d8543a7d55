"""One run from recipe to report: base, adapter, held-out loss, training, held-out loss, files.

A run's folder: recipe.yaml (whole, resolved), adapter/ (peft's format), metrics.jsonl, loss.png,
summary.json (when finished) and, while it runs, checkpoints/.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, StateError, refuse
from .base import load_base, model_folder, pick_device, pick_dtype, quiet_libraries
from .blocks import BlockSequence, cut, hold_out, tokenize
from .heldout import heldout_loss, windows
from .metrics import MetricsLog
from .plot import draw
from .recipe import Recipe, load_recipe, resolve, write_recipe
from .reporter import Reporter
from .sources import read

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def frozen_base(
    recipe: Recipe, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """The base as a recipe wants it: loaded, quantised, on its device, in evaluation mode.

    Args:
        recipe: with a resolved dtype.
        device: where it ends.

    Returns:
        model, tokenizer, facts: parameters, dense_bytes (the model in 16 bits), base_bytes.
    """
    import fastpeft

    model, tokenizer = load_base(model_folder(recipe.model), getattr(torch, recipe.dtype))
    model.config.use_cache = False
    parameters = sum(p.numel() for p in model.parameters())
    if recipe.format != "none":
        options: dict[str, Any] = {
            "blocksize": recipe.blocksize,
            "double_quant": recipe.double_quant,
        }
        if recipe.format == "int8":
            options = {"threshold": recipe.threshold}
        fastpeft.quantize(model, recipe.format, **options)
    model.to(device).eval()
    facts = {
        "parameters": parameters,
        "dense_bytes": 2 * parameters,
        "base_bytes": module_bytes(model),
    }
    return model, tokenizer, facts


def adapter_config(recipe: Recipe) -> Any:
    """The configuration object of the recipe's method."""
    import fastpeft

    alpha = recipe.lora_alpha
    return fastpeft.LoRA(
        r=recipe.r,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.target_modules,
        use_rslora=recipe.use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.model,
    )


def texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Training blocks [B, seq_len] and held-out tokens [T] of a recipe."""
    data = [document for source in recipe.data for document in read(source)]
    blocks = cut(tokenize(data, tokenizer), recipe.seq_len)
    if not recipe.heldout:
        return hold_out(blocks, recipe.heldout_fraction)
    held = [document for source in recipe.heldout for document in read(source)]
    return blocks, tokenize(held, tokenizer)


def measure_heldout(
    model: PreTrainedModel, tokens: Tensor, seq_len: int, reporter: Reporter, name: str
) -> tuple[float, int]:
    """`heldout_loss` with progress."""
    reporter.phase(name, len(windows(tokens, seq_len)))
    return heldout_loss(model, tokens, seq_len, lambda loss: reporter.advance(1, loss=loss))


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


def _prepare_output(
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


def _arguments(recipe: Recipe, output: Path, device: torch.device) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=recipe.steps or 1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.grad_accumulation,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a diverged run behind a made-up number
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 1,
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        fp16=recipe.dtype == "float16" and device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        log_level="error",
    )
    # Several visible GPUs: the Trainer would wrap the model in DataParallel, which copies the base a step.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _checkpoint_activations(model: PreTrainedModel) -> None:
    # transformers renamed it; the old name is all that 5.0 has.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _fit(
    model: PreTrainedModel,
    blocks: Tensor,
    recipe: Recipe,
    output: Path,
    checkpoint: tuple[Path, int] | None,
    log: MetricsLog,
    reporter: Reporter,
) -> None:
    from transformers import PrinterCallback

    from ..hf.progress import StepCallback
    from ..hf.trainer import AdapterTrainer

    device = next(model.parameters()).device
    steps = recipe.steps or 1
    reporter.phase("training", steps, checkpoint[1] if checkpoint else 0)

    def on_row(step: int, row: dict[str, Any]) -> None:
        memory = memory_bytes(device)
        log.add("train", step, **row, memory_bytes=memory)
        shown = {"loss": row["loss"], "tokens_per_s": row["tokens_per_s"], "memory_bytes": memory}
        reporter.advance(1, **shown)

    if recipe.gradient_checkpointing:
        _checkpoint_activations(model)
    count = steps * recipe.batch_size * recipe.grad_accumulation
    trainer = AdapterTrainer(
        model=model,
        args=_arguments(recipe, output, device),
        train_dataset=BlockSequence(blocks, count, recipe.seed),
        callbacks=[StepCallback(recipe.tokens_per_step, on_row)],
        adapter_name=ADAPTER,
        in_order=True,
        lora_plus_ratio=recipe.lora_plus_ratio,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    model.eval()


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
        ConfigError: the recipe, the data or the output folder cannot work; StateError: the run diverged.
    """
    import fastpeft

    reporter = reporter or Reporter()
    output = Path(output)
    recipe, checkpoint = _prepare_output(recipe, output, resume, overwrite)
    if (output / "summary.json").is_file():
        reporter.note(f"{output} is finished already")
        return json.loads((output / "summary.json").read_text(encoding="utf-8"))
    began = time.perf_counter()
    device = pick_device(recipe.device)
    recipe.dtype = str(pick_dtype(recipe.dtype, device)).removeprefix("torch.")
    write_recipe(recipe, output / "recipe.yaml")

    reporter.phase("preparing", 3)
    quiet_libraries()
    model, tokenizer, facts = frozen_base(recipe, device)
    reporter.advance()
    blocks, held = texts(recipe, tokenizer)
    reporter.advance()
    from transformers import set_seed

    set_seed(recipe.seed)
    fastpeft.attach(model, adapter_config(recipe), name=ADAPTER)
    facts["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    reporter.advance()

    log = MetricsLog(output / "metrics.jsonl", checkpoint[1] if checkpoint else None)
    if not log.of("heldout"):
        with fastpeft.disabled(model):
            loss, count = measure_heldout(
                model, held, recipe.seq_len, reporter, "held-out loss before"
            )
        log.add("heldout", 0, loss=loss, tokens=count)
    _fit(model, blocks, recipe, output, checkpoint, log, reporter)
    fastpeft.save_adapter(model, output / "adapter", name=ADAPTER)
    loss, count = measure_heldout(model, held, recipe.seq_len, reporter, "held-out loss after")
    log.add("heldout", recipe.steps or 1, loss=loss, tokens=count)
    reporter.close()
    facts |= {"device": _device_name(device), "seconds": time.perf_counter() - began}
    summary = _summary(recipe, log, facts, memory_bytes(device))
    _finish(recipe, output, log, summary)
    return summary


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _summary(recipe: Recipe, log: MetricsLog, facts: dict[str, Any], memory: int) -> dict[str, Any]:
    rows, held = log.of("train"), log.of("heldout")
    seconds = sum(row["seconds"] for row in rows)
    return {
        "model": recipe.model,
        "method": recipe.method,
        "format": recipe.format,
        "dtype": recipe.dtype,
        "heldout": recipe.heldout or f"last {recipe.heldout_fraction:.0%} of the data",
        "heldout_tokens": held[-1]["tokens"],
        "loss_before": held[0]["loss"],
        "loss_after": held[-1]["loss"],
        **facts,
        "steps": recipe.steps,
        "tokens": rows[-1]["tokens"],
        "train_seconds": seconds,
        "tokens_per_s": rows[-1]["tokens"] / seconds,
        "memory_bytes": memory,
    }


def _finish(recipe: Recipe, output: Path, log: MetricsLog, summary: dict[str, Any]) -> None:
    log.add("summary", recipe.steps or 1, **summary)
    title = f"{recipe.method} on {recipe.model} ({recipe.format}), {summary['device']}"
    draw(log.rows, output / "loss.png", title)
    text = json.dumps(summary, indent=2) + "\n"
    (output / "summary.json").write_text(text, encoding="utf-8")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def open_run(
    run: str | Path, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Recipe]:
    """The model of a run: its base, quantised again, with the saved adapter.

    Args:
        run: folder with recipe.yaml and adapter/.
        device: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: no run there, or one without an adapter yet.
    """
    import fastpeft

    run = Path(run)
    for name in ("recipe.yaml", "adapter/adapter_config.json"):
        if not (run / name).is_file():
            raise refuse(
                ConfigError,
                "run",
                f"{run} without {name}",
                "the folder of a finished run",
                "Correct the path, or finish it with: fastpeft train --resume --output PATH",
            )
    recipe = resolve(load_recipe(run / "recipe.yaml"))
    quiet_libraries()
    model, tokenizer, _ = frozen_base(recipe, pick_device(device))
    fastpeft.load_adapter(model, run / "adapter", name=ADAPTER)
    model.eval()
    return model, tokenizer, recipe


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
    reporter.phase("preparing", 2)
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
    loss, count = measure_heldout(model, held, recipe.seq_len, reporter, "held-out loss again")
    reporter.close()
    expected = summary["loss_after"]
    return {
        "loss": loss,
        "expected": expected,
        "difference": abs(loss - expected),
        "tokens": count,
        "opened": (model, tokenizer, recipe),
    }
