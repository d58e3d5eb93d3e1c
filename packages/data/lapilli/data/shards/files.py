"""Write and read Arrow shards with checksums.

Every file is written under a temporary name, flushed to the disk and renamed, so that a name
stands for a whole file or for none.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from lapilli.data.errors import DataError
from lapilli.data.io.access import cannot_read, is_denied
from lapilli.data.io.atomic import (
    ShardFacts,
    begin_atomic,
    drop_page_cache,
    sha256_file,
    write_atomic,
    write_json,
)
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt
from lapilli.data.shards.schemas import COLUMN_TYPES, NULLABLE

__all__ = [
    "StoredShard",
    "begin_shard",
    "check_table",
    "facts_name",
    "finished_facts",
    "open_table",
    "stand_for",
    "stored_shard",
    "write_shard",
]

PIECE_BYTES = 256 << 10
WHOLE = 4 << 20  # bytes of a file that one call to a store brings, whatever is wanted of it


def write_shard(
    output: Output, name: str, columns: Mapping[str, Iterable[Any]], schema: pa.Schema
) -> ShardFacts:
    """Write one record batch as an Arrow IPC file and its facts beside it.

    The facts are written last: a shard without them is not finished. One batch a file makes every
    row reachable by its number.
    """
    return begin_shard(output, name, columns, schema)()


def begin_shard(
    output: Output,
    name: str,
    columns: Mapping[str, Iterable[Any]],
    schema: pa.Schema,
    beside: Sequence[str] = (),
) -> Callable[[], ShardFacts]:
    """Write a shard's rows now; the returned function finishes it, as with `begin_atomic`.

    The columns `beside` are written beside the shard's facts too, for `stored_shard`.
    """
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, type=field.type)
        for field, column in ((field, columns[field.name]) for field in schema)
    ]
    batch = pa.record_batch(arrays, schema=schema)
    rows, small = batch.num_rows, _as_text(batch.select([*beside])) if beside else ""

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb", buffering=0) as file,
            pa.PythonFile(_Pieces(file), mode="w") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_batch(batch)

    target = output / name
    finish_file = begin_atomic(target, write)

    def finish() -> ShardFacts:
        made = finish_file()
        facts = StoredShard(
            path=name, rows=rows, bytes=made.bytes, sha256=made.sha256, columns=small
        )
        write_json(_facts_path(target), asdict(facts if small else facts.facts))
        if isinstance(target, Path):
            drop_page_cache(target)
        return facts if small else facts.facts

    return finish


class _Pieces:
    """A file that takes a column of any size in small writes.

    For one write of 64 MiB Linux takes its page cache in pieces of 2 MiB. Those lie idle at first
    and have to be cleared, or a virtual machine has to ask its host for them: 0.8 ms an image of
    336 px instead of 0.1.
    """

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: Any) -> int:
        """All of it, whatever the system takes at once."""
        left = memoryview(data).cast("B")
        while left:
            left = left[self._file.write(left[:PIECE_BYTES]) or 0 :]
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def stand_for(output: Output, facts: ShardFacts, name: str) -> None:
    """Let a file be found under `name` too, without a second copy where the disk has links."""
    source, target = output / facts.path, output / name
    if isinstance(source, RemotePath) and isinstance(target, RemotePath):
        target.copy_from(source)
    elif isinstance(source, Path):
        write_atomic(target, lambda temporary: _link(source, temporary))
    write_json(_facts_path(output / name), asdict(replace(facts, path=name)))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _facts_path(path: Output) -> Output:
    return path.with_name(facts_name(path.name))


def facts_name(name: str) -> str:
    """The name of the file with a shard's facts."""
    return f"{name}.json"


@dataclass(frozen=True)
class StoredShard(ShardFacts):
    """A shard's facts with its small columns; equal to the facts alone.

    `columns` is an Arrow stream in base64, or empty.
    """

    columns: str = field(default="", repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardFacts) and self.facts == _plain(other)

    def __hash__(self) -> int:
        return hash(self.facts)

    @property
    def facts(self) -> ShardFacts:
        """The facts alone."""
        return _plain(self)

    def table(self, names: Sequence[str]) -> pa.Table | None:
        """Some of the small columns; None if they are not all there, or damaged."""
        try:
            table = pa.ipc.open_stream(base64.b64decode(self.columns)).read_all()
            check_table(table, self.rows, names)
        except (ValueError, pa.ArrowException):
            return None
        return table.select([*names])


def _plain(facts: ShardFacts) -> ShardFacts:
    return ShardFacts(facts.path, facts.rows, facts.bytes, facts.sha256)


def _as_text(batch: pa.RecordBatch) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return base64.b64encode(sink.getvalue()).decode()


def stored_shard(output: Output, name: str) -> StoredShard | None:
    """What lies beside a shard; None if there is nothing that can be used.

    Raises:
        DataError: It cannot be read.
    """
    path = output / facts_name(name)
    try:
        found = from_json(read_whole(path), StoredShard)
    except (OSError, JsonError) as error:
        if is_denied(error):
            raise DataError(cannot_read(path, error)) from None
        return None
    return found if found.path == name else None


def finished_facts(output: Output, name: str) -> ShardFacts | None:
    """The facts of a shard that an earlier run finished, or None if it is missing or damaged.

    In a store only the size is compared: the store has checksums of its own.

    Raises:
        DataError: It cannot be read: it may be whole, and is not made again.
    """
    path = output / name
    stored = stored_shard(output, name)
    if stored is None:
        return None
    facts = stored.facts
    try:
        if isinstance(path, RemotePath):
            whole = path.size == facts.bytes
        else:
            whole = path.stat().st_size == facts.bytes and sha256_file(path) == facts.sha256
    except OSError as error:
        if is_denied(error):
            raise DataError(cannot_read(error.filename or path, error)) from None
        return None
    return facts if whole else None


def open_table(
    output: Output, facts: ShardFacts, schema: pa.Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    """Memory-map a shard; its size, columns, rows and offsets are checked, its values are not read.

    Args:
        output: The dataset, or the folder its files are copied to.
        facts: What the manifest says of the file.
        schema: Columns that the file has at least.
        columns: Those to open, of the schema or of `JPEG_SCHEMA` and `FAST_COLUMNS`; None opens
            the schema's. Of a file over 4 MiB in a store just these are read.

    Raises:
        DataError: The file is missing, of another size than the manifest says, or no such file.
    """
    path, data = output / facts.path, None
    try:
        if not isinstance(path, RemotePath):
            size = path.stat().st_size
        elif facts.bytes > WHOLE:
            size = path.size
        else:
            found = path.read_bounded(WHOLE)
            size, data = (len(found), found) if isinstance(found, bytes) else (found, None)
    except OSError as error:
        if is_denied(error):
            raise DataError(cannot_read(path, error)) from None
        size = None
    if size is None:
        raise DataError(
            f"{path}: missing; run preprocess again, it rebuilds what is missing"
        ) from None
    if size != facts.bytes:
        raise DataError(
            f"{path}: {size} bytes, the manifest says {facts.bytes}; "
            "run preprocess again, it rebuilds what is damaged"
        )
    names = schema.names if columns is None else [*columns]
    try:
        if data is not None:
            table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        elif isinstance(path, RemotePath):
            table = path.read_with(lambda file: _read_columns(file, names))
        else:
            with pa.memory_map(str(path), "r") as file:  # the map outlives the descriptor
                table = pa.ipc.open_file(file).read_all()
        check_table(table, facts.rows, names)
        return table.select(names)
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_denied(error):
            raise DataError(cannot_read(path, error)) from None
        said = f": {excerpt(str(error))}" if type(error) is ValueError else ""
        raise DataError(
            f"{path}: damaged ({type(error).__name__}{said}); run preprocess again, it rebuilds it"
        ) from None


def check_table(table: pa.Table, rows: int, names: Sequence[str]) -> None:
    """Check what a file holds that this process did not write, before any value of it is used.

    Arrow believes a file's offsets; `validate` compares them with the buffers they point into.

    Raises:
        ValueError, pa.ArrowException: Another number of rows, a column that is missing, of another
            type or with nulls where none may be, more than one record batch, or wild offsets.
    """
    for name in names:
        places = table.schema.get_all_field_indices(name)
        if len(places) != 1:
            raise ValueError(f"column {name} is there {len(places)} times")
        found = table.schema.field(places[0]).type
        if found != COLUMN_TYPES[name]:
            raise ValueError(f"column {name} is {found}, expected {COLUMN_TYPES[name]}")
    table.select(names).validate(full=True)
    if len(table) != rows:
        raise ValueError(f"{len(table)} rows, the manifest says {rows}")
    for name in names:
        if table[name].num_chunks > 1:
            raise ValueError("more than one record batch")
        if name not in NULLABLE and table[name].null_count:
            raise ValueError(f"column {name} has nulls")


def _read_columns(file: Any, columns: Sequence[str]) -> pa.Table:
    """Columns of an Arrow file that is read by parts."""
    source = pa.PythonFile(file, mode="r")
    schema = pa.ipc.open_file(source).schema
    fields = [schema.get_field_index(name) for name in columns]
    if min(fields) < 0:
        raise ValueError(f"column {columns[fields.index(min(fields))]} is missing")
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    return pa.ipc.open_file(source, options=options).read_all()
