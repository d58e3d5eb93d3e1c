"""Packed records in a temporary file, so that a plan of any size stays out of memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from lapilli.data.planning.parts.disk_column import temporary_file, unwritable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RecordFile"]

APART = 128  # records


class RecordFile:
    """The contents of records, one after another, in a file without a name below `TMPDIR`.

    It is gone with the last plan that refers to it.
    """

    def __init__(self) -> None:
        self._file = temporary_file(0)
        self._pieces: list[NDArray[np.uint32]] = []
        self._starts: NDArray[np.int64] | None = None

    def append(self, contents: pa.ChunkedArray) -> None:
        """Add the contents of some records; null is nothing.

        Raises:
            DataError: The disk is full.
        """
        for chunk in contents.chunks:
            column = cast("Any", chunk)
            _, offsets, values = column.buffers()
            starts = np.frombuffer(offsets, np.int32)[column.offset :][: len(column) + 1]
            self._pieces.append(np.diff(starts).astype(np.uint32))
            self._write(memoryview(values or b"")[starts[0] : starts[-1]])
        self._starts = None

    def _write(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise unwritable(error) from None

    def truncate(self, count: int) -> None:
        """Forget all records but the first `count`."""
        lengths = self.lengths[:count]
        self._file.truncate(size := int(lengths.sum(dtype=np.int64)))
        self._file.seek(size)
        self._pieces, self._starts = [lengths.copy()], None

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """uint32 [n], the bytes of each record."""
        if len(self._pieces) != 1:
            self._pieces = [np.concatenate([np.zeros(0, np.uint32), *self._pieces])]
        return self._pieces[0]

    def read(self, number: int) -> bytes:
        """The content of one record."""
        lengths = self.lengths
        if self._starts is None:  # of every `APART`th record: half a byte a record and not 8
            sums = np.add.reduceat(lengths, np.arange(0, len(lengths), APART), dtype=np.int64)
            self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sums)])
        block = number // APART
        between = int(lengths[block * APART : number].sum(dtype=np.int64))
        start = int(self._starts[block]) + between
        return os.pread(self._file.fileno(), int(lengths[number]), start)
