"""The rows of one image shard: read each file, decode it, make it square.

Memory of a task: the shard's pixels, written once into one buffer that Arrow takes as it is; files
read ahead, up to `READ_AHEAD_BYTES` and one more; one image being decoded, at most `max_pixels`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapilli.data.images import BadImage, decode, square
from lapilli.data.mounts import Located, read_image
from lapilli.data.plan import ImageTask
from lapilli.data.shards import IMAGE_SCHEMA, OK

__all__ = ["image_columns"]

READERS = 4  # threads; a disk or a bucket answers several questions at once
READ_AHEAD = 16  # files on their way
READ_AHEAD_BYTES = 64 << 20


def image_columns(task: ImageTask) -> dict[str, Any]:
    """The columns of a task's shard.

    Raises:
        DataError: This process has other codecs than the driver.
    """
    task.codecs.require()
    columns: dict[str, Any] = {field.name: [] for field in IMAGE_SCHEMA}
    size = task.spec.size
    pixels = np.empty((len(task.images), size, size, 3), np.uint8)
    made = 0
    for place, read in read_ahead(Path(task.root), task.images):
        row: dict[str, Any] = {"source_width": None, "source_height": None}
        try:
            decoded = decode(read.result(), task.spec)
            pixels[made] = square(decoded.image, task.spec, task.codecs.resizer)
            made += 1
            row = {"source_width": decoded.source_width, "source_height": decoded.source_height}
            row |= {"status": OK, "detail": ""}
        except BadImage as bad:  # what is wrong with an image ends here, as a status
            row |= {"status": str(bad.reason), "detail": bad.detail}
        for name, value in {"image_id": place.image_id, "encoding": "raw", **row}.items():
            columns[name].append(value)
    whole = np.array([status == OK for status in columns["status"]], np.bool_)
    return columns | {"pixels": _binary(pixels[:made], whole)}


def read_ahead(root: Path, places: Iterable[Located]) -> Iterator[tuple[Located, Future[bytes]]]:
    """Each image's bytes in order, read by a few threads while earlier ones are decoded.

    What is read and not yet taken is bounded by number and by bytes, whatever the files' sizes.
    """
    waiting: deque[tuple[Located, Future[bytes]]] = deque()
    held = 0
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for place in places:
                waiting.append((place, pool.submit(read_image, root, place)))
                held += _file_bytes(place)
                while len(waiting) > READ_AHEAD or held > READ_AHEAD_BYTES:
                    held -= _file_bytes(waiting[0][0])
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, read in waiting:
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
