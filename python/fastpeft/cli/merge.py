"""`fastpeft merge`: base + adapter -> a plain model folder, dense or quantised again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, JsonResult, Overwrite, StoredDtype
from .show import as_bytes, as_json, as_seconds, table


def command(
    base: Annotated[str, typer.Argument(help="Model folder, dense or quantised, or smollm2.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    format: Annotated[
        str,
        typer.Option(help="nf4 or int8: quantise a dense base first, as in training; or none."),
    ] = "none",
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Write quantised layers, not dense ones.")
    ] = False,
    save_as: Annotated[
        str, typer.Option(help="With --requantize: bitsandbytes, fastpeft or auto.")
    ] = "auto",
    dtype: StoredDtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    json_output: JsonResult = False,
) -> None:
    """Fold an adapter into its base; show how far the stored weights are from the exact sum."""
    from fastpeft.train.base import pick_device
    from fastpeft.train.folders import merge_folder

    result = merge_folder(
        base,
        adapter,
        output,
        format=format,
        requantize=requantize,
        save_as=save_as,
        dtype=dtype,
        device=pick_device(device),
        overwrite=overwrite,
    )
    if json_output:
        as_json(result)
        return
    errors = result["errors"]
    worst = max(errors, key=errors.__getitem__)
    table(
        [
            ("merged", f"{adapter} into {len(errors)} layers of {result['base']}"),
            ("mean relative error", f"{sum(errors.values()) / len(errors):.3e}"),
            ("largest relative error", f"{errors[worst]:.3e}  {worst}"),
            ("written", f"{output}, {as_bytes(result['folder_bytes'])}, {result['save_as']}"),
            ("time", as_seconds(result["seconds"])),
        ]
    )
