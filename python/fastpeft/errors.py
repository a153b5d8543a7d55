"""Every error fastpeft raises on purpose.

Each class is also the standard exception a caller would expect, so `except ValueError` keeps
working. Messages name the thing, what was given, what was expected, and what to do.
"""

from __future__ import annotations

import sys


class FastPeftError(Exception):
    """Base of all deliberate fastpeft errors."""


class ConfigError(FastPeftError, ValueError):
    """An option has a value that cannot work (rank 0, unknown bias mode, ...)."""


class FormatError(FastPeftError, ValueError):
    """Quantised data is not what its description says (wrong codebook, wrong number of scales, NaN,
    ...).
    """


class AdapterError(FastPeftError, ValueError):
    """An adapter does not fit: name taken, unknown name, shapes or keys that do not match the
    model.
    """


class StateError(FastPeftError, RuntimeError):
    """The call is fine but not now (merging twice, training a merged layer, quantising what is
    quantised).
    """


class LibraryError(FastPeftError, ImportError):
    """libfastpeft_ops.so is missing or does not load."""


def refuse(
    error: type[FastPeftError], name: str, got: object, expected: str, advice: str
) -> FastPeftError:
    """Builds an error whose text has the four parts every message of this package has.

    Args:
        error: class to build.
        name: the argument, tensor or module at fault.
        got: what was given.
        expected: what would have been right.
        advice: what to do.

    Returns:
        The error; the caller raises it, so that tracebacks end where the check stands.
    """
    return error(f"{name}: got {got}, expected {expected}. {advice}")


def caller_level() -> int:
    """stacklevel for a warnings.warn in the function that asks: the nearest frame outside this
    package, however deep inside it the warning arose.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastpeft"):
        level, frame = level + 1, frame.f_back
    return level
