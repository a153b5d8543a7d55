"""What a run tells while it works. The command line draws it; a library user may ignore it."""

from __future__ import annotations


class Reporter:
    """Receives progress; this base says nothing. One phase is open at a time."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A phase of `total` units begins (steps, blocks); `done` of them are behind already."""

    def advance(self, units: int = 1, **values: float) -> None:
        """`units` more are done; values are shown: loss, tokens_per_s, memory_bytes."""

    def note(self, text: str) -> None:
        """One line that stays on the screen."""

    def close(self) -> None:
        """The last phase is over."""
