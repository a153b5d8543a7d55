"""Shared ways to print: tables, byte counts, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def as_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def as_seconds(seconds: float) -> str:
    """75 -> "1:15 min"; under a minute "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def table(rows: Iterable[tuple[str, str]], title: str | None = None) -> None:
    """Prints name-value rows; a value is never cut, its further lines stand below its first."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    if title:
        print(title)
    for name, value in rows:
        first, *more = str(value).splitlines() or [""]
        print(f"{name:<{width}}  {first}".rstrip())
        for line in more:
            print(f"{'':<{width}}  {line}".rstrip())


def as_json(value: Any) -> None:
    """Prints JSON for a machine."""
    print(json.dumps(value, indent=2, default=str))
