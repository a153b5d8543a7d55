"""Any exception -> two lines on stderr and an exit code."""

from __future__ import annotations

import os
import re
import sys
import traceback

from fastpeft.errors import AdapterError, ConfigError, FastPeftError, FormatError

DONE, FAILED, BAD_INPUT = 0, 1, 2
TRACEBACK = "FASTPEFT_TRACEBACK"


def split_message(text: str) -> tuple[str, str]:
    """Message of `fastpeft.errors.refuse` -> what is wrong, what to do ("" if it says nothing)."""
    text = " ".join(text.split())
    found = re.search(r", expected .*?[^.\s]\. (?=\S)", text) or re.search(r"\. (?=[A-Z])", text)
    return (text[: found.end()].rstrip(". "), text[found.end() :]) if found else (text, "")


def explain(error: BaseException) -> tuple[str, str, int]:
    """What happened, what to do, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return (
            "stopped",
            "Continue a training run with: fastpeft train --resume --output PATH",
            FAILED,
        )
    if isinstance(error, FastPeftError):
        what, todo = split_message(str(error))
        wrong_input = isinstance(error, ConfigError | FormatError | AdapterError)
        return what, todo or "See: fastpeft doctor", BAD_INPUT if wrong_input else FAILED
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "fastpeft"
        return error.format_message(), f"See: {command} --help", BAD_INPUT
    name = type(error).__name__
    if name == "OutOfMemoryError":
        todo = "Try a smaller --batch-size or --seq-len, or add --gradient-checkpointing"
        return f"{name}: {str(error).splitlines()[0]}", todo, FAILED
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename}: {error.strerror}",
            "Check the path and its permissions",
            BAD_INPUT,
        )
    text = " ".join(str(error).split())
    todo = f"If the input is right, see: fastpeft doctor; {TRACEBACK}=1 shows where it happened"
    return f"{name}: {text[:500]}", todo, FAILED


def report(error: BaseException) -> int:
    """Prints the two lines (if FASTPEFT_TRACEBACK is set, the traceback first); returns code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    what, todo, code = explain(error)
    print(f"error: {what}\nfix: {todo}", file=sys.stderr)
    return code
