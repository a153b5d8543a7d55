"""`fastpeft generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastpeft.errors import ConfigError, refuse

from .options import Device
from .show import as_json


def open_model(
    path: str, adapter: Path | None, format: str | None, dtype: str, device: str
) -> tuple[Any, Any]:
    """Model and tokenizer: of a run's folder, or of a base, dense or quantised, with an optional
    adapter."""
    from fastpeft.train.base import pick_device, pick_dtype
    from fastpeft.train.folders import open_quantized, quantized_format
    from fastpeft.train.model import frozen_base, open_run
    from fastpeft.train.recipe import FORMATS, Recipe

    if (Path(path) / "recipe.yaml").is_file():
        model, tokenizer, _ = open_run(path, device)
        return model, tokenizer
    if format is not None and format not in FORMATS:
        raise refuse(
            ConfigError, "--format", repr(format), " or ".join(FORMATS), "Choose one of these."
        )
    place = pick_device(device)
    kind = str(pick_dtype(dtype, place)).removeprefix("torch.")
    there = quantized_format(path)
    if there is None:
        recipe = Recipe(model=path, format=format or "nf4", dtype=kind)
        model, tokenizer = frozen_base(recipe, place)
    elif format not in (None, there):
        advice = "Leave --format out: the folder is quantised already."
        raise refuse(ConfigError, "--format", repr(format), repr(there), advice)
    else:
        model, tokenizer = open_quantized(path, kind, place)
    if adapter is not None:
        import fastpeft

        fastpeft.load_adapter(model, adapter)
        model.eval()
    return model, tokenizer


def compare(model: Any, tokenizer: Any, prompt: str, **options: Any) -> dict[str, str]:
    """The prompt continued by the bare base and by base + adapter."""
    import fastpeft
    from fastpeft.train.generate import continue_text

    with fastpeft.disabled(model):
        without = continue_text(model, tokenizer, prompt, **options)
    return {
        "without adapter": without,
        "with adapter": continue_text(model, tokenizer, prompt, **options),
    }


def command(
    path: Annotated[str, typer.Argument(help="Folder of a run, model folder, or smollm2.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder for a model folder.")] = None,
    format: Annotated[
        str | None, typer.Option(help="nf4 (default), int8 or none; of a dense base.")
    ] = None,
    both: Annotated[bool, typer.Option("--both", help="With and without the adapter.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Continue a prompt through base + adapter."""
    from fastpeft.train.generate import continue_text

    model, tokenizer = open_model(path, adapter, format, dtype, device)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "chat": chat,
        "seed": seed,
    }
    if both:
        texts = compare(model, tokenizer, prompt, **options)
    else:
        texts = {"text": continue_text(model, tokenizer, prompt, **options)}
    if json_output:
        as_json({"prompt": prompt, **texts})
        return
    for name, text in texts.items():
        print(f"{name}: {prompt}{text}" if both else f"{prompt}{text}")
