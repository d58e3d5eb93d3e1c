"""Parquet files with a record's fields as columns: `id`, `image` or `images`, a conversation.

Without a column of conversations the rows are captions (`reading/caption_tables.py`).

The conversation is under `conversations`, `messages` or `texts`: lists of objects, or the same as
JSON text. An image is a key, or bytes in the file itself (Hugging Face's `{bytes, path}`, or a
binary column), or a list of these. Bytes are not read here: an embedded image is the key
`FILE.parquet/COLUMN/ROW`, with `/INDEX` in a list. Where the bytes are null the path is the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.access import is_denied
from lapilli.data.io.addresses import plain_address
from lapilli.data.io.filesystems import is_remote, open_storage, split_address
from lapilli.data.mounts.parquet_bounds import holds_any
from lapilli.data.mounts.parquet_footer import Chunk, read_footer
from lapilli.data.mounts.parquet_pages import Pages, read_pages
from lapilli.data.mounts.tables import ImageColumn, image_columns, is_binary
from lapilli.data.record import excerpt
from lapilli.data.sources.fields import HARMLESS, IMAGE_FIELDS
from lapilli.data.sources.reading.bounds import TOO_MANY, Bounds, Unreadable, holds_too_much
from lapilli.data.sources.reading.caption_tables import caption_columns, caption_element
from lapilli.data.sources.reading.files import annotation_places, file_error, what_it_is_instead
from lapilli.data.sources.reading.parquet_rows import RowReader, bounded_batches
from lapilli.data.sources.rows import LISTS

__all__ = ["read"]

ROWS = 1024  # decoded at once; a row group may hold a million
WITH_BYTES = 16  # the same where bytes are decoded to see which rows have any
CONVERSATIONS = f", or put conversations into one of {', '.join(LISTS)}"
NO_ROW = object()  # of a column that has ended
Mark: TypeAlias = bool | None  # of an image: its bytes are there, or null; None for none at all


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """Every row of the files as an object, a few at a time.

    Raises:
        DataError: A file is missing, no Parquet, damaged, without a conversation's column, or with
            images in it outside the folder of `images`.
    """
    for place in map(str, annotation_places(config, root)):
        instead = "" if is_remote(place) else what_it_is_instead(Path(place), "parquet")
        try:
            with _open(place) as file:
                shard = _shard(place, config, root)
                opened = _File(file, place, shard, Bounds.of(config))
                if opened.has_conversations:
                    yield from opened.rows()
                    continue
                columns = caption_columns(opened.names, config, place, CONVERSATIONS)
                for row in opened.rows():
                    is_row = not isinstance(row, Unreadable)
                    yield caption_element(row, columns, config) if is_row else row
        except (
            pa.ArrowException, OSError, UnicodeError, MemoryError, LookupError, RecursionError
        ) as error:  # fmt: skip
            if is_denied(error) and not is_remote(place):
                raise file_error(Path(place), error) from None
            raise DataError(
                f"annotations: {place} is no whole Parquet file ({excerpt(str(error))}); "
                + (instead or "download or write it again")
            ) from None


def _open(place: str, **options: Any) -> pq.ParquetFile:
    if not is_remote(place):
        return pq.ParquetFile(place, memory_map=True, **options)
    scheme, path = split_address(place)
    return pq.ParquetFile(open_storage(scheme).open(path, "rb"), pre_buffer=True, **options)


def _open_bytes(place: str) -> IO[bytes]:
    if not is_remote(place):
        return Path(place).open("rb")
    scheme, path = split_address(place)
    return open_storage(scheme).open(path, "rb")


def _shard(place: str, config: SourceConfig, root: Path) -> str | None:
    """The file's path from the folder of `images`; None for one outside of it."""
    if is_remote(place):
        folder = f"{plain_address(config.images).rstrip('/')}/"
        return place.removeprefix(folder) if place.startswith(folder) else None
    path, above = Path(place), root / config.images
    return path.relative_to(above).as_posix() if path.is_relative_to(above) else None


class _File:
    """One file: which of its columns are read, and how an image of a row is named."""

    def __init__(self, file: pq.ParquetFile, place: str, shard: str | None, bounds: Bounds) -> None:
        self._file, self._place, self._shard = file, place, shard
        self._reader, self._footer = RowReader(place, bounds), read_footer(file)
        self._leaves = {
            file.schema.column(number).path: number for number in range(len(file.schema))
        }
        embedded = image_columns(file)
        self._embedded = {n: c for n, c in embedded.items() if n not in HARMLESS}
        self._check_columns()
        self._chosen = [leaf for leaf in self._leaves if self._is_read(leaf)]
        own = {column.leaf for column in self._embedded.values()}
        self._others = [
            leaf
            for leaf in self._leaves
            if leaf not in own and self._is_bytes(leaf) and leaf.partition(".")[0] not in HARMLESS
        ]

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(dict.fromkeys(leaf.partition(".")[0] for leaf in self._leaves))

    @property
    def has_conversations(self) -> bool:
        """Whether a column holds conversations; else the rows are captions."""
        return not set(self.names).isdisjoint(LISTS)

    def _is_read(self, leaf: str) -> bool:
        """Whether a leaf is read as it is: bytes are not, and of what holds bytes the path."""
        name = leaf.partition(".")[0]
        if name in self._embedded:
            return leaf == self._embedded[name].path
        return name not in HARMLESS - {"id"} and not self._is_bytes(leaf)

    def _is_bytes(self, leaf: str) -> bool:
        column = self._file.schema.column(self._leaves[leaf])
        is_plain = column.logical_type.type == "NONE" and str(column.converted_type) == "NONE"
        return is_plain and column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")

    def _check_columns(self) -> None:
        """A conversation's images are not inside of its turns."""
        for field in self._file.schema_arrow:
            if field.name in LISTS and (is_binary(field.type) or field.name in self._embedded):
                raise DataError(
                    f"annotations: {self._place}: column {field.name} holds bytes; expected a "
                    "conversation, as lists of objects or as JSON text"
                )
        for leaf in self._leaves:
            name = leaf.partition(".")[0]
            if name in LISTS and self._is_bytes(leaf) and self._filled(leaf):
                raise DataError(
                    f"annotations: {self._place}: {leaf} holds bytes inside the turns, which are "
                    "not read; put the images into a column `images`"
                )

    def _filled(self, leaf: str) -> bool:
        """Whether some value of a leaf may not be null."""
        return any(group.chunks[leaf].not_null != 0 for group in self._footer.groups)

    def _not_null(self, group: int, leaf: str) -> int | None:
        """How many values of a leaf are not null, if the file says so."""
        return self._footer.groups[group].chunks[leaf].not_null

    def rows(self) -> Iterator[dict[str, Any] | Unreadable]:
        """Every row, in order; see `RowReader`.

        Raises:
            pa.ArrowInvalid: Columns of a row group have other numbers of rows than it is said to.
        """
        first = 0
        for group, facts in enumerate(self._footer.groups):
            columns = {name: self._marks(group, column) for name, column in self._embedded.items()}
            others = {leaf: self._with_bytes(group, leaf) for leaf in self._others}
            numbers = range(first, first + facts.num_rows)
            values = (self._texts(group), *columns.values(), *others.values())
            for number, row, *found in _together(numbers, *values):
                shapes = dict(zip(columns, found, strict=False))
                has_bytes = zip(others, found[len(columns) :], strict=True)
                filled = [leaf for leaf, has in has_bytes if has]
                if isinstance(row, Unreadable):
                    yield row
                else:
                    yield _parsed(self._with_keys(row, shapes, filled, number))
            first += facts.num_rows

    def _with_keys(
        self,
        row: dict[str, Any],
        shapes: dict[str, Mark | list[Mark]],
        filled: list[str],
        number: int,
    ) -> dict[str, Any]:
        """A row with the keys of its images and the names of what else is bytes."""
        for name, column in self._embedded.items():
            value = self._value(column, row.pop(name, None), shapes[name], number)
            if value is not None:
                row[name] = value
        for leaf in filled:
            row[leaf] = {"bytes": f"{leaf}/{number}"}
        return row

    def _texts(self, group: int) -> Iterator[dict[str, Any] | Unreadable]:
        """The rows of a group without their bytes."""
        if not self._chosen:
            yield from ({} for _ in range(self._footer.groups[group].num_rows))
            return
        for batch in self._batches(group, self._chosen, ROWS):
            yield from self._reader.rows(batch)

    def _batches(self, group: int, leaves: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        def reopen(indexed: Sequence[str]) -> pq.ParquetFile:
            return _open(self._place, read_dictionary=[*indexed])

        def look(chunk: Chunk) -> Pages:
            with _open_bytes(self._place) as file:
                return read_pages(file, chunk, ahead=is_remote(self._place))

        yield from bounded_batches(self._file, self._footer, reopen, look, group, leaves, rows)

    def _with_bytes(self, group: int, leaf: str) -> Iterator[bool]:
        """Of each row whether a leaf that is no image's has bytes, for the count of its fields."""
        if self._not_null(group, leaf) == 0:
            yield from (False for _ in range(self._footer.groups[group].num_rows))
            return
        for batch in self._batches(group, [leaf], WITH_BYTES):
            yield from holds_any(batch.column(0)).tolist()

    def _marks(self, group: int, column: ImageColumn) -> Iterator[Mark | list[Mark]]:
        """Of each row which images have bytes, told by the counts in the footer where they do."""
        rows = self._footer.groups[group].num_rows
        known = self._not_null(group, column.leaf)
        if column.path:
            structs = sum(map(_there, self._shapes(group, column, column.path, ROWS)))
            if known in (0, structs):
                for shape in self._shapes(group, column, column.path, ROWS):
                    yield _all(shape, known == structs)
                return
        elif not column.is_list and known in (0, rows):
            yield from (known == rows or None for _ in range(rows))
            return
        yield from self._shapes(group, column, column.leaf, WITH_BYTES)

    def _shapes(
        self, group: int, column: ImageColumn, leaf: str, rows: int
    ) -> Iterator[Mark | list[Mark]]:
        """Of each row which values of one leaf are null; a struct around it may be null itself."""
        for batch in self._batches(group, [leaf], rows):
            values = batch.column(0)
            if not column.is_list:
                yield from _null_marks(values, column.is_struct)
                continue
            flat = iter(_null_marks(pc.call_function("list_flatten", [values]), column.is_struct))
            for length in pc.call_function("list_value_length", [values]).to_pylist():
                yield None if length is None else [next(flat) for _ in range(length)]

    def _value(self, column: ImageColumn, given: Any, mark: Mark | list[Mark], number: int) -> Any:
        """A row's value as JSON would have it: keys for images, names for what else is bytes."""
        if mark is None:
            return None
        if isinstance(mark, list):
            names: Sequence[Any] = given if isinstance(given, list) else [None] * len(mark)
            if len(names) != len(mark):
                raise pa.ArrowInvalid(
                    f"column {column.name}: {len(names)} paths, {len(mark)} bytes"
                )
            return [
                self._one(column, name, inner, f"{number}/{index}")
                for index, (name, inner) in enumerate(zip(names, mark, strict=True))
            ]
        return self._one(column, given, mark, str(number))

    def _one(self, column: ImageColumn, given: Any, mark: Mark, place: str) -> Any:
        path = cast("dict[str, Any]", given).get("path") if isinstance(given, dict) else None
        if not mark:
            return path
        if column.name not in IMAGE_FIELDS:
            return {"bytes": f"{column.name}/{place}"}
        if self._shard is None:
            raise DataError(
                f"annotations: {self._place} holds images and lies outside the folder of "
                "`images`; set `images` to a folder or an address above it"
            )
        return f"{self._shard}/{column.name}/{place}"


def _together(*columns: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The rows of several columns, which must be as many."""
    for row in zip_longest(*columns, fillvalue=NO_ROW):
        if any(value is NO_ROW for value in row):
            raise pa.ArrowInvalid("its columns have different numbers of rows")
        yield row


def _null_marks(values: pa.Array, is_struct: bool) -> list[Mark]:
    """None for a null, else whether the struct's content is present."""
    there = values.is_valid().to_pylist()
    if not is_struct:
        return [True if valid else None for valid in there]
    inner = values.field(0).is_valid().to_pylist()
    return [bool(own) if valid else None for valid, own in zip(there, inner, strict=True)]


def _there(shape: Mark | list[Mark]) -> int:
    """How many structs a row has."""
    return sum(m is not None for m in shape) if isinstance(shape, list) else shape is not None


def _all(shape: Mark | list[Mark], mark: bool) -> Mark | list[Mark]:
    """The same for every struct of a row."""
    if isinstance(shape, list):
        return [None if inner is None else mark for inner in shape]
    return None if shape is None else mark


def _parsed(row: dict[str, Any]) -> dict[str, Any] | Unreadable:
    for name in LISTS:
        if isinstance(row.get(name), str):
            if holds_too_much(row[name]):
                return Unreadable(TOO_MANY)
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError):
                continue  # stays text, and the verdict is that it is no list
    return row
