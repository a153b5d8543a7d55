"""metrics.jsonl: one JSON row per event, flushed at once: a kill costs at most the last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Appends rows: {"kind": "train" | "heldout" | "summary", "step": ..., ...}.

    Args:
        path: the file.
        keep_until: step of the checkpoint that the run continues from; later rows are dropped, as
            those steps are done again. None: start empty.
    """

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        self.rows = [
            row
            for row in (read_rows(path) if keep_until is not None else [])
            if row.get("step", 0) <= (keep_until or 0) and row.get("kind") != "summary"
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self._path = path

    def add(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Appends a row and returns it."""
        row = {"kind": kind, "step": step, **values}
        self.rows.append(row)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]
