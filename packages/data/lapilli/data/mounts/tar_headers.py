"""Read the headers of an untrusted tar in bounded memory.

`tarfile` loops if a size leads backwards, and trusts the length that a header states for itself.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, cast

__all__ = ["bounded", "followed", "headers", "link_target"]

LONGEST_HEADER = 1 << 20  # bytes of a name or of pax records; no file system takes more
LONGEST_CHAIN = 16  # links of links
DEEPEST_LINK = 512  # parts of a path that a link leads to
BEHIND_END = 1 << 16  # bytes looked at behind the end: tar pads to 10,240, or a few times that


class _BoundedHeaders:
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
    return cast("IO[bytes]", _BoundedHeaders(file))


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Each member once; behind one whose size leads backwards the next header is read.

    Raises:
        tarfile.TarError, OSError, ValueError, OverflowError: The tar is damaged, cut short, or
            followed by another.
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
    _require_end(tar)


def link_target(info: tarfile.TarInfo) -> str:
    """Where a link leads, from the tar's top: a hard link's name is, a soft link's is not yet."""
    above = posixpath.dirname(info.name) if info.issym() else ""
    return posixpath.join(above, info.linkname)


def followed(path: str, links: Mapping[str, str]) -> str | None:
    """The path that a member's path comes to, through links to members and to folders.

    Args:
        path: From the tar's top.
        links: By the path of a link its `link_target`.

    Returns:
        The path, which no member may have; None if it leads out of the tar, in a circle, or on
        and on.
    """
    left, found = path.split("/")[::-1], list[str]()
    chain = 0
    while left:
        part = left.pop()
        if part == ".." and not found:
            return None
        if part == "..":
            found.pop()
        elif part not in ("", "."):
            found.append(part)
            target = links.get("/".join(found))
            if target is not None:
                chain += 1
                left += target.split("/")[::-1]
                found.clear()
                if chain > LONGEST_CHAIN or target.startswith("/") or len(left) > DEEPEST_LINK:
                    return None
    return "/".join(found)


def _require_end(tar: tarfile.TarFile) -> None:
    """Stop where `tarfile` does not: it takes a header that it cannot read for the end of the tar.

    Raises:
        tarfile.ReadError: No end of a tar, or not the end of this file.
    """
    file = cast("IO[bytes]", tar.fileobj)
    file.seek(tar.offset)
    found = file.read(tarfile.BLOCKSIZE)
    if found and len(found) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut short in the header at byte {tar.offset}")
    if found.strip(tarfile.NUL):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
    if found and file.read(BEHIND_END).strip(tarfile.NUL):
        raise tarfile.ReadError(
            f"more than a tar: bytes follow behind its end at byte {tar.offset}, as where tars "
            "were joined with cat; join them with tar -A"
        )
