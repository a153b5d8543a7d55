"""`fastpeft inspect`: what is in this folder, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastpeft.errors import ConfigError, refuse

from .show import as_bytes, as_json, table


def _ranges(values: dict[int, int]) -> str:
    return ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(values.items()))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("kind", facts["kind"]), ("folder", facts["path"])]
    rows += [(name, str(value)) for name, value in facts["config"].items()]
    if facts.get("ranks"):
        rows.append(("ranks", _ranges(facts["ranks"])))
    if facts.get("targets"):
        rows.append(("targets", ", ".join(f"{n} x{c}" for n, c in facts["targets"].items())))
    rows.append(("tensors", f"{facts['tensors']}, {facts['parameters']:,} elements"))
    kinds = [f"{name} {as_bytes(size)}" for name, size in facts["bytes_by_dtype"].items()]
    rows.append(("bytes", f"{as_bytes(facts['bytes'])}: {', '.join(kinds)}"))
    return rows


def command(
    path: Annotated[Path, typer.Argument(help="Folder of an adapter, a checkpoint or a run.")],
    json_output: Annotated[bool, typer.Option("--json", help="Facts as JSON.")] = False,
) -> None:
    """Show method, ranks, targets, bytes and problems of a folder."""
    from .contents import look

    if not path.is_dir():
        got = "a file" if path.is_file() else "nothing"
        raise refuse(ConfigError, str(path), got, "a folder", "Give the folder, not a file in it.")
    facts = look(path)
    if json_output:
        as_json(facts)
    else:
        table(_rows(facts))
        for problem in facts["problems"]:
            print(f"problem: {problem}")
        if not facts["problems"]:
            print("no problem found")
    if facts["problems"]:
        raise typer.Exit(1)
