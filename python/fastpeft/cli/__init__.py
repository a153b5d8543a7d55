"""The command line. The only part of the package that prints.

A command is one module with a function `command`; COMMANDS lists them. Errors leave as two lines,
what and what to do, and as an exit code: 0 done, 1 the work failed, 2 the input was wrong.
"""

from __future__ import annotations

import importlib
import sys

import typer

from .errors import report

COMMANDS = (
    "train",
    "evaluate",
    "quantize",
    "merge",
    "generate",
    "compare",
    "inspect",
    "doctor",
    "plan",
    "bench",
)

app = typer.Typer(
    name="fastpeft",
    help="Fine-tune large models on frozen, quantised weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name in COMMANDS:
    _module = importlib.import_module(f"fastpeft.cli.{_name}")
    app.command(_name, context_settings=getattr(_module, "SETTINGS", None))(_module.command)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits with its code.

    Args:
        arguments: words after the program's name; None: of this process.
    """
    try:
        code = app(arguments, prog_name="fastpeft", standalone_mode=False)
    except BaseException as error:
        code = report(error)
    sys.exit(code if isinstance(code, int) else 0)
