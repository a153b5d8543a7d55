"""The training itself, by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .blocks import BlockSequence
from .memory import memory_bytes
from .metrics import MetricsLog
from .model import ADAPTER
from .recipe import Recipe
from .reporter import Reporter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
    # With several visible GPUs the Trainer would use DataParallel, which copies the base each step.
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


def fit(
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
