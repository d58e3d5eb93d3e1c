"""Bars for a slide: a line each, the figure beside it, one colour for ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.benchmarks.harness import Spread
from pipelines.cli.command import UsageError

__all__ = ["Bar", "draw_bars"]

Kind = Literal["ours", "other", "floor"]
COLOURS: dict[Kind, str] = {"ours": "#1f6f5c", "other": "#b9bec6", "floor": "#e0a93b"}
INK, QUIET = "#1d2430", "#6b7380"


@dataclass(frozen=True)
class Bar:
    """One side: its name, what was measured, and whether it is ours, another's or the floor."""

    label: str
    value: Spread
    kind: Kind = "other"
    note: str = ""


def draw_bars(path: Path, title: str, unit: str, bars: Sequence[Bar], caption: str) -> None:
    """Draw horizontal bars into a PNG, SVG or PDF file; the ends of a line are least and most.

    Raises:
        UsageError: matplotlib is not installed, or the file's kind is unknown to it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plot: matplotlib is not installed; pip install -e '.[bench]'") from None
    figure = Figure((12.8, 1.9 + 0.52 * len(bars)), dpi=100)
    axes: Any = figure.add_axes((0.27, 0.85 / figure.get_figheight(), 0.58, 0))
    bottom, top = 0.85 / figure.get_figheight(), 1 - 0.95 / figure.get_figheight()
    axes.set_position((0.27, bottom, 0.58, top - bottom))
    places = range(len(bars))[::-1]
    for place, bar in zip(places, bars, strict=True):
        value = bar.value
        axes.barh(place, value.median, height=0.66, color=COLOURS[bar.kind])
        axes.plot((value.low, value.high), (place, place), color=INK, linewidth=1.2)
        text = f"{value.median:,.0f}" if value.median >= 20 else f"{value.median:,.2f}"
        note = f"  {bar.note}" if bar.note else ""
        end = max(value.median, value.high)
        axes.annotate(
            text + note, (end, place), (8, 0), textcoords="offset points", va="center",
            color=INK, fontsize=14, fontweight="bold" if bar.kind == "ours" else "normal",
        )  # fmt: skip
    axes.set_yticks(list(places), [bar.label for bar in bars], fontsize=14, color=INK)
    axes.set_xlim(0, max(max(bar.value.median, bar.value.high) for bar in bars) * 1.04)
    axes.tick_params(axis="x", labelsize=11, colors=QUIET, length=0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit, fontsize=12, color=QUIET)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="#e6e8ec", zorder=0)
    axes.set_axisbelow(True)
    figure.text(
        0.02, 1 - 0.5 / figure.get_figheight(), title, fontsize=20, color=INK, weight="bold"
    )
    figure.text(0.02, 0.16 / figure.get_figheight(), caption, fontsize=10, color=QUIET)
    try:
        figure.savefig(path, facecolor="white")
    except ValueError as error:
        raise UsageError(f"plot: {path}: {error}") from None
