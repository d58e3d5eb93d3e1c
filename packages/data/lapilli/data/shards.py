"""Arrow shards: their schemas, atomic writing with a checksum, checked reading.

Every file is written under a temporary name, flushed to the disk and renamed, so that a name
stands for a whole file or for none.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lapilli.data.errors import DataError

__all__ = [
    "IMAGE_SCHEMA",
    "OK",
    "SELECTION_SCHEMA",
    "TEMPORARY",
    "TOKEN_SCHEMA",
    "ShardFacts",
    "finished_facts",
    "open_table",
    "sha256_file",
    "write_atomic",
    "write_json",
    "write_shard",
]

TEMPORARY = ".tmp"
OK = "ok"  # status of an image that a view has pixels of

# Images are large_binary: 32-bit offsets overflow at 2 GiB.
IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("status", pa.string()),  # "ok" or a Reason
        ("detail", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("encoding", pa.string()),  # "raw": uint8 height x width x RGB
        ("pixels", pa.large_binary()),
    ]
)
TOKEN_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),  # -200 at an image's place
        ("label_spans", pa.list_(pa.int32())),  # start, end, start, end, ... of trained ids
        ("text_length", pa.int32()),  # ids without the placeholders
        ("num_trained", pa.int32()),
        ("image_ids", pa.list_(pa.string())),
        ("llava_length", pa.int32()),
    ]
)
SELECTION_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("token_shard", pa.int32()),
        ("token_row", pa.int32()),
        ("image_slots", pa.list_(pa.int32())),
        ("text_length", pa.int32()),
        ("num_trained", pa.int32()),
        ("llava_length", pa.int32()),
        ("split", pa.string()),  # "train" or "held_out"
        ("repeats", pa.int32()),  # how often the row stands in an epoch of its split
    ]
)


@dataclass(frozen=True)
class ShardFacts:
    """What the manifest says of one file: enough to notice that it is missing or damaged."""

    path: str
    rows: int
    bytes: int
    sha256: str


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it and rename it over `path`.

    Raises:
        DataError: The disk is full or the folder cannot be written; nothing stands under `path`.
    """
    # Two nodes may share a disk and a process id, and Ray may start a task twice.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error}); free space or choose another --output"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; see `write_atomic`."""
    text = json.dumps(value, indent=1)
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_shard(
    output: Path, name: str, columns: Mapping[str, Iterable[Any]], schema: pa.Schema
) -> ShardFacts:
    """Write one record batch as an Arrow IPC file and its facts beside it.

    The facts are written last: a shard without them is not finished. One batch a file makes every
    row reachable by its number.
    """
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, type=field.type)
        for field, column in ((field, columns[field.name]) for field in schema)
    ]
    batch = pa.record_batch(arrays, schema=schema)
    path = output / name

    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(batch)

    write_atomic(path, write)
    facts = ShardFacts(name, batch.num_rows, path.stat().st_size, sha256_file(path))
    write_json(_facts_path(path), asdict(facts))
    return facts


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def finished_facts(output: Path, name: str) -> ShardFacts | None:
    """The facts of a shard that an earlier run finished, or None if it is missing or damaged."""
    path = output / name
    try:
        facts = ShardFacts(**json.loads(_facts_path(path).read_text(encoding="utf-8")))
        whole = path.stat().st_size == facts.bytes and sha256_file(path) == facts.sha256
    except (OSError, ValueError, TypeError):
        return None
    return facts if whole and facts.path == name else None


def open_table(output: Path, facts: ShardFacts) -> pa.Table:
    """Memory-map a shard after checking its size; nothing is read yet.

    Raises:
        DataError: The file is missing, of another size than the manifest says, or no Arrow file.
    """
    path = output / facts.path
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(
            f"{path}: missing; run preprocess again, it rebuilds what is missing"
        ) from None
    if size != facts.bytes:
        raise DataError(
            f"{path}: {size} bytes, the manifest says {facts.bytes}; "
            "run preprocess again, it rebuilds what is damaged"
        )
    try:
        return pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}); run preprocess again, it rebuilds it"
        ) from None
