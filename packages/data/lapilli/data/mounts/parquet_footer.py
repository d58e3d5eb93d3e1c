"""What a Parquet file's footer says of its row groups, checked before it is used.

pyarrow's view of a column chunk crashes the process if statistics in the footer do not fit their
column. Arrow parses the footer; the numbers are taken from the Thrift that it writes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["ENCODINGS", "Chunk", "Compact", "Footer", "RowGroup", "read_footer"]

ENCODINGS = {2: "PLAIN_DICTIONARY", 7: "DELTA_BYTE_ARRAY", 8: "RLE_DICTIONARY"}
MAGIC, LENGTH = 4, 4  # bytes before a footer, and of its length behind it


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column's values in a row group.

    Attributes:
        physical_type: As Parquet calls it, such as `BYTE_ARRAY`.
        encodings: Those of `ENCODINGS` that its pages are said to have.
        has_dictionary: Whether a dictionary's page is among them.
        num_values: Values, nulls and the empty places of lists included.
        null_count: Nulls among them, if the file says so.
        start: Where its bytes begin in the file.
        compressed: Bytes that it takes in the file.
        uncompressed: Bytes that its pages unpack to.
        codec: Thrift's number of how they are compressed; 0 for not.
        type_length: Bytes of a `FIXED_LEN_BYTE_ARRAY`.
        max_repetition: Lists in each other that its values are in.
        max_definition: Lists and optional fields that its values are in.
    """

    physical_type: str
    encodings: frozenset[str]
    has_dictionary: bool
    num_values: int
    null_count: int | None
    start: int
    compressed: int
    uncompressed: int
    codec: int
    type_length: int
    max_repetition: int
    max_definition: int

    @property
    def not_null(self) -> int | None:
        """Values that are not null, if the file says so."""
        return None if self.null_count is None else self.num_values - self.null_count


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are stored together, by leaf the chunk of their values."""

    num_rows: int
    chunks: Mapping[str, Chunk]


@dataclass(frozen=True, slots=True)
class Footer:
    """The row groups of a file and the dotted paths of its leaves, in their order."""

    groups: tuple[RowGroup, ...]
    leaves: tuple[str, ...]


def read_footer(file: pq.ParquetFile) -> Footer:
    """The row groups of an open file.

    Raises:
        pa.ArrowInvalid: A count or place is negative, a row group has not every column, or what
            the groups hold is not what the file is said to.
    """
    columns = [file.schema.column(number) for number in range(len(file.schema))]
    leaves = tuple(column.path for column in columns)
    written = io.BytesIO()
    file.metadata.write_metadata_file(written)
    thrift = Compact(written.getvalue()[MAGIC : -MAGIC - LENGTH])
    groups = tuple(_group(fields, leaves, columns) for fields in thrift.struct().get(4, []))
    return Footer(groups, leaves)


def _group(fields: dict[int, Any], leaves: tuple[str, ...], schemas: list[Any]) -> RowGroup:
    columns = [column.get(3, {}) for column in fields.get(1, [])]
    if len(columns) != len(leaves):
        raise pa.ArrowInvalid(f"a row group of {len(columns)} columns; the schema: {len(leaves)}")
    chunks = map(_chunk, columns, schemas)
    return RowGroup(_count(fields, 3), dict(zip(leaves, chunks, strict=True)))


def _chunk(fields: dict[int, Any], schema: Any) -> Chunk:
    start = _count(fields, 9)
    if dictionary := _count(fields, 11, 0):
        start = min(start, dictionary)
    nulls = _count(fields.get(12, {}), 3, None)
    encodings = frozenset(ENCODINGS[code] for code in fields.get(2, []) if code in ENCODINGS)
    return Chunk(
        physical_type=schema.physical_type, encodings=encodings, has_dictionary=11 in fields,
        num_values=_count(fields, 5), null_count=nulls, start=start,
        compressed=_count(fields, 7), uncompressed=_count(fields, 6), codec=_count(fields, 4),
        type_length=schema.length, max_repetition=schema.max_repetition_level,
        max_definition=schema.max_definition_level,
    )  # fmt: skip


def _count(fields: dict[int, Any], number: int, otherwise: Any = -1) -> Any:
    """A field that must be 0 or more."""
    value = fields.get(number, otherwise)
    if value is not None and value < 0:
        raise pa.ArrowInvalid(f"a count or place of {value}")
    return value


class Compact:
    """Thrift's compact protocol: structs as mappings of field numbers to values.

    Every method raises IndexError at the end of the data, and ArrowInvalid for other data.
    """

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data, self.at = data, at

    def varint(self) -> int:
        """A number without a sign."""
        value = shift = 0
        while (byte := self._data[self.at]) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            self.at += 1
            if shift > 63:
                raise pa.ArrowInvalid("a number of more than 64 bits")
        self.at += 1
        return value | byte << shift

    def zigzag(self) -> int:
        """A number with a sign."""
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def bytes(self, count: int) -> bytes:
        """So many bytes."""
        if count > len(self._data) - self.at:
            raise IndexError
        self.at += count
        return self._data[self.at - count : self.at]

    def _value(self, kind: int) -> Any:
        if 4 <= kind <= 6:
            return self.zigzag()
        if kind == 8:
            return self.bytes(self.varint())
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            return self._list()
        if kind <= 3:  # of a list, a truth takes a byte as well
            return self.bytes(1)
        if kind == 7:
            return self.bytes(8)
        raise pa.ArrowInvalid(f"a footer or page with a value of kind {kind}")

    def _list(self) -> list[Any]:
        head = self.bytes(1)[0]
        count = head >> 4
        return [self._value(head & 0xF) for _ in range(self.varint() if count == 15 else count)]

    def struct(self) -> dict[int, Any]:
        """The struct at this place."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._data[self.at]:
            self.at += 1
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            kind = head & 0xF
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        self.at += 1
        return fields
