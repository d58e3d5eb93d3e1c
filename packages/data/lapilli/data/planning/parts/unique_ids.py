"""Make the record ids of a source unique, without holding all of them as Python objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from lapilli.data.sources.validation import unique_id

if TYPE_CHECKING:
    pass

__all__ = ["EarlyIds", "RecordIds"]


def _stem(record_id: str) -> str:
    """What ids that may become equal have in common: a repeated id gets `#2`, `#3`, ..."""
    return record_id.partition("#")[0]


class RecordIds:
    """The record ids of a source, in order, to be made unique once all are there."""

    def __init__(self) -> None:
        self._chunks: list[pa.Array] = []

    def add(self, ids: pa.Array) -> None:
        """Add the next ones, a string array."""
        self._chunks.append(ids)

    def unique(self) -> tuple[dict[int, str], dict[int, int]]:
        """The ids that are not unique, as `validation.unique_id` changes them one after the other.

        Returns:
            By row the new id, and the number that it ends on; rows that keep their id are left out.
        """
        names = (name for chunk in self._chunks for name in chunk.to_pylist())
        stems = np.fromiter((hash(_stem(name)) for name in names), np.int64)
        in_order = np.sort(stems)
        repeated = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
        rows = np.flatnonzero(np.isin(stems, repeated)) if len(repeated) else repeated
        seen: Counter[str] = Counter()
        renamed: dict[int, str] = {}
        copies: dict[int, int] = {}
        starts = np.cumsum([0, *map(len, self._chunks)])
        for row in rows.tolist():  # of two stems with one hash too, which changes nothing
            chunk = int(np.searchsorted(starts, row, "right")) - 1
            name: str = self._chunks[chunk][row - int(starts[chunk])].as_py()
            found = unique_id(name, seen)
            if found != name:
                renamed[row], copies[row] = found, int(found.rpartition("#")[2])
        return renamed, copies

    def take_chunks(self) -> Iterator[pa.Array]:
        """The ids in order as they were added; each is gone afterwards."""
        self._chunks.reverse()
        while self._chunks:
            yield self._chunks.pop()


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
