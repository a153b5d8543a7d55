"""Tables, wins and losses, and the plot, made from rows."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

TIE = 0.03  # closer than this is a tie

Row = dict[str, Any]


def problem_of(row: Row) -> tuple:
    """What two rows must share to be compared: everything but who ran it and how it stores the
    weight.
    """
    keys = ("op", "direction", "M", "N", "K", "R", "D", "dtype", "race")
    return tuple(row.get(key) for key in keys)


def by_problem(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    """problem -> provider -> row."""
    found: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[problem_of(row)][row["provider"]] = row
    return found


def time_of(row: Row) -> float:
    """Kernel time in us, or the step's in ms."""
    return row["us"] if "us" in row else row["ms"]


def table(rows: list[Row]) -> str:
    """One line a problem, a column a provider; in brackets its time over fastpeft's."""
    problems = by_problem(rows)
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = ["problem".ljust(44) + "".join(name.rjust(26) for name in providers)]
    for problem, row_of in problems.items():
        op, direction, M, N, K, R, D, dtype, race = problem
        sizes = [f"M={M}", f"{N}x{K}" if N else f"K={K}"]
        sizes += [f"R={R}"] if R else []
        sizes += [f"D={D}"] if D else []
        line = f"{race or op} {direction or ''} {dtype} {' '.join(sizes)}".ljust(44)
        ours = row_of.get("fastpeft")
        for name in providers:
            row = row_of.get(name)
            if row is None:
                line += "-".rjust(26)
                continue
            ratio = f" ({time_of(row) / time_of(ours):.2f}x)" if ours and row is not ours else ""
            line += (f"{time_of(row):.4g} {'us' if 'us' in row else 'ms'}" + ratio).rjust(26)
        lines.append(line)
    return "\n".join(lines)


def standing(rows: list[Row]) -> str:
    """Wins, ties and losses against each provider and the geometric mean of its time over ours;
    losses by name.
    """
    pairs: dict[str, list[tuple[float, tuple]]] = defaultdict(list)
    for problem, row_of in by_problem(rows).items():
        if "fastpeft" not in row_of:
            continue
        for name, row in row_of.items():
            if name != "fastpeft":
                pairs[name].append((time_of(row) / time_of(row_of["fastpeft"]), problem))
    lines = []
    for name, ratios in pairs.items():
        wins = sum(r > 1 + TIE for r, _ in ratios)
        losses = sorted((r, p) for r, p in ratios if r < 1 - TIE)
        mean = math.exp(sum(math.log(r) for r, _ in ratios) / len(ratios))
        ties = len(ratios) - wins - len(losses)
        lines.append(
            f"against {name}: {wins} wins, {ties} ties, {len(losses)} losses; "
            f"geometric mean of its time over ours {mean:.3f}"
        )
        for ratio, problem in losses[:10]:
            op, direction, M, N, K, R, D, dtype, race = problem
            where = f"{race or op} {direction or ''} M={M} N={N} K={K} R={R} D={D} {dtype}"
            lines.append(f"    loss {ratio:.3f}: {where}")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, gbs: float, tflops: float, cases: dict[tuple, Any]) -> None:
    """Time over M, a panel for every layer, with the floor of this machine: the larger of bytes /
    copy speed and operations / matmul speed.

    cases: problem -> object with bytes(direction) and flops(direction).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    floors: dict[tuple, dict[int, float]] = defaultdict(dict)
    for problem, row_of in by_problem(rows).items():
        _, direction, M, N, K, R, _, dtype, race = problem
        key = (f"{race} {direction}", N, K, R or 0, dtype)
        for name, row in row_of.items():
            panels[key][name].append((M, time_of(row)))
        case = cases[problem]
        floors[key][M] = max(
            case.bytes(direction) / gbs / 1e3, case.flops(direction) / tflops / 1e6
        )
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 4 * lines), squeeze=False)
    for axis, (key, series) in zip(axes.flat, panels.items(), strict=False):
        for name, points in series.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        floor = sorted(floors[key].items())
        axis.plot(*zip(*floor, strict=True), "k--", linewidth=1, label="floor")
        axis.set(xscale="log", yscale="log", xlabel="M (tokens)", ylabel="us")
        axis.set_title(f"{key[0]} N={key[1]} K={key[2]} R={key[3]} {key[4]}", fontsize=9)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
