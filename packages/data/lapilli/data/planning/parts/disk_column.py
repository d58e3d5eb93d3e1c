"""A column of a plan in a temporary file, mapped when it is read: it takes no memory of its own."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from lapilli.data.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

__all__ = ["DiskColumn", "temporary_file", "unwritable"]

BUFFERED = 1 << 20  # bytes


class DiskColumn:
    """Values of one type, one after another, in a file without a name below `TMPDIR`."""

    def __init__(self, dtype: DTypeLike, width: int = 1) -> None:
        """An empty column.

        Args:
            dtype: The type of a number.
            width: Numbers of a row; of more than 1 the array has two dimensions.
        """
        self._dtype, self._width = np.dtype(dtype), width
        self._file = temporary_file(BUFFERED)

    def append(self, data: Any) -> None:
        """Add the bytes of some rows.

        Raises:
            DataError: The disk is full.
        """
        try:
            self._file.write(data)
        except OSError as error:
            raise unwritable(error) from None

    def array(self) -> NDArray[Any]:
        """All rows; what is written into the array is kept in the file.

        Raises:
            DataError: The disk is full.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise unwritable(error) from None
        if self._file.tell():
            mapped: NDArray[Any] = np.memmap(self._file, self._dtype, "r+")
        else:  # there is no map of an empty file
            mapped = np.zeros(0, self._dtype)
        rows = mapped.size // self._width
        return mapped.view(np.ndarray).reshape((rows, self._width) if self._width > 1 else (rows,))


def temporary_file(buffering: int) -> BinaryIO:
    """A file without a name below `TMPDIR`, which is gone when nothing refers to it.

    Raises:
        DataError: There is no room, or no right.
    """
    try:
        file = tempfile.TemporaryFile(prefix="lapilli-plan-", buffering=buffering)  # noqa: SIM115
    except OSError as error:
        raise unwritable(error) from None
    return cast("BinaryIO", file)


def unwritable(error: OSError) -> DataError:
    """That a plan's file cannot be written, and what to do."""
    return DataError(
        f"{tempfile.gettempdir()}: the plan's records cannot be written ({error.strerror}); "
        "free space there or set TMPDIR"
    )
