"""The figures of a comparison as PNG: the only file that uses matplotlib, without windows and shared state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.compare.comparison import Point
from cluster.record.estimates import Estimate

SIZE = (7.0, 4.2)
DPI = 130


def curves(path: Path, title: str, value: str, lines: Mapping[str, Sequence[Point]], unit: float = 1.0) -> None:
    """One line per name with a band from its lowest to its highest seed. unit: what a 1 on the axis is worth.

    A name without points keeps its colour free, so that a method has the same one in every figure.
    """
    figure, axes = _new(title, "step", value)
    for number, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        steps, colour = [point.step for point in points], f"C{number}"
        means = [point.mean / unit for point in points]
        axes.plot(steps, means, label=name, color=colour, marker="o", markersize=3)
        low, high = ([point.low / unit for point in points], [point.high / unit for point in points])
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def against_value(path: Path, title: str, name: str, value: str, found: Mapping[float, Estimate]) -> None:
    """Estimates with their intervals against a setting; an unbounded interval is not drawn."""
    figure, axes = _new(title, name, value)
    means = [one.value for one in found.values()]
    arms = [one.high - one.value if one.high < float("inf") else 0.0 for one in found.values()]
    axes.errorbar(list(found), means, yerr=arms, marker="o", capsize=4)
    figure.savefig(path, dpi=DPI)


def _new(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    return figure, axes
