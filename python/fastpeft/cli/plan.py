"""`fastpeft plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastpeft.errors import ConfigError, LibraryError, refuse

from .show import as_json


def command(
    m: Annotated[int, typer.Argument(metavar="M", help="Tokens.")],
    n: Annotated[int, typer.Argument(metavar="N", help="Out features.")],
    k: Annotated[int, typer.Argument(metavar="K", help="In features.")],
    r: Annotated[int, typer.Option(help="Rank of the adapter; 0: none.")] = 0,
    format: Annotated[str, typer.Option(help="nf4, fp4, int8 or dense.")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="Elements that share a scale.")] = 64,
    direction: Annotated[str, typer.Option(help="fwd or dgrad.")] = "fwd",
    dtype: Annotated[str, typer.Option(help="Of the activations.")] = "bfloat16",
    arch: Annotated[
        int | None, typer.Option(help="Compute capability times 10; 0: CPU; else this machine's.")
    ] = None,
    sm_count: Annotated[
        int | None, typer.Option(help="Multiprocessors, or CPU threads; else this machine's.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Plan as JSON.")] = False,
) -> None:
    """Which kernel, tile and split a quantised linear layer of this size gets."""
    try:
        from fastpeft import _C
    except ImportError as error:
        raise refuse(
            LibraryError,
            "fastpeft._C",
            str(error),
            "the module that knows the plans",
            "Build it for this Python: pip install --no-build-isolation -e .",
        ) from error
    if arch is None or sm_count is None:
        here_arch, here_count = _this_machine(arch)
        arch = here_arch if arch is None else arch
        sm_count = here_count if sm_count is None else sm_count
    try:
        plan = _C.plan(m, n, k, r, format, blocksize, direction, dtype, arch, sm_count)
    except ValueError as error:
        name, _, text = str(error).partition(": ")
        raise ConfigError(
            f"{name}: {text}. Correct this argument; see: fastpeft plan --help"
        ) from error
    if json_output:
        as_json(plan)
    else:
        print(plan["text"])


def _this_machine(arch: int | None) -> tuple[int, int]:
    """(arch, multiprocessors or threads) of the GPU that torch sees, or of the CPU."""
    import torch

    if arch != 0 and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        count = torch.cuda.get_device_properties(0).multi_processor_count
        return major * 10 + minor, count
    return 0, torch.get_num_threads()
