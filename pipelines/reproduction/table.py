"""A system's published scores beside those that were found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lapilli.data.errors import DataError
from lapilli.data.io.whole_file import MOST_JSON, read_whole
from lapilli.data.io.yaml_text import load_yaml
from pipelines.reproduction.plan import PublishedSystem, tolerance

__all__ = ["BY_HAND", "TableRow", "score_table"]

BY_HAND = "by_hand.yaml"  # scores that a server or a judge gave: `vqav2: 78.4`


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A benchmark's score.

    Attributes:
        title: The benchmark's name.
        published: The published score.
        tolerance: Largest difference that chance explains.
        found: The score that was found; None for none yet.
        how: How it is got where no command gets it, and what differs.
    """

    title: str
    published: float
    tolerance: float
    found: float | None
    how: str

    @property
    def is_within(self) -> bool:
        """Whether what was found is not further below than the tolerance."""
        return self.found is None or self.found >= self.published - self.tolerance


def score_table(
    system: PublishedSystem, model: str, scores: Path, names: Sequence[str]
) -> list[TableRow]:
    """A row a benchmark.

    Args:
        system: Whose table.
        model: Its row of the published table.
        scores: Folder of the scores that were found.
        names: Benchmarks.

    Raises:
        DataError: A file of scores that is damaged or holds no number there.
    """
    told = _by_hand(scores / BY_HAND, system)
    rows: list[TableRow] = []
    for name in names:
        one = system.benchmarks[name]
        found = told.get(name)
        if found is None and one.found:
            found = _number(scores / str(one.found[0]), one.found[1:])
            found = None if found is None else found * one.times
        rows.append(
            TableRow(
                title=one.title,
                published=one.scores[model],
                tolerance=tolerance(one, model),
                found=found,
                how="; ".join(filter(None, (one.by_hand, one.note))),
            )
        )
    return rows


def _by_hand(path: Path, system: PublishedSystem) -> dict[str, float]:
    if not path.is_file():
        return {}
    values: Any = load_yaml(read_whole(path, MOST_JSON).decode("utf-8", "replace"))
    found = cast("dict[object, object]", values) if isinstance(values, dict) else {"": values}
    for name, score in found.items():
        if name not in system.benchmarks or not isinstance(score, (int, float)):
            raise DataError(
                f"{path}: {name}: {score}; expected a number for one of "
                f"{', '.join(system.benchmarks)}"
            )
    return {str(name): float(cast("float", score)) for name, score in found.items()}


def _number(path: Path, keys: Sequence[str | int]) -> float | None:
    if not path.is_file():
        return None
    try:
        value: Any = json.loads(read_whole(path, MOST_JSON))
        for key in keys:
            value = value[key]
        return float(value)
    except (KeyError, IndexError, TypeError, ValueError):
        where = ".".join(map(str, keys))
        raise DataError(f"{path}: no number at {where}; delete it, and score again") from None
