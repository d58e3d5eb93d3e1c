"""Strip what an image file holds beside its pixels: texts, profiles, previews, camera data.

It is asked for when a file cannot be decoded: a damaged or overlong piece of side data makes Pillow
refuse pixels that are whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

__all__ = ["without_side_data"]

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_KEPT_CHUNKS = (b"tRNS", b"eXIf")  # transparency and orientation, where they are undamaged
_KEPT_BYTES = 1 << 16
_ANCILLARY = 0x20  # the bit that makes a chunk's first letter small
_START_OF_SCAN = 0xDA
_ADOBE = 0xEE  # says how colours are stored
_JFIF, _JFIF_BYTES = 0xE0, 18
_SIDE_MARKERS = frozenset([*range(0xE1, 0xF0), 0xFE]) - {_ADOBE}


def without_side_data(data: bytes) -> bytes | None:
    """The file without side data; None if it has none or is not a PNG or JPEG."""
    if data.startswith(_PNG):
        kept = b"".join(_png_chunks(data))
    elif data.startswith(_JPEG):
        kept = b"".join(_jpeg_segments(data))
    else:
        return None
    return kept if len(kept) < len(data) else None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The chunks that make the pixels; from one that runs past the end on, all as it is."""
    yield _PNG
    at = len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        if end > len(data) or not name.isalpha():
            break
        if not name[0] & _ANCILLARY or (name in _KEPT_CHUNKS and _is_sound(data[at:end])):
            yield data[at:end]
        at = end
    yield data[at:]


def _is_sound(chunk: bytes) -> bool:
    return len(chunk) < _KEPT_BYTES and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    """The segments up to the first scan without applications' own and comments, then all."""
    yield _JPEG
    at = len(_JPEG)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fills up
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == _START_OF_SCAN or end > len(data):
            break
        is_cut = marker == _JFIF and end - at < _JFIF_BYTES
        if marker not in _SIDE_MARKERS and not is_cut:
            yield data[at:end]
        at = end
    yield data[at:]
