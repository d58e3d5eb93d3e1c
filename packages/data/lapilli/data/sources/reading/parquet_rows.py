"""Read Parquet rows as Python values in bounded memory, skipping bad rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lapilli.data.errors import DataError
from lapilli.data.mounts.parquet_bounds import (
    DAMAGED_VALUES,
    Reopen,
    longest_value,
    row_sizes,
)
from lapilli.data.mounts.parquet_footer import Chunk, Footer
from lapilli.data.mounts.parquet_pages import Pages
from lapilli.data.record import excerpt
from lapilli.data.sources.reading.bounds import Bounds, Unreadable, too_large

__all__ = ["RowReader", "bounded_batches"]

BUDGET = 256 << 20  # bytes of values that are held at once
SKEW = 4  # times the mean, the values that one batch may have of a leaf
FEWEST = 16  # rows of a batch; where the values of fewer are too many, indices are read
INDEXED_ROWS = 1 << 16
LARGE_GROUP = 2 << 30  # bytes of pages; from such a row group rows are read one at a time


def bounded_batches(
    file: pq.ParquetFile,
    footer: Footer,
    reopen: Reopen,
    look: Callable[[Chunk], Pages],
    group: int,
    leaves: Sequence[str],
    rows: int,
) -> Iterator[pa.RecordBatch]:
    """A row group's values of some leaves, at most `rows` rows at once and fewer of large values.

    Where very large values stand in many rows, they come as indices into a dictionary. `look` is
    `read_pages` of this file.
    """
    facts = footer.groups[group]
    count = max(1, facts.num_rows)
    indexed: list[str] = []
    if sum(facts.chunks[leaf].uncompressed for leaf in leaves) > LARGE_GROUP:
        rows = 1
    for leaf in leaves:
        shared = longest_value(facts.chunks[leaf], reopen, look, group, leaf)
        most = max(1, int(shared.longest * max(1.0, shared.values / count) * SKEW))
        if BUDGET // most < FEWEST and shared.is_indexed:
            indexed.append(leaf)
        else:
            rows = max(1, min(rows, BUDGET // most))
    if indexed:
        file, rows = reopen(indexed), INDEXED_ROWS  # each batch holds the dictionary anew
    yield from file.iter_batches(rows, row_groups=[group], columns=[*leaves])


class RowReader:
    """Makes rows of batches, and counts what they unpack to."""

    def __init__(self, name: str, bounds: Bounds) -> None:
        self._name, self._bounds = name, bounds
        self._unpacked = 0

    def rows(self, batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Unreadable]:
        """Every row in order; `Unreadable` in the place of one that has no value in Python.

        Raises:
            DataError: All rows so far unpack to more than a file may.
        """
        sizes = np.zeros(batch.num_rows, np.int64)
        for column in batch.columns:
            sizes += row_sizes(column)
        start = 0
        while start < batch.num_rows:
            if sizes[start] > self._bounds.record:
                yield Unreadable(too_large(f"{sizes[start]} bytes", self._bounds.record))
                start += 1
                continue
            fitting = (np.cumsum(sizes[start:]) <= BUDGET) & (sizes[start:] <= self._bounds.record)
            count = max(1, len(fitting) if fitting.all() else int(np.argmin(fitting)))
            self._count(int(sizes[start : start + count].sum()))
            yield from _values(batch.slice(start, count))
            start += count

    def _count(self, size: int) -> None:
        self._unpacked += size
        if self._unpacked > self._bounds.unpacked:
            raise DataError(
                f"annotations: {self._name} unpacks to more than {self._bounds.unpacked} bytes; "
                "raise `max_unpacked_bytes` of its source if it may, or write it again"
            )


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Unreadable]:
    columns = [_in_microseconds(column) for column in batch.columns]
    batch = pa.RecordBatch.from_arrays(columns, batch.schema.names)
    try:
        yield from batch.to_pylist()
    except DAMAGED_VALUES as error:
        if batch.num_rows > 1:
            for row in range(batch.num_rows):
                yield from _values(batch.slice(row, 1))
        else:
            why = excerpt(" ".join(str(error).split()))
            yield Unreadable(f"a value that cannot be read ({why})")


def _in_microseconds(values: pa.Array) -> pa.Array:
    """Times as Python has them, which knows no nanoseconds."""
    kind = values.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pc.cast(values, pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return pc.cast(values, pa.time64("us"), safe=False)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pc.cast(values, pa.duration("us"), safe=False)
    return values
