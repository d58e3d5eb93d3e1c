"""The rows of one image shard: read each file, decode it, make it square, store the pixels.

Memory of a task: the shard's pixels, written once into one buffer that Arrow takes as it is; files
read ahead, up to `READ_AHEAD_BYTES` and one more; one image being decoded, at most `max_pixels`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapilli.data.encoding import ORIGINAL, encode_pixels, pixel_error
from lapilli.data.images import BadImage, decode, square
from lapilli.data.journal import Guard, unguarded
from lapilli.data.mounts import Located, read_image
from lapilli.data.originals import original_row
from lapilli.data.shard_task import ImageTask
from lapilli.data.shards import FAST_COLUMNS, IMAGE_SCHEMA, JPEG_SCHEMA, OK, UNUSED

__all__ = ["image_columns", "image_schema"]

READERS = 4  # threads; a disk or a bucket answers several questions at once
READ_AHEAD = 16  # files on their way
READ_AHEAD_BYTES = 64 << 20


Row: TypeAlias = dict[str, Any]


def image_schema(task: ImageTask) -> pa.Schema:
    """The columns that a task's shard has."""
    schema = JPEG_SCHEMA if task.encoding.kind == "jpeg" else IMAGE_SCHEMA
    return pa.schema([*schema, *FAST_COLUMNS]) if task.compared else schema


def image_columns(task: ImageTask, guard: Guard = unguarded) -> dict[str, Any]:
    """The columns of a task's shard; `guard` stands around the decoding of each row.

    Raises:
        DataError: This process has other codecs than the driver.
    """
    task.codecs.require()
    store = _Buffer(task) if task.encoding.kind == "raw" else None
    columns: dict[str, Any] = {field.name: [] for field in image_schema(task)}
    for number, (place, read) in enumerate(read_ahead(Path(task.root), task.images)):
        row: Row = {"status": UNUSED, "detail": ""}
        if read:
            row = _row(read.result, guard(number), task, store, compare=number < task.compared)
        row |= {"image_id": place.image_id, "encoding": task.encoding.kind}
        for name, values in columns.items():
            values.append(row.get(name))
    if store:
        columns["pixels"] = store.column(columns["status"])
    return columns


def _row(
    read: Callable[[], bytes],
    guarded: AbstractContextManager[None],
    task: ImageTask,
    store: _Buffer | None,
    *,
    compare: bool,
) -> Row:
    """One image; what is wrong with it ends here, as a status."""
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
    return {"status": OK, "detail": "", **size, **stored, **error}


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

    def __init__(self, task: ImageTask) -> None:
        size = task.spec.size
        self._pixels = np.empty((len(task.images), size, size, 3), np.uint8)
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


def read_ahead(
    root: Path, places: Iterable[Located]
) -> Iterator[tuple[Located, Future[bytes] | None]]:
    """Each image's bytes in order, read by a few threads while earlier ones are decoded.

    A place without a container is that of an image nobody uses any more: nothing is read.

    What is read and not yet taken is bounded by number and by bytes, whatever the files' sizes.
    """
    waiting: deque[tuple[Located, Future[bytes] | None]] = deque()
    held = 0
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for place in places:
                read = pool.submit(read_image, root, place) if place.container else None
                waiting.append((place, read))
                held += _file_bytes(place)
                while len(waiting) > READ_AHEAD or held > READ_AHEAD_BYTES:
                    held -= _file_bytes(waiting[0][0])
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, read in waiting:
                if read:
                    read.cancel()


def _file_bytes(place: Located) -> int:
    return place.size if place.member is None else max(place.member.size, place.member.stored)


def _binary(pixels: NDArray[np.uint8], whole: NDArray[np.bool_]) -> pa.Array:
    """Rows over the pixels' own memory, one after the other; null where an image is not whole."""
    row_bytes = pixels[0].nbytes if len(pixels) else 0
    ends = np.concatenate([[0], np.cumsum(whole)]).astype(np.int64) * row_bytes
    validity = None if whole.all() else pa.py_buffer(np.packbits(whole, bitorder="little"))
    buffers = [validity, pa.py_buffer(ends), pa.py_buffer(pixels.reshape(-1))]
    return pa.Array.from_buffers(pa.large_binary(), len(whole), buffers)
