"""Locations of an image's bytes: a file, an archive member, a Parquet cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "ARCHIVES",
    "EXTENSIONS",
    "LARGEST_FILE",
    "Cell",
    "Located",
    "Member",
]

# Extensions that image files have; a name's last part is an extension only if it is one of these.
# Another extension is a repair only if the file found claims to be an image: a caption or a
# feature file of the same stem is not the image.
EXTENSIONS = frozenset(
    {
        ".apng", ".avif", ".bmp", ".cur", ".dds", ".dib", ".gif", ".heic", ".heif", ".icns",
        ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx",
        ".jxl", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras",
        ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
    }
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".parquet")

# Bytes of a file that is still read as an image. Pillow's largest picture takes 0.5 GB as plain
# RGB; a larger file is no picture, or a bomb.
LARGEST_FILE = 1 << 30


class Member(NamedTuple):
    """A member of an archive.

    Attributes:
        offset: Where its bytes begin in a tar, its local header in a zip.
        stored: Bytes it takes in the archive.
        size: Bytes it unpacks to.
        method: `tar`, or a zip's compression method (0 stored, 8 deflated).
        crc: CRC-32 of the unpacked bytes; 0 in a tar, which has none.
    """

    offset: int
    stored: int
    size: int
    method: int | str
    crc: int


class Cell(NamedTuple):
    """An image in a Parquet file.

    Attributes:
        column: The column.
        group: The row group.
        row: The row in it.
        entry: Which of a list; -1 in a column without lists.
        size: Bytes, the mean of its row group: those of one image are not known unread.
    """

    column: str
    group: int
    row: int
    entry: int
    size: int

    @property
    def stored(self) -> int:
        """Bytes it takes in the file, as far as is known."""
        return self.size


@dataclass(frozen=True, slots=True)
class Located:
    """An image found: its identity, and where and what to read.

    Attributes:
        image_id: Container and member as one path below the root, links followed, so that two
            spellings of one image agree; an absolute path or an address for images elsewhere.
        container: The file to open: a path below the root, an absolute path or an address.
        size: Bytes of the container.
        mtime_ns: When the container was last written; a change before the reading is noticed.
        member: Which part of the container; None for all of it.
        repair: How the key differs from the name found (a kind of `lapilli.data.mounts.repairs`),
            or "".
    """

    image_id: str
    container: str
    size: int
    mtime_ns: int
    member: Member | Cell | None = None
    repair: str = ""
