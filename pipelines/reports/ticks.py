"""Format numbers and choose ticks and points for charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Floats",
    "Values",
    "counted",
    "domain",
    "duration_text",
    "floats",
    "number",
    "plain",
    "thin",
    "tick_labels",
    "ticks",
    "trimmed",
    "widened",
]

Values: TypeAlias = Sequence[float | None] | Sequence[int] | Sequence[float] | npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]

HUGE, TINY = 1e300, 1e-290  # beyond these, values are drawn at the limit


def number(value: object) -> str:
    """A value as a reader wants it: `12,345`, `0.9134`, `2e-5`; None is a dash."""
    if value is None:
        return "—"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if not isinstance(value, Real):
        return str(value)
    real = float(value)
    if not math.isfinite(real):
        return "NaN" if math.isnan(real) else "∞" if real > 0 else "-∞"
    if real == 0:
        return "0"
    if not 1e-4 <= abs(real) < 1e15:
        return _scientific(real, 3)
    decimals = max(0, 3 - math.floor(math.log10(abs(real))))
    return trimmed(f"{real:,.{decimals}f}")


def plain(value: float) -> str:
    """A float as `number` writes it, whole ones with every digit."""
    return number(int(value) if value.is_integer() and abs(value) < 1e15 else value)


def trimmed(text: str) -> str:
    """The digits without zeros at their end."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """`12 s`, `3.5 min`, `2.1 h`, `4 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"


def _scientific(value: float, decimals: int) -> str:
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return f"{trimmed(mantissa)}e{int(exponent)}"


def floats(values: Values) -> Floats:
    """The values as floats, finite ones within what can be drawn."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    clipped = np.where(np.isfinite(array), np.clip(array, -HUGE, HUGE), np.nan)
    return np.where(np.abs(clipped) < TINY, 0.0, clipped)


def domain(values: Floats) -> tuple[float, float]:
    """Lowest and highest value, moved apart where they are (nearly) one."""
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    pad = abs(high) * 0.1 or 1.0
    return low - pad, high + pad


def _step(low: float, high: float, count: int, whole: bool) -> float:
    raw = (high - low) / max(1, count)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    return max(1.0, step) if whole else step


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers between low and high.

    Args:
        low: The lower end, less than `high`.
        high: The upper end.
        count: How many to aim at; there may be fewer.
        whole: Whether only whole numbers make sense.

    Returns:
        The numbers, ascending; at times none, where `whole` and no whole number lies between.
    """
    step = _step(low, high, count, whole)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    if last < first and not whole:  # all of it lies between two
        return ticks(low, high, count + 1)
    return [k * step for k in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The labels of evenly spaced ticks: as many digits as tell them apart, and no more."""
    if len(values) < 2:
        return [plain(v) for v in values]
    step, top = values[1] - values[0], max(abs(v) for v in values)
    place = math.floor(math.log10(step) + 1e-6)
    if top >= 1e15 or step < 0.99e-4:
        digits = max(0, math.floor(math.log10(top) + 1e-6) - place)
        return ["0" if abs(v) < step / 2 else _scientific(v, digits) for v in values]
    units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")]
    unit, suffix = next((u for u in units if step >= 1000 and top >= u[0]), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-6))
    texts = [f"{v / unit:,.{decimals}f}" for v in values]
    return [
        "0" if abs(v) < step / 2 else (trimmed(t) if suffix else t) + suffix
        for v, t in zip(values, texts, strict=True)
    ]


def widened(values: Floats, count: int, *, whole: bool = False) -> tuple[float, float]:
    """The domain of the values, its ends moved out to ticks."""
    low, high = domain(values)
    step = _step(low, high, count, whole)
    return math.floor(low / step + 1e-6) * step, math.ceil(high / step - 1e-6) * step


def thin(xs: Floats, ys: Floats, limit: int) -> tuple[Floats, Floats]:
    """At most `limit` of the points: the ends, and the lowest and highest of every stretch."""
    if len(ys) <= limit:
        return xs, ys
    edges = np.linspace(1, len(ys) - 1, (limit - 2) // 2 + 1).astype(int)
    keep = {0, len(ys) - 1}
    for start, stop in pairwise(edges.tolist()):
        keep |= {start + int(ys[start:stop].argmin()), start + int(ys[start:stop].argmax())}
    index = np.array(sorted(keep))
    return xs[index], ys[index]
