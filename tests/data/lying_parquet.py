"""Parquet files whose pages hold something else than their footers say.

pyarrow writes a file; its Thrift is taken apart, changed and put together again.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["Fields", "Page", "rewritten", "varint"]

Fields: TypeAlias = dict[int, tuple[int, Any]]  # of a struct: number, kind and value
Page: TypeAlias = tuple[Fields, bytes]  # header and body
META, SIZE, OFFSETS = 3, 7, (9, 11)  # fields of a column chunk's metadata
UNCOMPRESSED, COMPRESSED = 2, 3  # fields of a page's header


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def value(self, kind: int) -> Any:
        if kind == 12:
            return self.struct()
        if kind == 9:
            head = self.take(1)[0]
            count = self.varint() if head >> 4 == 15 else head >> 4
            return head & 15, [self.value(head & 15) for _ in range(count)]
        if kind == 8:
            return self.take(self.varint())
        if kind in (4, 5, 6):
            found = self.varint()
            return found >> 1 ^ -(found & 1)
        return self.take(8 if kind == 7 else 1)

    def struct(self) -> Fields:
        fields: Fields = {}
        number = 0
        while head := self.take(1)[0]:
            found = self.varint() if not head >> 4 else 0
            number = number + (head >> 4) if head >> 4 else found >> 1
            kind = head & 15
            fields[number] = (kind, b"" if kind in (1, 2) else self.value(kind))
        return fields


def varint(value: int) -> bytes:
    """Thrift's and Parquet's ULEB128."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _encoded(kind: int, value: Any) -> bytes:
    if kind == 12:
        out = bytearray()
        for number, (inner, item) in sorted(value.items()):
            out += bytes([inner]) + varint(number << 1)
            out += b"" if inner in (1, 2) else _encoded(inner, item)
        return bytes(out) + b"\0"
    if kind == 9:
        inner, items = value
        body = b"".join(_encoded(inner, item) for item in items)
        return bytes([0xF0 | inner]) + varint(len(items)) + body
    if kind == 8:
        return varint(len(value)) + value
    if kind in (4, 5, 6):
        return varint(value << 1 if value >= 0 else -value * 2 - 1)
    return value


def rewritten(
    table: pa.Table,
    column: str,
    change: Callable[[list[Page], Fields], list[Page]],
    rows: int | None = None,
    **options: Any,
) -> bytes:
    """A file of one row group in which `change` had the pages of a leaf and its metadata.

    Args:
        table: What pyarrow writes.
        column: The dotted path of the leaf.
        change: Is given the pages, whose sizes are set behind it, and the chunk's metadata.
        rows: Rows that the file is said to have; None for those it has.
        options: pyarrow's.
    """
    file = io.BytesIO()
    pq.write_table(table, file, write_statistics=False, **options)
    data = file.getvalue()
    end = len(data) - 8
    footer = _Reader(data, end - int.from_bytes(data[end : end + 4], "little")).struct()
    (group,) = footer[4][1][1]
    out = bytearray(b"PAR1")
    for chunk in group[1][1][1]:
        meta: Fields = chunk[META][1]
        reader = _Reader(data, min(meta[n][1] for n in OFFSETS if n in meta))
        stop, pages = reader.at + meta[SIZE][1], list[Page]()
        while reader.at < stop:
            header = reader.struct()
            pages.append((header, reader.take(header[COMPRESSED][1])))
        if ".".join(name.decode() for name in meta[3][1][1]) == column:
            pages = change(pages, meta)
        start = len(out)
        for header, body in pages:
            header[COMPRESSED] = (5, len(body))
            if _is_plain(meta):
                header[UNCOMPRESSED] = (5, len(body))
            out += _encoded(12, header) + body
        meta[SIZE] = (6, len(out) - start)
        if _is_plain(meta):
            meta[6] = meta[SIZE]
        meta.pop(11, None)
        meta[9] = (6, start)
        for number in (10, 13, 14, 15):
            meta.pop(number, None)
        for number in (4, 5, 6, 7):
            chunk.pop(number, None)
        chunk[2] = (6, start)
    if rows is not None:
        footer[3], group[3] = (6, rows), (6, rows)
    thrift = _encoded(12, footer)
    return bytes(out) + thrift + len(thrift).to_bytes(4, "little") + b"PAR1"


def _is_plain(meta: Fields) -> bool:
    """Whether a chunk's pages are not compressed."""
    return meta[4][1] == 0
