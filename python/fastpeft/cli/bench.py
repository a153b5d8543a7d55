"""`fastpeft bench`: hands its arguments to benchmarks/run.py of the source checkout."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer

from fastpeft.errors import ConfigError, refuse

# Its options, --help included, are those of benchmarks/run.py.
SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def command(context: typer.Context) -> None:
    """Measure kernels against what else is installed; see: fastpeft bench --help."""
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "run.py"
    if not path.is_file():
        raise refuse(
            ConfigError,
            "fastpeft bench",
            f"no {path}",
            "a source checkout",
            "Clone the repository and use: make bench",
        )
    spec = importlib.util.spec_from_file_location("fastpeft_bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    code = module.main(context.args)
    if code:
        raise typer.Exit(int(code))
