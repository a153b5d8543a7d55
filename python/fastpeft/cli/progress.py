"""One dense progress bar on a terminal; elsewhere (logs, CI) a line now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastpeft.train.reporter import Reporter

from .show import as_bytes, as_seconds

LINE_SECONDS = 20.0


def values_text(values: dict[str, float]) -> str:
    """{"loss": 3.21, "tokens_per_s": 120.0, ...} -> "loss 3.2100, 120 tokens/s, 1.00 GiB"."""
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4f}")
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:.0f} tokens/s")
    if "memory_bytes" in values:
        parts.append(as_bytes(values["memory_bytes"]))
    return ", ".join(parts)


class Bar(Reporter):
    """Draws what a run tells. A finished phase leaves one line; the open one is the bar.

    Use as a context manager, so that the terminal is left in order whatever happens.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, markup=False)
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._name = ""
        self._total = self._done = 0
        self._values: dict[str, float] = {}
        self._begin = self._said = 0.0
        self._task = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def _line(self) -> str:
        values = values_text(self._values)
        count = f"{self._done}/{self._total}"
        spent = as_seconds(time.perf_counter() - self._begin)
        return f"{self._name:<20} {count:>9}  {spent:>9}  {values}"

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Closes the phase before and opens this one."""
        self.close()
        self._name, self._total, self._done = name, total, done
        self._values = {}
        self._begin = self._said = time.perf_counter()
        self._task = self._progress.add_task(name, total=total, completed=done, values="")

    def advance(self, units: int = 1, **values: float) -> None:
        """Moves the bar; without a terminal prints a line when the last one is long ago."""
        self._done += units
        self._values = values
        self._progress.update(self._task, advance=units, values=values_text(values))
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._said > LINE_SECONDS:
            self._said = now
            self._console.print(self._line(), soft_wrap=True)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Leaves the line of the open phase."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._console.print(self._line(), soft_wrap=True)
            self._task = None
