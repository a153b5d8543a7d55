"""loss.png: training loss of every step, its running mean, held-out loss before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and the up to width - 1 values before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))
    ]


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the metrics rows of a run into a PNG; needs no display.

    Args:
        rows: of metrics.jsonl.
        path: of the PNG.
        title: printed above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [row for row in rows if row["kind"] == "train"]
    heldout = [row for row in rows if row["kind"] == "heldout"]
    steps = [row["step"] for row in train]
    losses = [row["loss"] for row in train]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    width = max(1, min(20, len(losses) // 5))
    if width > 1:
        label = f"training, mean of {width} steps"
        axes.plot(steps, running_mean(losses, width), color="tab:blue", label=label)
    axes.plot(
        [row["step"] for row in heldout],
        [row["loss"] for row in heldout],
        "o--",
        color="tab:red",
        label="held-out text",
    )
    dense = next((row["loss"] for row in rows if row["kind"] == "heldout_dense"), None)
    if dense is not None:
        label = f"held-out text, dense base: {dense:.3f}"
        axes.axhline(dense, color="tab:red", linestyle=":", label=label)
    axes.margins(x=0.08)
    for row in heldout:
        axes.annotate(
            f"{row['loss']:.3f}", (row["step"], row["loss"]), (0, 6), textcoords="offset points"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def draw_comparison(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Held-out loss after training against trainable parameters, a point a method; what trains
    nothing is a horizontal line.

    Args:
        rows: of `fastpeft.train.compare.compare`.
        path: of the PNG.
        title: printed above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dense = [row["loss_before"] for row in rows if row["format"] == "none" or not row["trainable"]]
    if dense:
        axes.axhline(dense[0], color="black", label=f"dense base: {dense[0]:.3f}")
    still = [row for row in rows if not row["trainable"]]
    for row, style in zip(still, (":", "--", "-.") * len(still), strict=False):
        label = f"{row['name']}, quantised only: {row['loss_after']:.3f}"
        axes.axhline(row["loss_after"], color="tab:red", linestyle=style, label=label)
    colors = {"none": "tab:blue", "nf4": "tab:red", "int8": "tab:orange"}
    for kind, color in colors.items():
        points = [row for row in rows if row["trainable"] and row["format"] == kind]
        if points:
            label = "trained on " + ("the dense base" if kind == "none" else kind)
            x, y = [r["trainable"] for r in points], [r["loss_after"] for r in points]
            axes.plot(x, y, "o", color=color, label=label)
        for row in points:
            place = (row["trainable"], row["loss_after"])
            axes.annotate(row["name"], place, (5, 4), textcoords="offset points", fontsize=8)
    if any(row["trainable"] for row in rows):
        axes.set_xscale("log")
    axes.margins(x=0.12, y=0.1)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("held-out cross entropy after, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
