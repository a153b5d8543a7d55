"""Bridges to transformers. Importing this package imports none of it: names are loaded on use."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that holds it.
_EXPORTS = {
    "AdapterTrainer": "fastpeft.hf.trainer",
    "FastPeftConfig": "fastpeft.hf.config",
    "from_bitsandbytes": "fastpeft.hf.bnb",
    "load_model": "fastpeft.hf.folder",
    "save_quantized": "fastpeft.hf.folder",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastpeft.hf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
