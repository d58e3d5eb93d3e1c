"""Some entries of a plan as sequences, whose values are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from lapilli.data.planning.incremental import STAMP_BYTES, Stamped
from lapilli.data.planning.parts.entries import AT_ONCE, Entries

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["EntryImages", "EntryNames", "PackedRecords", "StampedRows", "packed_bytes"]

Value = TypeVar("Value")


class _View(Sequence[Value]):
    """A value of each of some entries. Equal to a tuple of them, and pickled as one."""

    def __init__(self, entries: Entries, rows: NDArray[np.int64]) -> None:
        """Of the entries of these rows."""
        self._entries, self._rows = entries, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Value: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> Value | Self:
        """An entry's value, or some entries'."""
        if isinstance(place, slice):
            return type(self)(self._entries, self._rows[place])
        return self._of(int(self._rows[place]))

    def _of(self, row: int) -> Value:
        """The value of an entry."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (_View, tuple)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)


class PackedRecords(_View[bytes]):
    """The records, packed."""

    def _of(self, row: int) -> bytes:
        return self._entries.packed(row)

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them, but for their names."""
        return int(self._entries.content_bytes[self._rows].sum())


class EntryImages(_View[tuple[str, ...]]):
    """The identities of the images."""

    def _of(self, row: int) -> tuple[str, ...]:
        return self._entries.images(row)


class EntryNames(_View[str]):
    """The sample ids."""

    def _of(self, row: int) -> str:
        name: str = self._entries.sample_ids[row].as_py()
        return name


class StampedRows(_View[Stamped]):
    """Sample id and stamp."""

    def _of(self, row: int) -> Stamped:
        return self._entries.sample_ids[row].as_py(), self._entries.stamps[row].tobytes()

    def names(self) -> pa.ChunkedArray:
        """String [n], the sample ids."""
        return self._entries.names_of(self._rows)

    def stamps(self) -> NDArray[np.uint8]:
        """uint8 [n, 8], the stamps."""
        return self._entries.stamps[self._rows]

    def __iter__(self) -> Iterator[Stamped]:
        """All of them, many at a time."""
        for start in range(0, len(self._rows), AT_ONCE):
            rows = self._rows[start : start + AT_ONCE]
            names = self._entries.names_of(rows).to_pylist()
            stamps = self._entries.stamps[rows].tobytes()
            yield from (
                (name, stamps[STAMP_BYTES * n : STAMP_BYTES * (n + 1)])
                for n, name in enumerate(names)
            )


def packed_bytes(records: Sequence[bytes]) -> int:
    """Bytes of packed records, about; those of a plan are not read for it."""
    if isinstance(records, PackedRecords):
        return records.total_bytes
    return sum(map(len, records))
