"""Make the record ids of a source unique, without holding all of them as Python objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lapilli.data.sources.validation import unique_id

__all__ = ["EarlyIds", "unique_ids"]


def _stem(record_id: str) -> str:
    """What ids that may become equal have in common: a repeated id gets `#2`, `#3`, ..."""
    return record_id.partition("#")[0]


def unique_ids(ids: pa.ChunkedArray) -> tuple[dict[int, str], dict[int, int]]:
    """The ids that are not unique, as `validation.unique_id` changes them one after the other.

    Args:
        ids: The record ids of a source, in order.

    Returns:
        By row the new id, and the number that it ends on; rows that keep their id are left out.
    """
    arrow: Any = pc
    stems = ids
    if arrow.any(arrow.match_substring(ids, "#")).as_py():
        stems = arrow.replace_substring_regex(ids, "(?s)#.*", "")
    codes = arrow.dictionary_encode(stems).combine_chunks().indices.to_numpy()
    rows = np.flatnonzero(np.bincount(codes)[codes] > 1)
    seen: Counter[str] = Counter()
    renamed: dict[int, str] = {}
    copies: dict[int, int] = {}
    for row, name in zip(rows.tolist(), ids.take(pa.array(rows)).to_pylist(), strict=True):
        found = unique_id(name, seen)
        if found != name:
            renamed[row], copies[row] = found, int(found.rpartition("#")[2])
    return renamed, copies


class EarlyIds:
    """The unique ids of some records while the others are still to be read."""

    def __init__(self, names: Iterable[str] | None) -> None:
        """Of the records whose id has the stem of one of these; None for all."""
        self._stems = None if names is None else set(map(_stem, names))
        self._seen: Counter[str] = Counter()

    def __bool__(self) -> bool:
        """Whether any is asked for."""
        return self._stems is None or bool(self._stems)

    def of(self, record_ids: Iterable[str]) -> dict[int, str]:
        """The unique ids of the next records of a source, by their place among these."""
        stems = self._stems
        return {
            place: unique_id(name, self._seen)
            for place, name in enumerate(record_ids)
            if stems is None or _stem(name) in stems
        }
