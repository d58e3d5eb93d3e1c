"""The headers of a tar of strangers, one after the other, in bounded memory.

`tarfile` reads a header again and again where a size leads backwards, and takes whatever a header
says of its own length for a length.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, cast

__all__ = ["bounded", "headers"]

LONGEST_HEADER = 1 << 20  # bytes of a name or of pax records; no file system takes more


class _Bounded:
    """A file for `tarfile`, which reads no header that is longer than `LONGEST_HEADER`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.name = getattr(file, "name", None)
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes.

        Raises:
            tarfile.ReadError: They are more than a header has.
        """
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes; at most {LONGEST_HEADER} are read")
        return self._file.read(size)


def bounded(file: IO[bytes]) -> IO[bytes]:
    """A tar for `tarfile.open`, which is kept from headers of more than `LONGEST_HEADER` bytes."""
    return cast("IO[bytes]", _Bounded(file))


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Each member once; behind one whose size leads backwards the next header is read.

    Raises:
        tarfile.TarError, OSError, ValueError, OverflowError: The tar is damaged.
        RecursionError: Headers of headers without an end.
    """
    end = -1
    while (info := tar.next()) is not None:
        if tar.offset <= max(end, info.offset):
            tar.offset = info.offset_data
        end = info.offset
        yield info
        # A member of tarfile's takes 1 KB; a tar has a million of them.
        tar.members = cast("list[tarfile.TarInfo]", [])  # pyright: ignore[reportAttributeAccessIssue]
