"""Packed records in a temporary file, so that a plan of any size stays out of memory."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa

from lapilli.data.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RecordFile"]


class RecordFile:
    """The contents of records, one after another, in a file without a name below `TMPDIR`.

    It is gone with the last plan that refers to it.
    """

    def __init__(self) -> None:
        try:
            file = tempfile.TemporaryFile(prefix="lapilli-plan-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _unwritable(error) from None
        self._file = cast("BinaryIO", file)
        self._lengths: list[NDArray[np.uint32]] = []
        self._ends: NDArray[np.int64] | None = None

    def append(self, contents: pa.ChunkedArray) -> None:
        """Add the contents of some records; null is nothing.

        Raises:
            DataError: The disk is full.
        """
        for chunk in contents.chunks:
            column = cast("Any", chunk)
            _, offsets, values = column.buffers()
            starts = np.frombuffer(offsets, np.int32)[column.offset :][: len(column) + 1]
            self._lengths.append(np.diff(starts).astype(np.uint32))
            self._write(memoryview(values or b"")[starts[0] : starts[-1]])
        self._ends = None

    def _write(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _unwritable(error) from None

    def truncate(self, count: int) -> None:
        """Forget all records but the first `count`."""
        lengths = self.lengths[:count]
        self._file.truncate(size := int(lengths.sum(dtype=np.int64)))
        self._file.seek(size)
        self._lengths, self._ends = [lengths], None

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """uint32 [n], the bytes of each record."""
        if len(self._lengths) > 1:
            self._lengths = [np.concatenate(self._lengths)]
        return self._lengths[0] if self._lengths else np.zeros(0, np.uint32)

    def read(self, number: int) -> bytes:
        """The content of one record."""
        if self._ends is None:
            self._ends = np.cumsum(self.lengths, dtype=np.int64)
        size = int(self.lengths[number])
        return os.pread(self._file.fileno(), size, int(self._ends[number]) - size)


def _unwritable(error: OSError) -> DataError:
    return DataError(
        f"{tempfile.gettempdir()}: the plan's records cannot be written ({error.strerror}); "
        "free space there or set TMPDIR"
    )
