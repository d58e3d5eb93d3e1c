"""Shared by all measurements: provenance, clocks that take turns, one row in a CSV.

Two things are compared only within one run, by turns, so that a machine that slows down slows
both.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich import box
from rich.table import Table

from lapilli.data.versions import installed_versions
from pipelines.cli.command import UsageError, console, say
from pipelines.reports.machine import processor

__all__ = [
    "RESULTS",
    "Bar",
    "Elapsed",
    "Kind",
    "Spread",
    "add_row",
    "by_turns",
    "clock",
    "draw_bars",
    "pin_to_one_core",
    "provenance",
    "publish",
    "table",
]

T = TypeVar("T")
Kind = Literal["ours", "other", "floor"]
COLOURS: dict[Kind, str] = {"ours": "#1f6f5c", "other": "#b9bec6", "floor": "#e0a93b"}
INK, QUIET = "#1d2430", "#6b7380"

RESULTS = Path(__file__).parent / "results"


def provenance(packages: Sequence[str], topic: str, argv: Sequence[str]) -> dict[str, Any]:
    """Date, hardware, versions, commit and command: the first columns of every row."""
    command = f"python -m pipelines.benchmarks {topic} {shlex.join(argv)}".rstrip()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **installed_versions(*packages),
        "commit": _commit(),
        "command": command,
    }


def add_row(topic: str, row: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Append a row to `results/TOPIC.csv`, which gets a header when it is new.

    Raises:
        UsageError: The file has other columns: one file holds one kind of row.
    """
    path = folder / f"{topic}.csv"
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
        if columns != list(row):
            raise UsageError(
                f"{path} has columns {columns}, this run has {list(row)}; move the file away"
            )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    return path


@dataclass(frozen=True)
class Elapsed:
    """Seconds of the clock on the wall, and seconds a processor worked for this process."""

    wall: float
    cpu: float


def clock(work: Callable[[], T]) -> tuple[Elapsed, T]:
    """Call `work` and time it.

    What a single thread took is best told by `cpu`: another process on its core stretches `wall`.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Elapsed(time.perf_counter() - wall, time.process_time() - cpu), result


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, least and most of the values."""
        return cls(statistics.median(values), min(values), max(values))

    def rate(self, count: float) -> Spread:
        """Of seconds for `count` things, things a second."""
        return Spread(count / self.median, count / self.high, count / self.low)

    def text(self, digits: int = 0) -> str:
        """The median with the least and the most behind it."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def by_turns(
    sides: Mapping[str, Callable[[], float]], rounds: int, *, warm: bool = True
) -> dict[str, Spread]:
    """Let every side run once a round and return seconds; who begins changes from round to round.

    Args:
        sides: What is compared.
        rounds: Rounds that count.
        warm: Run each side once before, uncounted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-warm, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = sides[name]()
            if number >= 0:
                seconds[name].append(taken)
    return {name: Spread.of(values) for name, values in seconds.items()}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, the first column to the left and figures to the right."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        shown.add_row(
            *(f"{cell:,}" if isinstance(cell, int | float) else str(cell) for cell in row)
        )
    console.print(shown)


def publish(
    topic: str,
    head: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    shown: Mapping[str, str],
    *,
    title: str,
    save: bool,
) -> None:
    """Print rows as a table and add them to `results/TOPIC.csv`.

    Args:
        topic: The file.
        head: The first columns of every row (`provenance`).
        rows: What was measured.
        shown: The table's headings with their columns.
        title: Of the table.
        save: Whether rows are added.
    """
    table(title, tuple(shown), [[row[name] for name in shown.values()] for row in rows])
    if save:
        path = [add_row(topic, {**head, **row}) for row in rows][-1]
        say(f"{len(rows)} rows added to {path}; add a line to LOG.md beside it")


@dataclass(frozen=True)
class Bar:
    """One side: its name, what was measured, and whether it is ours, another's or the floor."""

    label: str
    value: Spread
    kind: Kind = "other"
    note: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any], column: str, kind: Kind, note: str = "") -> Bar:
        """The side of a row, whose figure has its least and most beside it."""
        return cls(row["side"], Spread(row[column], row["low"], row["high"]), kind, note)


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


def pin_to_one_core() -> int:
    """Keep this process and its threads on one core, the last it may use; says which.

    A platform that cannot pin gives -1.
    """
    if not hasattr(os, "sched_setaffinity"):
        return -1
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def _commit() -> str:
    """The checkout's commit, with `+` behind it where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed.strip())
