"""Plots of experiments, as SVG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soap_net.experiments.results import Results, Row
from soap_net.files import replacing

MARKERS = "os^Dv"


def plot_accuracies(
    path: Path, rows: Sequence[Row], results: Results, title: str, axis: str, chance: float, paper: str = ""
) -> None:
    """Accuracies with intervals, a curve or a row of points for each series; `paper` labels the paper's figures.

    Where there are several seeds, each one's accuracy is a cross. `chance`, in percent, is marked where the figures
    come near it.
    """
    figure, axes = new_figure(8.0, 4.6)
    scale = _Scale(rows)
    names = list(dict.fromkeys(row.series for row in rows))
    singles: list[tuple[float, float]] = []
    for number, name in enumerate(names):
        chosen = [row for row in rows if row.series == name]
        aside = number - (len(names) - 1) / 2  # side by side, so that no interval hides another
        xs = [scale.place(row.x, aside) for row in chosen]
        for x, row in zip(xs, chosen, strict=True):
            each = results.accuracies(row.cell, row.test, results.seeds(row.cell)).mean(axis=1)
            singles += [(x, accuracy) for accuracy in each]
        found = [one for row in chosen if (one := results.accuracy(row.cell, row.test))]
        ys, halves = [one.mean for one in found], [math.nan if one.half is None else one.half for one in found]
        style = MARKERS[number % len(MARKERS)] + ("-" if scale.numeric else "")
        axes.errorbar(
            xs, ys, yerr=halves, fmt=style, ms=4, lw=1, capsize=4, color=f"C{number}", label=name or "this run"
        )
        known = [(x, row.paper) for x, row in zip(xs, chosen, strict=True) if row.paper is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "*", ms=9, mfc="none", color="k", label=f"{paper} {name}".strip())
    if len(singles) > len(rows):
        axes.plot(*zip(*singles, strict=True), "x", ms=4, mew=0.8, color="k", alpha=0.6, label="each training seed")
    if chance > axes.get_ylim()[0] - 10:
        axes.axhline(chance, color="0.5", ls=":", lw=1, label="chance")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -3.0), min(high, 103.0))  # intervals may reach beyond what is possible
    scale.mark(axes)
    axes.set(xlabel=axis, ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path)


class _Scale:
    """The horizontal axis: words side by side, or numbers, which stand on a logarithmic scale if they reach far."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.marks = list(dict.fromkeys(row.x for row in rows))
        self.numbers = [float(x) for x in self.marks if not isinstance(x, str)]
        self.numeric = len(self.numbers) == len(self.marks)
        self.logarithmic = self.numeric and max(self.numbers) > 12

    def place(self, x: float | str, aside: float) -> float:
        """Where `x` lies, moved by `aside` small steps."""
        if not self.numeric:
            return self.marks.index(x) + 0.16 * aside
        low, high = min(self.numbers), max(self.numbers)
        return float(x) * (high / low) ** (0.01 * aside) if self.logarithmic else float(x) + 0.01 * (high - low) * aside

    def mark(self, axes: Any) -> None:
        """Sets scale and ticks."""
        if not self.numeric:
            axes.set_xticks(range(len(self.marks)), [str(x) for x in self.marks], fontsize="small")
        elif self.logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_xticks(self.numbers, [f"{x:g}" for x in self.numbers])


def new_figure(width: float, height: float, columns: int = 1) -> Any:
    """A matplotlib figure and its axes, without a display."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end only

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def save_figure(figure: Any, path: Path) -> None:
    """Writes SVG that is the same, byte for byte, for the same figure."""
    import matplotlib

    with replacing(path) as file, matplotlib.rc_context({"svg.hashsalt": "soap-net"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
