"""Read a whole file that may be somebody else's: a plain one, of bounded size.

Reading a pipe would never return; a device or a sparse file of a terabyte would fill the memory.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TypeAlias

from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import RemotePath

__all__ = ["MOST_JSON", "MOST_LINES", "MOST_VOCABULARY", "read_whole", "require_plain"]

MOST_JSON = 64 << 20  # bytes of a file that becomes one value: JSON takes up to 24 times of it
MOST_VOCABULARY = 256 << 20  # bytes of a tokenizer's file; those in use have up to 40 MB
MOST_LINES = 1 << 30  # bytes of a file whose lines become one value each
Readable: TypeAlias = Path | RemotePath


def read_whole(path: Readable, most: int = MOST_JSON) -> bytes:
    """The bytes of a file.

    Args:
        path: A plain file, or an object of a store.
        most: The most bytes that it may have.

    Raises:
        OSError: It is not there or cannot be read.
        DataError: It is larger, or neither a file nor a folder.
    """
    if isinstance(path, RemotePath):
        found = path.read_bounded(most)
        if isinstance(found, bytes):
            return found
        raise _too_large(path, found, most)
    require_plain(path, most)
    with path.open("rb") as file:
        return file.read(most)


def require_plain(path: Path, most: int) -> None:
    """Reject a file that is endless or too large, before a library reads all of it.

    Raises:
        OSError, DataError: As `read_whole`.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path}: a pipe, socket or device; expected a file, copy it again")
    _require_size(path, found.st_size, most)


def _require_size(path: Readable, size: int, most: int) -> None:
    if size > most:
        raise _too_large(path, size, most)


def _too_large(path: Readable, size: int, most: int) -> DataError:
    return DataError(f"{path}: {size} bytes; at most {most} are read, copy it again")
