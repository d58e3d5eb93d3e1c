"""Parquet files as image containers: `FILE.parquet/COLUMN/ROW[/INDEX]`.

A column holds images if it is binary, Hugging Face's struct of `bytes` and `path`, or a list of
either. Only the footer is read to find an image; its bytes come with those of its row group, of
which a process keeps the last two it has read: readers at a boundary would read each many times.
"""

from __future__ import annotations

import functools
import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data.images.view import BadImage
from lapilli.data.mounts.archives import BadArchive
from lapilli.data.mounts.parquet_bounds import longest_value
from lapilli.data.mounts.parquet_footer import Chunk, Footer, read_footer
from lapilli.data.mounts.parquet_pages import read_pages
from lapilli.data.mounts.places import LARGEST_FILE, Cell
from lapilli.data.record import Reason, excerpt

__all__ = ["ImageColumn", "Rows", "Table", "image_columns", "read_cell", "read_table"]

KEPT_GROUPS = 2
MOST_SHARED = 1 << 32  # bytes of values that rows share; of more only indices are held
PART = 1 << 20  # bytes
BATCH = 64  # rows decoded at once: nested bytes of 2 GB have no one array
Opened: TypeAlias = Callable[[], IO[bytes]]
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class ImageColumn(NamedTuple):
    """A column with images.

    Attributes:
        name: The column.
        leaf: The dotted path of its bytes in the file.
        is_list: Whether a row holds a list of images.
        is_struct: Whether an image is a struct of `bytes`, perhaps with a `path`.
        path: The dotted path of the names beside the bytes, or "".
    """

    name: str
    leaf: str
    is_list: bool
    is_struct: bool
    path: str


@dataclass(frozen=True)
class Table:
    """What a footer says of a file's images.

    Attributes:
        columns: The columns that hold images, by name.
        starts: The first row of each row group, and behind them the number of rows.
        sizes: Mean bytes of an image by column and row group.
    """

    columns: Mapping[str, ImageColumn]
    starts: tuple[int, ...]
    sizes: Mapping[tuple[str, int], int]

    def cell(self, column: str, row: int, index: int) -> Cell:
        """The place of an image; `index` is -1 in a column without lists."""
        group = bisect_right(self.starts, row) - 1
        size = self.sizes[column, group]
        return Cell(
            column=column, group=group, row=row - self.starts[group], entry=index, size=size
        )


class Rows(Mapping[str, int]):
    """The numbers below `count` as names, each with one spelling; never listed."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __getitem__(self, name: str) -> int:
        """The number that a name spells."""
        if name.isascii() and name.isdecimal() and len(name) < 16:
            number = int(name)
            if number < self._count and str(number) == name:
                return number
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        """Nothing: no repair makes one row of another."""
        return iter(())

    def __len__(self) -> int:
        """How many there are."""
        return self._count


def image_columns(file: pq.ParquetFile) -> dict[str, ImageColumn]:
    """The columns of a file that hold bytes of images, or of anything like them, by name."""
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    found: dict[str, ImageColumn] = {}
    for field in file.schema_arrow:
        kind, is_list = _value_type(field.type), False
        if any(check(kind) for check in LISTS):
            kind, is_list = _value_type(kind.value_type), True
        is_struct = pa.types.is_struct(kind)
        names = [kind.field(n).name for n in range(kind.num_fields)] if is_struct else []
        bytes_kind = kind.field("bytes").type if "bytes" in names else None if is_struct else kind
        if bytes_kind is None or not is_binary(_value_type(bytes_kind)):
            continue
        own = [leaf for leaf in leaves if leaf == field.name or leaf.startswith(f"{field.name}.")]
        end = ".bytes" if is_struct else ""
        leaf = next((leaf for leaf in own if leaf.endswith(end)), "")
        if not leaf:
            continue
        path = next((leaf for leaf in own if is_struct and leaf.endswith(".path")), "")
        found[field.name] = ImageColumn(
            name=field.name, leaf=leaf, is_list=is_list, is_struct=is_struct, path=path
        )
    return found


def _value_type(kind: pa.DataType) -> pa.DataType:
    """The type itself, or that of a dictionary's values: an `ARROW:schema` may say so of bytes."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes and not text."""
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks) or str(kind) == "binary_view"


def read_table(file: IO[bytes], name: str) -> Table:
    """What a file's footer says of its images.

    Raises:
        BadArchive: No whole Parquet file.
    """
    try:
        parquet = pq.ParquetFile(file)
        columns, footer = image_columns(parquet), read_footer(parquet)
        starts, sizes = [0], dict[tuple[str, int], int]()
        for number, group in enumerate(footer.groups):
            starts.append(starts[-1] + group.num_rows)
            for column in columns.values():
                chunk = group.chunks[column.leaf]
                mean = chunk.uncompressed // max(1, chunk.num_values)
                sizes[column.name, number] = max(1, mean)
    except (
        pa.ArrowException,
        OSError,
        UnicodeError,
        MemoryError,
        LookupError,
        RecursionError,
    ) as error:
        raise BadArchive(
            f"'{excerpt(name)}' is no whole Parquet file ({excerpt(str(error))}); download it again"
        ) from None
    return Table(columns, tuple(starts), sizes)


_groups: OrderedDict[tuple[object, ...], pa.ChunkedArray] = OrderedDict()
_footers: OrderedDict[tuple[object, ...], Footer] = OrderedDict()
_lock = threading.Lock()  # readers of a task are threads; a group is read by one of them


def read_cell(identity: tuple[object, ...], open_file: Opened, cell: Cell, shown: str) -> bytes:
    """The bytes of an image.

    Args:
        identity: What tells the file and its state from others.
        open_file: Opens it.
        cell: The image's place.
        shown: The image's name, for messages.

    Raises:
        BadImage: The row or the index holds no image, or the row group is damaged.
        OSError: The file cannot be read.
    """
    key = (*identity, cell.column, cell.group)
    with _lock:
        if key in _groups:
            _groups.move_to_end(key)
        else:
            while len(_groups) >= KEPT_GROUPS:
                _groups.popitem(last=False)
            try:
                _groups[key] = _read_group(identity, open_file, cell)
            except (pa.ArrowException, OSError, MemoryError) as error:
                if isinstance(error, OSError):
                    if identity not in _footers:
                        raise
                    _read_bytes(open_file, _footers[identity], cell)
                why = excerpt(" ".join(str(error).split()))
                detail = f"{shown}: damaged in its file ({why})"
                raise BadImage(Reason.IMAGE_UNDECODABLE, detail) from None
        group = _groups[key]
    value: Any = group[cell.row] if cell.row < len(group) else None
    if value is not None and cell.entry >= 0:
        items = value.values
        value = items[cell.entry] if items is not None and cell.entry < len(items) else None
    found: Any = value.as_py() if value is not None else None
    data: Any = found.get("bytes") if isinstance(found, dict) else found
    if not isinstance(data, bytes):
        raise BadImage(Reason.IMAGE_UNDECODABLE, f"{shown}: no image in this row")
    if len(data) > LARGEST_FILE:
        detail = f"{shown} has {len(data)} bytes; {LARGEST_FILE} are the most that are read"
        raise BadImage(Reason.IMAGE_TOO_LARGE, detail)
    return data


def _read_bytes(open_file: Opened, footer: Footer, cell: Cell) -> None:
    """Read the bytes of a column that is not understood: Arrow raises OSError for both.

    Raises:
        OSError: They cannot be read.
    """
    chunks = footer.groups[cell.group].chunks
    chunk = next(chunk for leaf, chunk in chunks.items() if leaf.partition(".")[0] == cell.column)
    with open_file() as file:
        file.seek(chunk.start)
        left = chunk.compressed
        while left and (part := file.read(min(left, PART))):
            left -= len(part)


class _Held(io.RawIOBase):
    """A file with the bytes of one chunk in memory, as a read may cost a request."""

    def __init__(self, file: IO[bytes], chunk: Chunk) -> None:
        self._file, self._start, self._at = file, chunk.start, 0
        file.seek(self._start)
        self._bytes = memoryview(file.read(chunk.compressed))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset if whence == io.SEEK_SET else self._file.seek(offset, whence)
        return self._at

    def read(self, size: int = -1) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        begin = self._at - self._start
        if begin >= 0 and 0 <= size <= len(self._bytes) - begin:
            found = bytes(self._bytes[begin : begin + size])
        else:
            self._file.seek(self._at)
            found = self._file.read(size)
        self._at += len(found)
        return found


def _read_group(identity: tuple[object, ...], open_file: Opened, cell: Cell) -> pa.ChunkedArray:
    with open_file() as file:
        parquet = pq.ParquetFile(file)
        footer = _footer(identity, parquet)
        leaf = image_columns(parquet)[cell.column].leaf
        chunk, rows = footer.groups[cell.group].chunks[leaf], BATCH
        held = _Held(file, chunk)

        def indexed(leaves: Sequence[str]) -> pq.ParquetFile:
            return pq.ParquetFile(held, metadata=parquet.metadata, read_dictionary=[*leaves])

        parquet = indexed([])
        look = functools.partial(read_pages, cast("IO[bytes]", held))
        shared = longest_value(chunk, indexed, look, cell.group, leaf)
        if shared.total > MOST_SHARED and not shared.is_indexed:
            raise pa.ArrowInvalid(f"{shared.total} bytes in {shared.values} values of a row group")
        if shared.total > MOST_SHARED:
            parquet, rows = indexed([leaf]), max(1, footer.groups[cell.group].num_rows)
        batches = parquet.iter_batches(
            rows, row_groups=[cell.group], columns=[leaf], use_threads=False
        )
        return pa.chunked_array([batch.column(0) for batch in batches])


def _footer(identity: tuple[object, ...], file: pq.ParquetFile) -> Footer:
    """A file's footer, kept for its next row group."""
    if identity not in _footers:
        while len(_footers) >= KEPT_GROUPS:
            _footers.popitem(last=False)
        _footers[identity] = read_footer(file)
    return _footers[identity]
