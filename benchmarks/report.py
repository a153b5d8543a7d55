"""Tables, wins and losses, and the plot, made from rows.

`python benchmarks/report.py ROWS.jsonl [--commit C]`: the standing of the rows in a
file, as Markdown for results/README.md: a line a race and peer, then every loss by name.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TIE = 0.03  # closer than this is a tie
NATIVE = "torch-free program"  # in the note of a row that raced nobody
AS_ARCH = "kernels of sm_"  # in the note of a row that ran with FASTPEFT_ARCH

Row = dict[str, Any]


def problem_of(row: Row) -> tuple:
    """What two rows must share to be compared: everything but who ran it and how it stores the
    weight.
    """
    keys = ("op", "direction", "M", "N", "K", "R", "D", "dtype", "race")
    return tuple(row.get(key) for key in keys)


def name_of(row: Row) -> str:
    """The provider; "fastpeft pdl" with dependent launch."""
    return f"{row['provider']} pdl" if row.get("pdl") else row["provider"]


def by_problem(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    """problem -> name -> row."""
    found: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[problem_of(row)][name_of(row)] = row
    return found


def time_of(row: Row) -> float:
    """Kernel time in us, or the step's in ms."""
    return row["us"] if "us" in row else row["ms"]


def share_of(row: Row) -> float | None:
    """Of the roof: the floor's time over the row's; None without a floor."""
    return row["floor_us"] / row["us"] if row.get("floor_us") and "us" in row else None


def table(rows: list[Row]) -> str:
    """One line a problem, a column a provider; in brackets its time over fastpeft's, for fastpeft
    its share of the roof.
    """
    problems = by_problem(rows)
    names = list(dict.fromkeys(name_of(row) for row in rows))
    has_floor = any(row.get("floor_us") for row in rows)
    head = "problem".ljust(44) + ("floor".rjust(12) if has_floor else "")
    lines = [head + "".join(name.rjust(26) for name in names)]
    for problem, row_of in problems.items():
        line = _problem_text(problem).ljust(44)
        if has_floor:
            floor = next(iter(row_of.values())).get("floor_us")
            line += (f"{floor:.4g} us" if floor else "-").rjust(12)
        ours = row_of.get("fastpeft")
        for name in names:
            row = row_of.get(name)
            if row is None:
                line += "-".rjust(26)
                continue
            extra, share = "", share_of(row)
            if ours and row is not ours:
                extra = f" ({time_of(row) / time_of(ours):.2f}x)"
            elif share:
                extra = f" ({100 * share:.0f} %)"
            line += (f"{time_of(row):.4g} {'us' if 'us' in row else 'ms'}" + extra).rjust(26)
        lines.append(line)
    return "\n".join(lines)


def _problem_text(problem: tuple) -> str:
    op, direction, M, N, K, R, D, dtype, race = problem
    sizes = [f"M={M}", f"{N}x{K}" if N else f"K={K}"]
    sizes += [f"R={R}"] if R else []
    sizes += [f"D={D}"] if D else []
    return " ".join([race or op, direction or "", dtype or "", *sizes])


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def standing(rows: list[Row]) -> str:
    """Wins, ties and losses against each provider and the geometric mean of its time over ours, in
    all and for each race and direction; every loss by name. Then the shares of the roof.
    """
    pairs: dict[str, list[tuple[float, tuple]]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for problem, row_of in by_problem(rows).items():
        for name, row in row_of.items():
            if share := share_of(row):
                shares[name].append(share)
            if name != "fastpeft" and "fastpeft" in row_of:
                pairs[name].append((time_of(row) / time_of(row_of["fastpeft"]), problem))
    lines = []
    for name, ratios in pairs.items():
        if name == "fastpeft pdl":
            found = [ratio for ratio, _ in ratios]
            lines.append(
                f"dependent launch: time with it over without, geometric mean {_mean(found):.3f}, "
                f"{min(found):.3f} ... {max(found):.3f}"
            )
            continue
        lines += _against(name, ratios)
    if shares:
        means = ", ".join(f"{name} {100 * _mean(found):.0f} %" for name, found in shares.items())
        lines.append(f"share of the roof, geometric mean: {means}")
    return "\n".join(lines)


def _against(name: str, ratios: list[tuple[float, tuple]]) -> list[str]:
    """The lines of one provider: all problems, then each race and direction, then the losses."""
    groups: dict[str, list[float]] = defaultdict(list)
    for ratio, problem in ratios:
        groups[f"{problem[-1] or problem[0]} {problem[1] or ''}".strip()].append(ratio)
    lines = [f"against {name}: {_counts([ratio for ratio, _ in ratios])}"]
    if len(groups) > 1:
        lines += [f"    {group}: {_counts(found)}" for group, found in groups.items()]
    lost = sorted((ratio, problem) for ratio, problem in ratios if ratio < 1 - TIE)
    return lines + [f"    loss {ratio:.3f}: {_problem_text(problem)}" for ratio, problem in lost]


def _counts(ratios: list[float]) -> str:
    wins, ties, losses = outcome(ratios)
    return (
        f"{wins} wins, {ties} ties, {losses} losses; "
        f"geometric mean of its time over ours {_mean(ratios):.3f}"
    )


# ---- rows of a file


def read(path: Path, commit: str = "") -> list[Row]:
    """Rows of a file, those of one commit where one is named, with the race that a row does not
    tell: rows of one race of providers stand together, fastpeft's first.
    """
    rows, last, race = [], None, ""
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        if commit and row.get("commit") != commit or "us" not in row:
            continue
        if NATIVE in row.get("note", ""):
            continue
        problem = problem_of({**row, "race": None})
        if row["provider"] == "fastpeft" and not row.get("pdl"):
            race, last = race_of(row), problem
        elif problem != last:
            race, last = "", None  # its fastpeft row was refused: nothing to compare with
        rows.append({**row, "race": race or row.get("format", "")})
    return rows


def race_of(row: Row) -> str:
    """What fastpeft's row competes in: the format, and whose kernels where not this device's."""
    note = row.get("note", "")
    parts = [row.get("format", row["op"])]
    parts += ["threshold 0"] if "threshold 0" in note else []
    parts += [part for part in note.split("; ") if part.startswith(AS_ARCH)]
    return ", ".join(parts)


def markdown(rows: list[Row]) -> str:
    """A table of the standing, a line a race and peer; below it every loss."""
    pairs: dict[tuple, list[tuple[float, tuple]]] = defaultdict(list)
    for problem, row_of in by_problem(rows).items():
        for name, row in row_of.items():
            if not name.startswith("fastpeft") and "fastpeft" in row_of:
                op, direction, _, _, _, R, _, dtype, race = problem
                key = (race, dtype, "LoRA" if R else "bare", direction or op, name)
                pairs[key].append((time_of(row) / time_of(row_of["fastpeft"]), problem))
    lines = [
        "| race | dtype | layer | direction | against | problems | geometric mean | wins, ties, "
        "losses | closest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (race, dtype, layer, direction, name), found in pairs.items():
        ratios = [ratio for ratio, _ in found]
        lines.append(
            f"| {race} | {dtype} | {layer} | {direction} | {name} | {len(ratios)} | "
            f"{_mean(ratios):.2f} | {', '.join(map(str, outcome(ratios)))} | {min(ratios):.2f} |"
        )
    for name in dict.fromkeys(key[-1] for key in pairs):
        found = [pair for key, each in pairs.items() if key[-1] == name for pair in each]
        ratios = [ratio for ratio, _ in found]
        wins, ties, losses = outcome(ratios)
        lines.append("")
        lines.append(
            f"Against {name}: {wins} wins, {ties} ties, {losses} losses of {len(ratios)}; "
            f"geometric mean of its time over ours {_mean(ratios):.3f}."
        )
        lines += _losses(found)
    return "\n".join(lines)


def _losses(found: list[tuple[float, tuple]]) -> list[str]:
    """Every loss, one line a race, direction and layer: "M = 256 0.84, 512 0.83"."""
    lost: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
    for ratio, (op, direction, M, N, K, R, _, dtype, race) in found:
        if ratio < 1 - TIE:
            rank = f", R = {R}" if R else ""
            lost[race, direction or op, dtype, f"{N} x {K}{rank}"].append((M, ratio))
    return [
        f"- {race} {direction} {dtype} {layer}: M = "
        + ", ".join(f"{M} {ratio:.2f}" for M, ratio in sorted(each))
        for (race, direction, dtype, layer), each in lost.items()
    ]


def outcome(ratios: Iterable[float]) -> tuple[int, int, int]:
    """Wins, ties, losses."""
    ratios = list(ratios)
    wins, losses = sum(r > 1 + TIE for r in ratios), sum(r < 1 - TIE for r in ratios)
    return wins, len(ratios) - wins - losses, losses


# ---- plots


def plots(rows: list[Row], base: Path) -> list[Path]:
    """Draws BASE-time.png and BASE-share.png: time, and share of the roof, over M; a panel for
    every layer and direction, a line for every provider.

    Returns:
        The files; none where no row has a floor.
    """
    rows = [row for row in rows if row.get("floor_us") and "us" in row]
    panels: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        race, direction = row["race"] or row["op"], row["direction"]
        key = (f"{race} {direction}", row["N"], row["K"], row["R"], row["dtype"])
        panels[key][name_of(row)].append(row)
    drawn = []
    for what in ("time", "share") if panels else ():
        drawn.append(base.with_name(f"{base.name}-{what}.png"))
        _draw(panels, what, drawn[-1], f"{rows[0]['device']}, torch {rows[0]['torch']}")
    return drawn


def _draw(panels: dict[tuple, dict[str, list[Row]]], what: str, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 3.6 * lines), squeeze=False)
    for axis, (key, series) in zip(axes.flat, panels.items(), strict=False):
        for name, found in series.items():
            value = time_of if what == "time" else share_of
            points = sorted((row["M"], value(row)) for row in found)
            style = {"color": f"C{names.index(name) % 10}", "marker": "o", "markersize": 3}
            style["linewidth"] = 2.2 if name.startswith("fastpeft") else 1.2
            axis.plot(*zip(*points, strict=True), label=name, **style)
        if what == "time":
            floor = sorted(
                {(row["M"], row["floor_us"]) for found in series.values() for row in found}
            )
            axis.plot(*zip(*floor, strict=True), "k--", linewidth=1, label="floor")
            axis.set(yscale="log", ylabel="us")
        else:
            axis.axhline(1.0, color="k", linestyle="--", linewidth=1)
            axis.set_ylim(0, max(1.1, axis.get_ylim()[1]))
            axis.set_ylabel("share of the roof")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("M (tokens)")
        axis.set_title(f"{key[0]} N={key[1]} K={key[2]} R={key[3]} {key[4]}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Prints the standing of a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--commit", default="", help="only rows of this commit")
    args = parser.parse_args(argv)
    rows = read(args.rows, args.commit)
    print(markdown(rows) if rows else "no rows")
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
