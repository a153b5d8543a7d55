"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
StoredDtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")]
JsonResult = Annotated[bool, typer.Option("--json", help="Result as JSON.")]
