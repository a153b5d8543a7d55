"""`fastpeft doctor`: what is built, what is wrong, and the one command that mends it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .diagnosis import VARIABLES, diagnose
from .show import as_bytes, as_json, table


def _release(target: str | None) -> str:
    """The stable ABI's target "0x020b000000000000ULL" -> "2.11"."""
    digits = (target or "").removeprefix("0x")
    return f"{int(digits[:2], 16)}.{int(digits[2:4], 16)}" if len(digits) >= 4 else "unknown"


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    library, build = facts["library"], facts["library"].get("build") or {}
    torch = facts["torch"]
    state = "loads" if library.get("loads") else "DOES NOT LOAD"
    rows = [
        ("fastpeft", f"{facts['fastpeft']}, Python {facts['python']}, {facts['platform']}"),
        (
            "torch",
            f"{torch['version']}, CUDA {torch['cuda'] or 'no'}" if torch["version"] else "none",
        ),
        ("library", f"{state}, {as_bytes(library.get('bytes', 0))}, {library.get('path')}"),
    ]
    if build:
        kernels = f"CPU and CUDA ({build.get('cuda_archs')})" if build.get("cuda") else "CPU only"
        rows.append(("built", f"{kernels}, for torch from {_release(build.get('torch_target'))}"))
    rows.append(("CPU", f"{facts['cpu']['name']}, kernels use {build.get('cpu_isa', 'unknown')}"))
    for gpu in facts["gpus"]:
        covered = {True: "covered by the build", False: "NOT in the build", None: "unknown"}
        rows.append(
            (
                f"GPU {gpu['index']}",
                f"{gpu['name']}, compute capability {gpu['capability']}, driver {gpu['driver']}, "
                f"{covered[gpu['covered']]}",
            )
        )
    if not facts["gpus"]:
        rows.append(("GPU", "none found"))
    if facts["launch"]["dependent_launch"] is not None:
        on = "on" if facts["launch"]["dependent_launch"] else "off"
        rows.append(("launches", f"dependent launch {on} (from compute capability 9.0)"))
    for name, value in facts["launch"]["variables"].items():
        rows.append((name, f"{value}  ({VARIABLES[name]})"))
    for name, result in facts["self_test"].items():
        rows.append((f"self test, {name}", result))
    present = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    missing = [name for name, version in facts["packages"].items() if not version]
    rows.append(("packages", ", ".join(present) or "none"))
    rows.append(("not installed", ", ".join(missing) or "nothing"))
    return rows


def command(
    json_output: Annotated[bool, typer.Option("--json", help="Facts as JSON.")] = False,
) -> None:
    """Show what is built and what is wrong, with the command that mends it."""
    facts = diagnose()
    if json_output:
        as_json(facts)
    else:
        table(_rows(facts))
        for problem in facts["problems"]:
            print(f"\nproblem: {problem['what']}\nfix: {problem['fix']}")
        for hint in facts["hints"]:
            print(f"\nhint: {hint['what']}\nfix: {hint['fix']}")
        if not facts["problems"]:
            print("\nno problem found")
    if facts["problems"]:
        raise typer.Exit(1)
