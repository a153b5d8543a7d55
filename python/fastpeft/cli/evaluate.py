"""`fastpeft evaluate`: does a run's folder, opened by a fresh process, give the loss it claims?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, JsonResult
from .show import as_json, table


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Also continue this, with and without.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 48,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Allowed difference, nats.")] = 1e-4,
    device: Device = "auto",
    json_output: JsonResult = False,
) -> None:
    """Reload a run's base and adapter, measure the held-out loss again, compare it."""
    from fastpeft.errors import StateError, refuse
    from fastpeft.train import evaluate_run

    from .generate import compare
    from .progress import Bar

    with Bar() as bar:
        result = evaluate_run(run, device, bar)
    model, tokenizer, _ = result.pop("opened")
    texts = compare(model, tokenizer, prompt, max_new_tokens=max_new_tokens) if prompt else {}
    if json_output:
        as_json({**result, **texts})
    else:
        rows = [
            ("held-out loss reloaded", f"{result['loss']:.6f} nats a token"),
            ("as the run measured it", f"{result['expected']:.6f}"),
            ("difference", f"{result['difference']:.1e} (allowed {tolerance:.0e})"),
        ]
        rows += [(name, f"{prompt}{text}") for name, text in texts.items()]
        table(rows, title=f"\n{run}, in a fresh process")
    if not result["difference"] <= tolerance:
        raise refuse(
            StateError,
            "held-out loss",
            f"{result['loss']:.6f}",
            f"{result['expected']:.6f} within {tolerance:.0e}",
            "Evaluate on the kind of device the run used; else files were changed since.",
        )
