"""`fastpeft compare`: every method on one model and one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .show import as_bytes, as_json, as_seconds

COLUMNS = (
    "method",
    "base",
    "trainable",
    "share",
    "adapter file",
    "peak memory",
    "tokens/s",
    "loss before",
    "loss after",
    "change",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the comparison for people, in the order of COLUMNS."""
    trains = row["trainable"] > 0
    return [
        row["name"] if trains else f"{row['name']}, quantised only",
        "dense" if row["format"] == "none" else row["format"],
        f"{row['trainable']:,}",
        f"{row['share']:.3%}" if trains else "",
        as_bytes(row["adapter_bytes"]) if trains else "",
        as_bytes(row["memory_bytes"]),
        f"{row['tokens_per_s']:.0f}" if trains else "",
        f"{row['loss_before']:.4f}",
        f"{row['loss_after']:.4f}",
        f"{row['loss_after'] - row['loss_before']:+.4f}",
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """A table that is Markdown too, never cut to the width of a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console = Console(highlight=False, markup=False)
    # written line by line, as a console pads and folds at the width of the terminal
    wide = console.render_lines(table, console.options.update(width=200), pad=False)
    for line in wide:
        if text := "".join(segment.text for segment in line).strip():
            print(text)


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path(
        "runs/compare"
    ),
    methods: Annotated[
        str | None, typer.Option(help="Rows, such as lora,qlora,prefix; all if left out.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, or smollm2.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text to train on, as for train; may be repeated.")
    ] = None,
    heldout: Annotated[
        list[str] | None, typer.Option(help="Text to measure on, never trained on.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each method.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks a step.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a block.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Rows as JSON.")] = False,
) -> None:
    """Train every method on the same text: table, JSON and plot. Finished rows are kept."""
    from fastpeft.train.compare import compare

    from .progress import Bar

    changes = {
        "model": model,
        "data": data or None,
        "heldout": heldout or None,
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "seed": seed,
        "dtype": dtype,
        "device": device,
    }
    with Bar() as bar:
        rows = compare(output, methods.split(",") if methods else None, changes, bar)
    if json_output:
        as_json(rows)
        return
    print(f"{rows[0]['device']}, {rows[0]['dtype']}, losses in nats a token\n")
    print_table(rows)
    total = as_seconds(sum(row["seconds"] for row in rows))
    print(f"\nall rows together: {total}")
    print(f"written: {output / 'comparison.json'}, {output / 'comparison.png'}")
