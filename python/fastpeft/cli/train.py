"""`fastpeft train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastpeft.errors import ConfigError, refuse

from .show import as_bytes, as_json, as_seconds, table

WRITTEN = ("adapter/", "metrics.jsonl", "loss.png", "recipe.yaml", "summary.json")


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """["warmup_steps=4"] -> {"warmup_steps": 4}; values are YAML.

    Raises:
        ConfigError: an entry without "=".
    """
    import yaml

    entries = {}
    for item in settings:
        name, equals, value = item.partition("=")
        if not equals:
            raise refuse(
                ConfigError, "--set", repr(item), "name=value", "Write e.g. --set warmup_steps=4"
            )
        entries[name.strip()] = yaml.safe_load(value)
    return entries


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A run's summary for people."""
    from fastpeft.train.method import plan_text

    total = summary["parameters"]
    if summary["method"] != "full":
        total += summary["trainable"]
    fall = summary["loss_before"] - summary["loss_after"]
    held = f"{summary['heldout']}, {summary['heldout_tokens']} tokens"
    rows = [
        ("model", f"{summary['model']}, {summary['format']}, {summary['dtype']}"),
        ("device", summary["device"]),
        ("trained on", summary["data"]),
        ("held-out text", held),
    ]
    if summary["loss_dense"] is not None:
        rows.append(("held-out loss, dense base", f"{summary['loss_dense']:.4f} nats a token"))
    rows += [
        ("held-out loss before", f"{summary['loss_before']:.4f} nats a token"),
        ("held-out loss after", f"{summary['loss_after']:.4f} nats a token ({-fall:+.4f})"),
        (
            "trainable parameters",
            f"{summary['trainable']:,} of {total:,} ({summary['trainable'] / total:.2%})",
        ),
        ("base, dense, 16 bits", as_bytes(summary["dense_bytes"])),
        ("base in memory", f"{as_bytes(summary['base_bytes'])} ({summary['format']})"),
    ]
    if "layer_bytes" in summary:
        before, now = as_bytes(summary["layer_dense_bytes"]), as_bytes(summary["layer_bytes"])
        rows.append(("of it, quantised layers", f"{before} in 16 bits -> {now}"))
    return rows + [
        ("optimizer", plan_text(summary)),
        ("training", f"{summary['steps']} steps, {summary['tokens']:,} tokens"),
        ("training speed", f"{summary['tokens_per_s']:.1f} tokens/s"),
        ("training time", as_seconds(summary["train_seconds"])),
        ("whole run", as_seconds(summary["seconds"])),
        ("peak memory", as_bytes(summary["memory_bytes"])),
    ]


def command(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML file, or a recipe of the package: demo.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, or smollm2.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, .jsonl, .parquet, sqlite:FILE#QUERY or kjv:BOOKS; may be repeated."
        ),
    ] = None,
    heldout: Annotated[
        list[str] | None, typer.Option(help="Source to measure on, never trained on.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora, prefix, prompt, ia3, bottleneck or full.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="nf4, int8 or none.")] = None,
    r: Annotated[int | None, typer.Option(help="Rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(help="lora_dropout.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="all-linear, or names: q_proj,v_proj.")
    ] = None,
    virtual_tokens: Annotated[
        int | None, typer.Option(help="Length of a prefix or prompt.")
    ] = None,
    projection: Annotated[
        bool | None, typer.Option("--projection/--no-projection", help="A prefix made by an MLP.")
    ] = None,
    bottleneck: Annotated[
        str | None,
        typer.Option(help="pfeiffer, houlsby, parallel or between_attention_and_ffn."),
    ] = None,
    reduction_factor: Annotated[
        float | None, typer.Option(help="Hidden size / width of a bottleneck.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Of full: adamw or adamw_8bit.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, instead.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks a step.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a block.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory."),
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other entry of a recipe: warmup_steps=4."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a killed run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Summary as JSON.")] = False,
) -> None:
    """Train an adapter on text; write adapter, metrics.jsonl, loss.png and recipe.yaml."""
    from fastpeft.train import load_recipe, resolve, train

    from .progress import Bar

    target = None
    if targets is not None:
        target = targets.split(",") if "," in targets else targets
        target = [target] if isinstance(target, str) and target.isidentifier() else target
    flags = {
        "model": model,
        "data": data or None,
        "heldout": heldout or None,
        "method": method,
        "format": format,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": target,
        "num_virtual_tokens": virtual_tokens,
        "projection": projection,
        "bottleneck": bottleneck,
        "reduction_factor": reduction_factor,
        "optimizer": optimizer,
        "steps": steps,
        "tokens": tokens,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "lr": lr,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "gradient_checkpointing": gradient_checkpointing,
        "save_every": save_every,
    }
    layers = [load_recipe(recipe)] if recipe else []
    if output is None:
        output = Path("runs") / (Path(recipe).stem if recipe else "run")
    if resume and (output / "recipe.yaml").is_file():
        layers.insert(0, load_recipe(output / "recipe.yaml"))
    resolved = resolve(*layers, flags, parse_settings(settings or []))
    with Bar() as bar:
        summary = train(resolved, output, resume=resume, overwrite=overwrite, reporter=bar)
    if json_output:
        as_json(summary)
        return
    table(summary_rows(summary), title=f"\n{output}")
    print(f"written: {', '.join(str(output / name) for name in WRITTEN)}")
