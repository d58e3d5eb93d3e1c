"""What the pages of a Parquet column chunk hold, by their own headers.

A reader goes by the pages, whatever the footer says of their encodings. The headers are read, and
of values that go on from each other their lengths; the values themselves are not.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lapilli.data.mounts.parquet_footer import ENCODINGS, Chunk, Compact

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Pages", "read_pages"]

LARGEST_PAGE = (1 << 30) + (1 << 20)  # bytes: the largest image, and others beside it
MOST_PAGES = 1 << 18  # of a chunk
MOST_IN_LISTS = 1 << 26  # values of a chunk: one row may hold all of them
MOST_LINKED = 1 << 30  # bytes that the values of such a chunk unpack to
HEADER, LARGEST_HEADER = 1 << 9, 1 << 24  # bytes
LARGEST_MINI_BLOCK = 1 << 16  # values
DICTIONARY, DATA, DATA_V2 = 7, 5, 8  # fields of a page's header, one of which it has
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


@dataclass(frozen=True, slots=True)
class Pages:
    """A chunk as its pages have it.

    Attributes:
        encodings: Those of `ENCODINGS` that they have.
        has_dictionary: Whether a dictionary is among them.
        longest: Bytes of the longest of values that go on from each other (`DELTA_BYTE_ARRAY`).
        linked: Bytes that all of these unpack to.
    """

    encodings: frozenset[str]
    has_dictionary: bool
    longest: int
    linked: int


def read_pages(file: IO[bytes], chunk: Chunk, *, ahead: bool = False) -> Pages:
    """Look at the pages of a chunk.

    Args:
        file: The whole file.
        chunk: What the footer says.
        ahead: Read the chunk at once, where a read costs a request.

    Raises:
        pa.ArrowInvalid: They are not what the footer says, or hold more than is read.
    """
    if ahead:
        file.seek(chunk.start)
        file, start = io.BytesIO(file.read(chunk.compressed)), 0
    else:
        start = chunk.start
    values = unpacked = longest = linked = 0
    encodings, has_dictionary = set[int](), False
    for header, at in _headers(file, start, start + chunk.compressed):
        unpacked += _size(header, 2, LARGEST_PAGE)
        has_dictionary |= DICTIONARY in header
        if DATA not in header and DATA_V2 not in header:
            continue
        page: Any = header[DATA if DATA in header else DATA_V2]
        if not isinstance(page, dict):
            raise pa.ArrowInvalid("a page's header that is none")
        values += (count := _size(page, 1, chunk.num_values))
        encodings.add(encoding := _size(page, 2 if DATA in header else 4, 255))
        if encoding in (6, 7) and chunk.physical_type.endswith("BYTE_ARRAY"):
            body = _unpacked(file, header, at, chunk)
            sizes = _lengths(body, None if DATA in header else 0, chunk, encoding, count)
            longest = max(longest, int(sizes.max(initial=0)))
            linked += int(sizes.sum())
    _check(chunk, values, unpacked, linked)
    named = frozenset(ENCODINGS[code] for code in encodings if code in ENCODINGS)
    return Pages(named, has_dictionary, longest, linked)


def _check(chunk: Chunk, values: int, unpacked: int, linked: int) -> None:
    if values != chunk.num_values:
        raise pa.ArrowInvalid(f"pages of {values} values; the footer says {chunk.num_values}")
    if unpacked > chunk.uncompressed:
        raise pa.ArrowInvalid(f"pages of {unpacked} bytes; the footer says {chunk.uncompressed}")
    if chunk.max_repetition and (values > MOST_IN_LISTS or linked > MOST_LINKED):
        raise pa.ArrowInvalid(
            f"a row group with {values} values in lists, of {linked} bytes; at most "
            f"{MOST_IN_LISTS} and {MOST_LINKED} are read, write it with smaller row groups"
        )


def _headers(file: IO[bytes], start: int, end: int) -> Iterator[tuple[dict[int, Any], int]]:
    """The header of each page and where its body begins."""
    for _ in range(MOST_PAGES):
        if start >= end:
            return
        size = HEADER
        while True:
            file.seek(start)
            thrift = Compact(file.read(min(size, end - start)))
            try:
                header = thrift.struct()
                break
            except IndexError:
                if size > min(end - start, LARGEST_HEADER):
                    raise pa.ArrowInvalid("a page's header is cut off") from None
                size *= 8
            except RecursionError:
                raise pa.ArrowInvalid("a page's header that is none") from None
        body = start + thrift.at
        start = body + _size(header, 3, end - body)
        yield header, body
    raise pa.ArrowInvalid(f"a column of more than {MOST_PAGES} pages in a row group")


def _size(fields: dict[int, Any], number: int, most: int) -> int:
    found = fields.get(number)
    if type(found) is not int or not 0 <= found <= most:
        raise pa.ArrowInvalid(f"a page of {found} values or bytes; expected at most {most}")
    return found


def _unpacked(file: IO[bytes], header: dict[int, Any], at: int, chunk: Chunk) -> bytes:
    """A page's body; of version 2 without its levels, which are never compressed."""
    file.seek(at)
    body = file.read(header[3])
    size, page = header[2], None if DATA in header else header[DATA_V2]
    if page is not None:
        levels = _size(page, 5, len(body)) + _size(page, 6, len(body))
        body, size = body[levels:], size - levels
    if not chunk.codec or (page is not None and not page.get(7, True)) or not body:
        return body
    if chunk.codec not in CODECS or size < 0:
        raise pa.ArrowInvalid(f"a page compressed by codec {chunk.codec}; write it with zstd")
    return pa.Codec(CODECS[chunk.codec]).decompress(body, size, asbytes=True)


def _lengths(
    body: bytes, at: int | None, chunk: Chunk, encoding: int, count: int
) -> NDArray[np.int64]:
    """Bytes of each value of a page; none where each is stored separately.

    Args:
        body: The page.
        at: Where the values begin; None behind the levels of a page of version 1.
        chunk: The chunk.
        encoding: `DELTA_LENGTH_BYTE_ARRAY` or `DELTA_BYTE_ARRAY`.
        count: Values, nulls included.
    """
    if count > MOST_IN_LISTS:
        raise pa.ArrowInvalid(f"a page of {count} values; at most {MOST_IN_LISTS} are read")
    if at is None:
        at = 0
        for level in (chunk.max_repetition, chunk.max_definition):
            at += 4 + int.from_bytes(body[at : at + 4], "little") if level else 0
    first, at = _deltas(body, at, count)
    if encoding == 6:
        return np.zeros(0, np.int64)
    rest, _ = _deltas(body, at, count)
    if len(first) != len(rest) or min(first.min(initial=0), rest.min(initial=0)) < 0:
        raise pa.ArrowInvalid("a page of lengths that are none")
    return first + rest


def _deltas(data: bytes, at: int, most: int) -> tuple[NDArray[np.int64], int]:
    """Numbers in Parquet's DELTA_BINARY_PACKED, at most so many, and the place behind them."""
    thrift = Compact(data, at)
    try:
        block, minis, count = thrift.varint(), thrift.varint(), thrift.varint()
        found = [np.array([thrift.zigzag()], np.int64)]
        each = block // minis if minis else 0
        if count > most or not 0 < each <= LARGEST_MINI_BLOCK or each % 8 or minis > len(data):
            raise pa.ArrowInvalid(f"a page with lengths of {count} values; it has {most}")
        left = count - 1
        while left > 0:
            least = thrift.zigzag()
            for width in thrift.bytes(minis):
                if left <= 0:
                    break
                packed = np.frombuffer(thrift.bytes(each * width // 8), np.uint8)
                bits = np.unpackbits(packed, bitorder="little").reshape(each, width)[:left]
                if width > 32:
                    raise pa.ArrowInvalid(f"lengths of {width} bits")
                found.append(bits @ (1 << np.arange(width, dtype=np.int64)) + least)
                left -= len(bits)
    except IndexError:
        raise pa.ArrowInvalid("a page's lengths are cut off") from None
    return np.cumsum(np.concatenate(found)[:count]), thrift.at
