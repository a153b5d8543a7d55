"""Finds torch's package folder without importing torch (an import takes seconds)."""

import importlib.util
import os
import sysconfig
from pathlib import Path

_HEADER = "include/torch/csrc/stable/library.h"


def find_torch() -> Path | None:
    """The folder of an installed torch that has the stable ABI headers, or None.

    Order: FASTPEFT_TORCH_DIR; this interpreter's own torch; the outer environment's site-packages,
    which sysconfig still names under pip's build isolation.
    """
    override = os.environ.get("FASTPEFT_TORCH_DIR")
    if override:
        return Path(override) if (Path(override) / _HEADER).is_file() else None
    spec = importlib.util.find_spec("torch")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    return next((folder for folder in folders if (folder / _HEADER).is_file()), None)
