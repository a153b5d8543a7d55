"""`fastpeft quantize`: a model folder -> a quantised one, and what that cost in every layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .options import Device, JsonResult, Overwrite, StoredDtype
from .show import as_bytes, as_json, as_seconds, table


def error_table(errors: dict[str, Any]) -> Table:
    """A row a layer: relative error, largest error, bytes before and after."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("layer", no_wrap=True)
    for title in ("relative error", "largest error", "before", "after"):
        grid.add_column(title, justify="right", no_wrap=True)
    for name, error in errors.items():
        grid.add_row(
            name,
            f"{error.relative:.3e}",
            f"{error.largest:.3e}",
            as_bytes(error.bytes_before),
            as_bytes(error.bytes_after),
        )
    return grid


def summary_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The whole model's lines below the table."""
    errors = result["errors"]
    worst = max(errors, key=lambda name: errors[name].relative)
    mean = sum(error.relative for error in errors.values()) / len(errors)
    now, then = as_bytes(result["bytes_after"]), as_bytes(result["bytes_before"])
    rows = [
        ("layers", f"{len(errors)} in {result['format']}"),
        ("mean relative error", f"{mean:.3e}"),
        ("largest relative error", f"{errors[worst].relative:.3e}  {worst}"),
    ]
    rows += [(f"left dense: {name}", why) for name, why in result["skipped"].items()]
    rows.append(("in memory", f"{then} -> {now}"))
    if result["loss_before"] is not None:
        change = result["loss_after"] - result["loss_before"]
        rows += [
            ("held-out loss before", f"{result['loss_before']:.4f} nats a token"),
            ("held-out loss after", f"{result['loss_after']:.4f} nats a token ({change:+.4f})"),
            ("measured on", f"{result['tokens']:,} tokens"),
        ]
    name = f"{result['output']}, {as_bytes(result['folder_bytes'])}"
    rows.append(("written", f"{name}, as {result['save_as']}"))
    rows.append(("time", as_seconds(result["seconds"])))
    return rows


def command(
    model: Annotated[str, typer.Argument(help="Folder of a dense model, or smollm2.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    format: Annotated[str, typer.Option(help="nf4 or int8.")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="nf4: weights that share a scale.")] = 64,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="nf4: quantise the scales too.")
    ] = True,
    threshold: Annotated[
        float, typer.Option(help="int8: LLM.int8()'s outlier threshold; 0: none.")
    ] = 6.0,
    weight_only: Annotated[
        bool, typer.Option("--weight-only", help="int8: activations stay as they are.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="Module to leave dense; may be repeated.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Held-out source: its loss before and after; may be repeated."),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Context of that measurement.")] = 512,
    save_as: Annotated[
        str, typer.Option(help="bitsandbytes, fastpeft, or auto: the first that can say it.")
    ] = "auto",
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    json_output: JsonResult = False,
) -> None:
    """Quantise a model folder; show the error of every layer."""
    from fastpeft.train.base import pick_device
    from fastpeft.train.folders import quantize_folder

    from .progress import Bar

    with Bar() as bar:
        result = quantize_folder(
            model,
            output,
            format,
            text=text or (),
            seq_len=seq_len,
            save_as=save_as,
            dtype=dtype,
            device=pick_device(device),
            overwrite=overwrite,
            reporter=bar,
            blocksize=blocksize,
            double_quant=double_quant,
            threshold=None if weight_only else threshold,
            skip=("lm_head", *(skip or ())),
        )
    if json_output:
        errors = {name: dataclasses.asdict(e) for name, e in result["errors"].items()}
        as_json({**result, "errors": errors})
        return
    grid, console = error_table(result["errors"]), Console(highlight=False, markup=False)
    # Never cut a name short, however narrow the terminal.
    console.print(grid, width=max(console.width, console.measure(grid).maximum))
    table(summary_rows(result), title="")
