"""`fastpeft plan`."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

import typer

from fastpeft.errors import ConfigError, LibraryError, refuse

from .show import as_bytes, as_json, table

OLDEST_KNOWN_SMS = 108  # of an architecture that no card of the table has: an A100's


def command(
    m: Annotated[int, typer.Argument(metavar="M", help="Tokens.")],
    n: Annotated[int, typer.Argument(metavar="N", help="Out features.")],
    k: Annotated[int, typer.Argument(metavar="K", help="In features.")],
    r: Annotated[int, typer.Option("--r", "--R", help="Rank of the adapter; 0: none.")] = 0,
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
    machine: Annotated[
        str | None, typer.Option(help="Card to plan for and to tell the floor of; else this one's.")
    ] = None,
    double_quant: Annotated[bool, typer.Option(help="Floor: 1 byte a scale, not 4.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Plan as JSON.")] = False,
) -> None:
    """Which kernel, tile and split a quantised linear layer of this size gets, and the time that no
    kernel can beat.
    """
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
    arch, sm_count = _device(_C.MACHINES, machine, arch, sm_count)
    problem = (m, n, k, r, format, blocksize, direction, dtype)
    try:
        plan = _C.plan(*problem, arch, sm_count)
        floor = _C.floor(*problem, machine or _this_card(_C.MACHINES), double_quant)
    except ValueError as error:
        name, _, text = str(error).partition(": ")
        raise ConfigError(
            f"{name}: {text}. Correct this argument; see: fastpeft plan --help"
        ) from error
    if json_output:
        as_json({**plan, "floor": floor})
    else:
        print(plan["text"])
        if arch >= 90 and not _C.build_facts()["sm90a"]:
            print("This build lacks the sm_90a kernels; a build that has them may plan otherwise.")
        table([*_plan_rows(plan), *_floor_rows(floor, dtype)])


def _plan_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What the plan says, without what does not apply."""
    lora = ", the adapter in the same pass" if plan["fuses_lora"] else ""
    rows = [("kernel", plan["kernel"] + lora)]
    for key, value in plan.items():
        if key in ("kernel", "text", "fuses_lora", "workspace_bytes", "predicted_us") or not value:
            continue
        rows.append((key.replace("_", " "), str(value)))
    rows.append(("workspace", as_bytes(plan["workspace_bytes"])))
    if plan.get("predicted_us"):
        rows.append(("predicted", f"{plan['predicted_us']:.1f} us"))
    return rows


def _floor_rows(floor: dict[str, Any], dtype: str) -> list[tuple[str, str]]:
    """Bytes, operations, the time of each, and which binds."""
    card = floor["machine"]
    rates = {"float32": card["tflops_fp32"], "float64": 0.0}
    rate = rates.get(dtype, card["tflops_16bit"])
    binds = "memory" if floor["bound"] == "memory" else "arithmetic"
    memory = f"{floor['bytes'] / 1e6:.4g} MB at {card['read_gbs'] / 1e3:.2f} TB/s"
    compute = f"{floor['flops'] / 1e9:.4g} GFLOP"
    compute += f" at {rate:g} TFLOP/s: {floor['compute_us']:.4g} us" if rate else ": no figure"
    return [
        ("floor", f"{floor['us']:.4g} us on {card['name']}, bound by {binds}"),
        ("  memory", f"{memory}: {floor['memory_us']:.4g} us"),
        ("  arithmetic", f"{compute} in {dtype}"),
        ("  rates", card["source"]),
    ]


def _device(
    machines: list[dict[str, Any]], machine: str | None, arch: int | None, sm_count: int | None
) -> tuple[int, int]:
    """(arch, multiprocessors or threads): as given, else of the named card, else of this one."""
    named = next((card for card in machines if card["name"] == machine), None)
    if named and arch != 0:
        here = (named["arch"], named["sm_count"])
    else:
        here = _this_machine(arch)
    arch = here[0] if arch is None else arch
    if sm_count is None:
        counts = [here, *((card["arch"], card["sm_count"]) for card in machines)]
        sm_count = next((count for known, count in counts if known == arch), OLDEST_KNOWN_SMS)
    return arch, sm_count


def _this_machine(arch: int | None) -> tuple[int, int]:
    """(arch, multiprocessors or threads) of the GPU that torch sees, or of the CPU."""
    import torch

    if arch != 0 and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        count = torch.cuda.get_device_properties(0).multi_processor_count
        return int(os.environ.get("FASTPEFT_ARCH") or major * 10 + minor), count
    return 0, torch.get_num_threads()


def _this_card(machines: list[dict[str, Any]]) -> str:
    """The table's name of the GPU that torch sees; the first of the table where it has none."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [card["name"] for card in machines]
    model = {card: re.search(r"\w*\d+", card).group() for card in known}  # H200, 4090, ...
    return next((card for card in known if model[card] in name), known[0])
