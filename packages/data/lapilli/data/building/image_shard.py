"""Build the rows of one image shard: read, decode, resize and store each image.

Memory of a task: the shard's pixels, written once into a `Room` that Arrow takes as it is; files
read ahead, up to `READ_AHEAD_BYTES` and one more; one image being decoded, at most `max_pixels`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapilli.data.images.buffers import Room, keep_freed
from lapilli.data.images.encodings import ORIGINAL, encode_pixels, pixel_error
from lapilli.data.images.view import BadImage, decode, square
from lapilli.data.io.filesystems import is_remote
from lapilli.data.mounts import Located, read_image
from lapilli.data.planning.originals import original_row
from lapilli.data.planning.shard_task import ImageTask
from lapilli.data.shards.schemas import FAST_COLUMNS, IMAGE_SCHEMA, JPEG_SCHEMA, OK, UNUSED

__all__ = [
    "Guard",
    "Read",
    "image_columns",
    "image_schema",
    "read_ahead",
    "unguarded",
]

READERS = 4  # threads; a disk answers several questions at once
PARCEL = 4  # files a thread reads at a time: to wake it costs as much as to read one
READ_AHEAD = 32  # files on their way
MOST_READ_AHEAD = 128  # of a store: it answers any number at once, each after its latency
READ_AHEAD_BYTES = 64 << 20

# Context manager that wraps the decoding of one row.
Guard: TypeAlias = Callable[[int], AbstractContextManager[None]]
Row: TypeAlias = dict[str, Any]
Read: TypeAlias = Callable[[], bytes]


def unguarded(row: int) -> AbstractContextManager[None]:
    """No guard: a crash of this process ends the build."""
    del row
    return nullcontext()


def image_schema(task: ImageTask) -> pa.Schema:
    """The columns that a task's shard has."""
    schema = JPEG_SCHEMA if task.encoding.kind == "jpeg" else IMAGE_SCHEMA
    return pa.schema([*schema, *FAST_COLUMNS]) if task.compared else schema


def image_columns(
    task: ImageTask, guard: Guard = unguarded, room: Room | None = None
) -> dict[str, Any]:
    """Decode a task's images into the columns of its shard; `guard` wraps each row's decoding.

    Raw pixels are written into `room`, if given, and are valid until it is reused.

    Raises:
        DataError: This process has other codecs than the driver.
    """
    task.codecs.require()
    keep_freed()
    store = _Buffer(task, room or Room()) if task.encoding.kind == "raw" else None
    columns: dict[str, Any] = {field.name: [] for field in image_schema(task)}
    for number, (place, read) in enumerate(read_ahead(Path(task.root), task.images)):
        row: Row = {"status": UNUSED, "detail": ""}
        if read:
            row = _row(read, guard(number), task, store, compare=number < task.compared)
        row |= {"image_id": place.image_id, "encoding": task.encoding.kind}
        for name, values in columns.items():
            values.append(row.get(name))
    if store:
        columns["pixels"] = store.column(columns["status"])
    return columns


def _row(
    read: Read,
    guarded: AbstractContextManager[None],
    task: ImageTask,
    store: _Buffer | None,
    *,
    compare: bool,
) -> Row:
    """Decode one image; an error becomes the row's status."""
    if task.encoding.kind == ORIGINAL:
        return original_row(read, guarded, task.spec)
    try:
        data = read()
        with guarded:
            decoded = decode(data, task.spec, task.codecs.resizer)
            pixels = square(decoded.image, task.spec, task.codecs.resizer)
            error = _fast_error(data, task, pixels) if compare else {}
    except BadImage as bad:
        return {"status": str(bad.reason), "detail": bad.detail}
    size = {"source_width": decoded.source_width, "source_height": decoded.source_height}
    stored = store.add(pixels) if store else encode_pixels(pixels, task.encoding)
    return {"status": OK, "detail": ", ".join(decoded.notes), **size, **stored, **error}


def _fast_error(data: bytes, task: ImageTask, pixels: NDArray[np.uint8]) -> Row:
    """How far off the pixels are from those of mode `exact`."""
    exact = replace(task.spec, mode="exact")
    try:
        decoded = decode(data, exact, task.codecs.resizer)
    except BadImage:  # the view has pixels of it nevertheless
        return {}
    error = pixel_error(pixels, square(decoded.image, exact, task.codecs.resizer))
    return {f"fast_{name}": value for name, value in error.items()}


class _Buffer:
    """A shard's raw pixels one after the other, in memory that Arrow takes as it is."""

    def __init__(self, task: ImageTask, room: Room) -> None:
        shape = (len(task.images), task.spec.size, task.spec.size, 3)
        self._pixels = room.take(math.prod(shape)).reshape(shape)
        self._made = 0

    def add(self, pixels: NDArray[np.uint8]) -> Row:
        """Keep the pixels of the next image that has any."""
        self._pixels[self._made] = pixels
        self._made += 1
        return {}

    def column(self, statuses: list[str]) -> pa.Array:
        """A row for each status, null where it is not ok."""
        whole = np.array([status == OK for status in statuses], np.bool_)
        return _binary(self._pixels[: self._made], whole)


def read_ahead(root: Path, places: Iterable[Located]) -> Iterator[tuple[Located, Read | None]]:
    """Each image in order with what gives its bytes, read by threads while others are decoded.

    A place without a container is that of an image nobody uses any more: nothing is read.

    What is read and not yet taken is bounded by number and by bytes, whatever the files' sizes. A
    store is asked for more at a time, each with a thread of its own, when a file is late.
    """
    waiting: deque[tuple[list[Located], Future[list[Read | None]]]] = deque()
    held = files = 0
    places = list(places)
    remote = any(is_remote(place.container) for place in places)
    most = READ_AHEAD
    with ThreadPoolExecutor(MOST_READ_AHEAD if remote else READERS) as pool:
        try:
            for parcel in _parcels(places, 1 if remote else PARCEL):
                waiting.append((parcel, pool.submit(_read_parcel, root, parcel)))
                held += sum(map(_file_bytes, parcel))
                files += len(parcel)
                while files > most or held > READ_AHEAD_BYTES:
                    held -= sum(map(_file_bytes, waiting[0][0]))
                    files -= len(waiting[0][0])
                    if remote and files >= most and not waiting[0][1].done():
                        most = min(2 * most, MOST_READ_AHEAD)
                    yield from _unpack(*waiting.popleft())
            while waiting:
                yield from _unpack(*waiting.popleft())
        finally:
            for _, reading in waiting:
                reading.cancel()


def _parcels(places: Iterable[Located], most: int) -> Iterator[list[Located]]:
    """A few places at a time; large files alone, so that no thread reads on while others wait."""
    parcel: list[Located] = []
    size = 0
    for place in places:
        parcel.append(place)
        size += _file_bytes(place)
        if len(parcel) == most or size > READ_AHEAD_BYTES // 16:
            yield parcel
            parcel, size = [], 0
    if parcel:
        yield parcel


def _read_parcel(root: Path, parcel: list[Located]) -> list[Read | None]:
    return [_reading(root, place) if place.container else None for place in parcel]


def _reading(root: Path, place: Located) -> Read:
    """Read now, and say later how it went."""
    try:
        data = read_image(root, place)
    except Exception as error:
        failed = error

        def fail() -> bytes:
            raise failed

        return fail
    return lambda: data


def _unpack(
    parcel: list[Located], reading: Future[list[Read | None]]
) -> Iterator[tuple[Located, Read | None]]:
    return zip(parcel, reading.result(), strict=True)


def _file_bytes(place: Located) -> int:
    return place.size if place.member is None else max(place.member.size, place.member.stored)


def _binary(pixels: NDArray[np.uint8], whole: NDArray[np.bool_]) -> pa.Array:
    """Rows over the pixels' own memory, one after the other; null where an image is not whole."""
    row_bytes = pixels[0].nbytes if len(pixels) else 0
    ends = np.concatenate([[0], np.cumsum(whole)]).astype(np.int64) * row_bytes
    validity = None if whole.all() else pa.py_buffer(np.packbits(whole, bitorder="little"))
    buffers = [validity, pa.py_buffer(ends), pa.py_buffer(pixels.reshape(-1))]
    return pa.Array.from_buffers(pa.large_binary(), len(whole), buffers)
