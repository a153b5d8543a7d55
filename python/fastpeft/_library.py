"""Finds and loads libfastpeft_ops.so, once. Nothing else in Python touches the file."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

from .errors import LibraryError

LIBRARY_NAME = "libfastpeft_ops.so"
BUILD_COMMAND = "pip install --no-build-isolation -e ."

_lock = threading.Lock()
_loaded: Path | None = None


def library_path() -> Path:
    """Where the library must lie: beside this file."""
    return Path(__file__).resolve().parent / LIBRARY_NAME


def load() -> Path:
    """Loads the operators into torch; later calls return at once.

    Returns:
        The path of the loaded file.

    Raises:
        LibraryError: the file is missing or torch refuses it; the message holds the command that
            mends it.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            path = library_path()
            if not path.exists():
                raise LibraryError(
                    f"{LIBRARY_NAME}: got no file at {path}, expected the built operators. "
                    f"Build them with: {BUILD_COMMAND}"
                )
            # The library has no RPATH: it uses the torch that is already in the process.
            import torch

            try:
                torch.ops.load_library(str(path))
            except (OSError, RuntimeError) as error:
                raise LibraryError(
                    f"{LIBRARY_NAME}: torch {torch.__version__} does not load {path}: {error}. "
                    f"fastpeft needs torch >= 2.11; rebuild with: {BUILD_COMMAND}"
                ) from error
            _loaded = path
        return _loaded


def facts() -> dict[str, Any]:
    """What is built and whether it loads; never raises, for `fastpeft doctor`.

    Returns:
        library (path), exists, loads, error (None or text), mend (the command), bytes, and build:
        the facts that the module `_C` tells (None where `_C` is missing; the operators work without
        it).
    """
    path = library_path()
    result: dict[str, Any] = {
        "library": str(path),
        "exists": path.exists(),
        "bytes": path.stat().st_size if path.exists() else 0,
        "loads": False,
        "error": None,
        "mend": BUILD_COMMAND,
        "build": None,
        "build_error": None,
    }
    try:
        load()
        result["loads"] = True
    except LibraryError as error:
        result["error"] = str(error)
    try:
        result["build"] = dict(importlib.import_module("fastpeft._C").build_facts())
    except (ImportError, AttributeError) as error:
        result["build_error"] = f"{type(error).__name__}: {error}"
    return result
