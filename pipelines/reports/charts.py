"""Line charts, bar charts and histograms as SVG. Pure.

Each chart is drawn twice, for a wide and for a narrow screen, so that its letters keep their size
on a phone; the page's style sheet shows one of the two. Colours are CSS classes `s0` to `s7`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from pipelines.reports.ticks import (
    Floats,
    Values,
    domain,
    floats,
    number,
    plain,
    thin,
    tick_labels,
    ticks,
    trimmed,
    widened,
)

__all__ = ["Chart", "bar_chart", "histogram", "line_chart"]

WIDE, NARROW = 860, 340
COLOURS = 8
MAX_POINTS, FEW_POINTS = 400, 200  # of one series in one line, wide and narrow
MAX_BIN = 72  # width of a bar of a histogram
MAX_HITS = 60  # of one series with a tooltip


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart: both pictures (none where there is nothing to draw), legend and note."""

    title: str
    pictures: tuple[Markup, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plotting area inside a picture, and the values at its edges."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_domain: tuple[float, float]
    y_domain: tuple[float, float]

    def x(self, value: float) -> float:
        """The horizontal place of a value."""
        return self.left + (self.width - self.left - self.right) * _share(value, *self.x_domain)

    def y(self, value: float) -> float:
        """The vertical place of a value."""
        span = self.height - self.top - self.bottom
        return self.height - self.bottom - span * _share(value, *self.y_domain)


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


# Markup -------------------------------------------------------------------------------------------


def _el(name: str, *children: str, **attributes: str | float) -> Markup:
    """An element: text children and attribute values are escaped, `text_anchor` is text-anchor."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
    )
    inside = "".join(escape(child) for child in children)
    return Markup(f"<{name}{pairs}>{inside}</{name}>" if inside else f"<{name}{pairs}/>")


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else trimmed(f"{value:.1f}")


def _text(content: str, x: float, y: float, anchor: str = "start", kind: str = "") -> Markup:
    extra = {"class_": kind} if kind else {}
    return _el("text", content, x=x, y=y, text_anchor=anchor, **extra)


def _picture(title: str, summary: str, width: float, height: float, *marks: str) -> Markup:
    kind = "wide" if width == WIDE else "narrow"
    heading = [_el("title", title or "Chart"), *([_el("desc", summary)] if summary else [])]
    box = f"0 0 {width:g} {height:g}"
    return _el("svg", *heading, *marks, class_=f"plot {kind}", role="img", viewBox=box)


def _text_width(text: str) -> float:
    """About how wide a text of 12 px is."""
    return sum(
        12.5 if unicodedata.east_asian_width(c) in "WF" else 11.5 if c in "mwMW@%" else 6.9
        for c in text
    )


def _shortened(text: str, room: float) -> str:
    """The text, cut with an ellipsis to the room there is."""
    line = " ".join(text.split())
    if len(line) * 6.9 <= room and _text_width(line) <= room:
        return line
    kept = line[: max(1, int(room / 6.9))]
    while len(kept) > 1 and _text_width(kept) + 9 > room:
        kept = kept[:-1]
    return kept.rstrip() + "…"


def _colour(index: int) -> str:
    """The class of the series of this number; from the ninth on the colours repeat, dashed."""
    return f"s{index % COLOURS}" + (" dash" if index // COLOURS % 2 else "")


def _legend(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _colour(i)) for i, name in enumerate(names)) if len(names) > 1 else ()


def _left_out(count: int) -> str:
    return f"{count:,} {'value' if count == 1 else 'values'} not finite, left out" if count else ""


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str
) -> list[Markup]:
    """Grid lines with their numbers, and what the axes mean."""
    start, end, floor = frame.left, frame.width - frame.right, frame.height - frame.bottom
    marks: list[Markup] = []
    for value, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        y = frame.y(value)
        marks += [
            _el("line", x1=start, x2=end, y1=y, y2=y, class_="grid"),
            _text(label, start - 8, y + 4, "end"),
        ]
    for value, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = frame.x(value)
        marks += [
            _el("line", x1=x, x2=x, y1=floor, y2=floor + 5, class_="axis"),
            _text(label, x, floor + 19, "middle"),
        ]
    marks.append(_el("line", x1=start, x2=end, y1=floor, y2=floor, class_="axis"))
    if y_label:
        marks.append(_text(_shortened(y_label, frame.width), 0, 12, kind="label"))
    if x_label:
        room = frame.width - frame.left
        marks.append(_text(_shortened(x_label, room), end, frame.height - 4, "end", "label"))
    return marks


def _frame(
    width: float,
    x_domain: tuple[float, float],
    y_domain: tuple[float, float],
    y_ticks: Sequence[float],
    x_ticks: Sequence[float],
    labels: tuple[str, str],
) -> _Frame:
    """A plotting area that leaves room for the numbers and the labels (x, y)."""
    left = 10 + max((_text_width(text) for text in tick_labels(y_ticks)), default=0)
    side = max((_text_width(text) / 2 for text in tick_labels(x_ticks)), default=0)
    return _Frame(
        width=width,
        height=300 if width == WIDE else 270,
        left=min(max(left, side + 1), width / 2),
        right=min(side + 4, width / 4),
        top=26 if labels[1] else 10,
        bottom=46 if labels[0] else 26,
        x_domain=x_domain,
        y_domain=y_domain,
    )


# Line charts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """One series, finite points only, ordered by x."""

    name: str
    xs: Floats
    ys: Floats
    left_out: int


def _line(name: str, xs: Values, ys: Values) -> _Line:
    x, y = floats(xs), floats(ys)
    if len(x) != len(y):
        raise ValueError(f"series {name!r} has {len(x)} x values and {len(y)} y values")
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    order = np.argsort(x, kind="stable")
    return _Line(name, x[order], y[order], int((~good).sum()))


def line_chart(
    series: Mapping[str, tuple[Values, Values]],
    x_label: str = "",
    y_label: str = "",
    title: str = "",
) -> Chart:
    """Several series as lines over one x axis.

    Args:
        series: By name, the x values and the y values. Points that are not finite are left out,
            and long series are thinned to 400 points with their peaks kept.
        x_label: What the x axis counts.
        y_label: What the y axis measures.
        title: The heading.

    Returns:
        The chart; without pictures where no point is finite.

    Raises:
        ValueError: A series has more x values than y values, or fewer.
    """
    lines = [_line(name, xs, ys) for name, (xs, ys) in series.items()]
    note = _left_out(sum(line.left_out for line in lines))
    if not any(len(line.xs) for line in lines):
        return Chart(title, note=note)
    labels = (x_label, "" if y_label.casefold() == title.casefold() else y_label)
    pictures = tuple(_line_picture(lines, labels, title, width) for width in (WIDE, NARROW))
    return Chart(title, pictures, _legend([line.name for line in lines]), note)


def _line_picture(
    lines: Sequence[_Line], labels: tuple[str, str], title: str, width: float
) -> Markup:
    xs, ys = (np.concatenate(part) for part in zip(*((s.xs, s.ys) for s in lines), strict=True))
    whole = bool((xs == np.round(xs)).all()) and float(np.abs(xs).max()) < 1e15
    x_domain, y_domain = domain(xs), widened(ys, 5)
    x_ticks = ticks(*x_domain, 8 if width == WIDE else 4, whole=whole)
    y_ticks = ticks(*y_domain, 5)
    frame = _frame(width, x_domain, y_domain, y_ticks, x_ticks, labels)
    marks = _axes(frame, x_ticks, y_ticks, *labels)
    for index, line in enumerate(lines):
        marks += _line_marks(frame, line, index)
    if width == WIDE:
        for index, line in enumerate(lines):
            marks += _hits(frame, line, index, labels[0] or "x")
    return _picture(title, _summary(lines), width, frame.height, *marks)


def _line_marks(frame: _Frame, line: _Line, index: int) -> list[Markup]:
    xs, ys = thin(line.xs, line.ys, MAX_POINTS if frame.width == WIDE else FEW_POINTS)
    places = [(frame.x(x), frame.y(y)) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
    if not places:
        return []
    if len(places) == 1:
        (x, y), colour = places[0], _colour(index)
        return [_el("circle", cx=x, cy=y, r=4, class_=f"bar {colour}")]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    climb = sum(abs(after[1] - before[1]) for before, after in pairwise(places))
    noisy = " noisy" if climb > 8 * frame.height else ""
    return [_el("polyline", points=points, class_=f"line {_colour(index)}{noisy}")]


def _hits(frame: _Frame, line: _Line, index: int, x_name: str) -> list[Markup]:
    """Unseen circles over some of the points, each with its values as tooltip."""
    xs, ys = thin(line.xs, line.ys, MAX_HITS)
    return [
        _el(
            "circle",
            _el("title", f"{line.name}: {number(y)} at {x_name} {plain(x)}"),
            cx=frame.x(x),
            cy=frame.y(y),
            r=6,
            class_=f"hit {_colour(index)}",
        )
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True)
    ]


def _summary(lines: Sequence[_Line]) -> str:
    return "; ".join(
        f"{line.name}: from {number(float(line.ys[0]))} to {number(float(line.ys[-1]))}, "
        f"lowest {number(float(line.ys.min()))}, highest {number(float(line.ys.max()))}"
        for line in lines[:COLOURS]
        if len(line.ys)
    )


# Bar charts ---------------------------------------------------------------------------------------


def _formatted(value: float, value_format: str) -> str:
    if math.isnan(value):
        return "—"
    return format(value, value_format) if value_format else plain(value)


def bar_chart(
    labels: Sequence[str],
    series: Mapping[str, Values],
    title: str = "",
    value_format: str = "",
) -> Chart:
    """Horizontal bars from zero, one group for each label and one bar for each series.

    Args:
        labels: What the groups are.
        series: By name, one value for each label; a value that is None or not finite has no bar.
        title: The heading.
        value_format: How the values are written, such as `.1%` or `,.0f`.

    Returns:
        The chart; without pictures where there is nothing to draw.

    Raises:
        ValueError: A series has not one value for each label.
    """
    values = {name: floats(given) for name, given in series.items()}
    for name, array in values.items():
        if len(array) != len(labels):
            raise ValueError(f"series {name!r} has {len(array)} values for {len(labels)} labels")
    if not labels or not values:
        return Chart(title)
    names = [str(label) for label in labels]
    pictures = tuple(_bar_picture(names, values, title, value_format, w) for w in (WIDE, NARROW))
    return Chart(title, pictures, _legend(list(values)))


def _bar_picture(
    labels: Sequence[str],
    values: Mapping[str, Floats],
    title: str,
    value_format: str,
    width: float,
) -> Markup:
    finite = np.concatenate([array[np.isfinite(array)] for array in values.values()] + [[0.0]])
    low, high = domain(finite) if finite.any() else (0.0, 1.0)
    texts = [_formatted(v, value_format) for array in values.values() for v in array.tolist()]
    beside = width == WIDE
    names = max(_text_width(_shortened(label, width * 0.35)) for label in labels) + 12
    top, thick = (0, 16 if len(values) == 1 else 12) if beside else (20, 14)
    group = top + len(values) * (thick + 2) + 12
    frame = _Frame(
        width=width,
        height=len(labels) * group,
        left=names if beside else 0,
        right=min(max(map(_text_width, texts)) + 10, width * 0.3),
        top=top,
        bottom=0,
        x_domain=(low, high),
        y_domain=(0, 1),
    )
    marks: list[Markup] = []
    for row, label in enumerate(labels):
        y = row * group
        rows = {name: float(array[row]) for name, array in values.items()}
        middle = y + top + len(rows) * (thick + 2) / 2 + 3
        place = (names - 12, middle, "end") if beside else (0.0, y + 13, "start")
        room = width * 0.35 if beside else width
        marks.append(_text(_shortened(label, room), *place, kind="name"))
        marks += _bars(frame, label, rows, value_format, y + top, thick)
    return _picture(title, _bar_summary(labels, values, value_format), width, frame.height, *marks)


def _bars(
    frame: _Frame,
    label: str,
    row: Mapping[str, float],
    value_format: str,
    top: float,
    thick: float,
) -> list[Markup]:
    """The bars of one group, each with its value written at its end."""
    marks: list[Markup] = []
    for index, (name, value) in enumerate(row.items()):
        y, zero = top + index * (thick + 2), frame.x(0)
        end = zero if math.isnan(value) else frame.x(value)
        text = _formatted(value, value_format)
        marks.append(
            _el(
                "rect",
                _el("title", f"{label}, {name}: {text}" if name else f"{label}: {text}"),
                x=min(zero, end),
                y=y,
                width=max(0 if math.isnan(value) else 1, abs(end - zero)),
                height=thick,
                rx=2,
                class_=f"bar {_colour(index)}",
            )
        )
        marks.append(_text(text, max(zero, end) + 6, y + thick / 2 + 4, kind="value"))
    return marks


def _bar_summary(labels: Sequence[str], values: Mapping[str, Floats], value_format: str) -> str:
    return "; ".join(
        f"{label}: "
        + ", ".join(
            f"{name} {_formatted(float(array[row]), value_format)}".strip()
            for name, array in values.items()
        )
        for row, label in enumerate(labels[:40])
    )


# Histograms ---------------------------------------------------------------------------------------


def _edges(values: Floats, bins: int) -> Floats:
    """The edges of at most `bins` bins; for whole numbers, bins that hold equally many of them."""
    low, high = float(values.min()), float(values.max())
    if bool((values == np.round(values)).all()) and max(abs(low), abs(high)) < 1e12:
        size = math.ceil((high - low + 1) / bins)
        count = math.ceil((high - low + 1) / size)
        return low - 0.5 + size * np.arange(count + 1, dtype=np.float64)
    return np.linspace(*domain(values), bins + 1)


def histogram(values: Values, bins: int = 40, title: str = "", x_label: str = "") -> Chart:
    """How often the values lie in each of some equally wide bins.

    Args:
        values: The values; those not finite are left out, and the note says how many.
        bins: How many bins at most.
        title: The heading.
        x_label: What the values are.

    Returns:
        The chart; without pictures where no value is finite.

    Raises:
        ValueError: `bins` is less than 1.
    """
    if bins < 1:
        raise ValueError(f"a histogram needs at least 1 bin, not {bins}")
    array = floats(values)
    finite = array[np.isfinite(array)]
    lost = _left_out(len(array) - len(finite))
    if not len(finite):
        return Chart(title, note=lost)
    edges = _edges(finite, bins)
    counts, _ = np.histogram(finite, bins=edges)
    median = plain(float(np.median(finite)))
    high = plain(float(np.quantile(finite, 0.95, method="inverted_cdf")))
    parts = [f"{len(finite):,} values", f"median {median}", f"95% at most {high}", lost]
    note = " · ".join(part for part in parts if part)
    pictures = tuple(_histogram_picture(edges, counts, title, x_label, w) for w in (WIDE, NARROW))
    return Chart(title, pictures, note=note)


def _histogram_picture(
    edges: Floats, counts: npt.NDArray[np.intp], title: str, x_label: str, width: float
) -> Markup:
    x_domain = (float(edges[0]), float(edges[-1]))
    y_domain = widened(np.array([0.0, float(counts.max())]), 4, whole=True)
    whole = bool((edges - 0.5 == np.round(edges - 0.5)).all())
    x_ticks = ticks(*x_domain, 8 if width == WIDE else 4, whole=whole)
    y_ticks = ticks(*y_domain, 4, whole=True)
    frame = _frame(width, x_domain, y_domain, y_ticks, x_ticks, (x_label, "count"))
    marks = _axes(frame, x_ticks, y_ticks, x_label, "count")
    for low, high, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
        if count:
            marks.append(_bin(frame, float(low), float(high), count, whole))
    summary = f"{int(counts.sum()):,} values from {number(x_domain[0])} to {number(x_domain[1])}"
    return _picture(title, summary, width, frame.height, *marks)


def _bin(frame: _Frame, low: float, high: float, count: int, whole: bool) -> Markup:
    first, last = (low + 0.5, high - 0.5) if whole else (low, high)
    span = plain(first) if first == last else f"{plain(first)} to {plain(last)}"
    left, right, top = frame.x(low), frame.x(high), min(frame.y(count), frame.y(0) - 1)
    gap = max(1.0 if right - left > 3 else 0.0, right - left - MAX_BIN)
    return _el(
        "rect",
        _el("title", f"{span}: {count:,}"),
        x=left + gap / 2,
        y=top,
        width=max(0.5, right - left - gap),
        height=frame.y(0) - top,
        class_="bar s0",
    )
