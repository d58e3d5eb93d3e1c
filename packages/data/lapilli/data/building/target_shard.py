"""Build the rows of one shard of a teacher's features.

Memory of a task: the shard's features, files read ahead, and `batch_size` decoded images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lapilli.data.building.image_shard import Guard, Read, read_ahead, unguarded
from lapilli.data.building.teachers import load_teacher
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage, decode, square
from lapilli.data.planning.shard_task import TargetTask
from lapilli.data.shards.schemas import OK, REFUSED, TARGET_SCHEMA, UNUSED
from lapilli.data.shards.target_rows import decode_rows, encode_rows, pool_rows, stored_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["target_columns"]

Row: TypeAlias = dict[str, Any]


def target_columns(task: TargetTask, guard: Guard = unguarded) -> dict[str, list[Any]]:
    """Decode a task's images and ask the teacher; `guard` wraps each row's decoding.

    Raises:
        DataError: This process has other codecs than the driver, or the teacher cannot be loaded
            or gives something else than its settings say.
    """
    task.codecs.require()
    columns: dict[str, list[Any]] = {field.name: [] for field in TARGET_SCHEMA}
    for row in _rows(task, guard):
        for name, values in columns.items():
            values.append(row.get(name))
    return columns


def _rows(task: TargetTask, guard: Guard) -> Iterator[Row]:
    """The rows in order, the teacher asked for a batch of those that have pixels at a time."""
    waiting: list[tuple[Row, NDArray[np.uint8] | None]] = []
    count = 0
    for number, (place, read) in enumerate(read_ahead(Path(task.root), task.images)):
        row: Row = {"image_id": place.image_id, "status": UNUSED, "detail": ""}
        pixels = None
        if read:
            pixels = _pixels(read, guard(number), task, row)
        waiting.append((row, pixels))
        count += pixels is not None
        if count == task.target.batch_size:
            yield from _asked(task, waiting)
            waiting, count = [], 0
    yield from _asked(task, waiting)


def _pixels(
    read: Read, guarded: AbstractContextManager[None], task: TargetTask, row: Row
) -> NDArray[np.uint8] | None:
    """An image's square; an error becomes the row's status."""
    try:
        data = read()
        with guarded:
            decoded = decode(data, task.spec, task.codecs.resizer)
            pixels = square(decoded.image, task.spec, task.codecs.resizer)
    except BadImage as bad:
        row |= {"status": str(bad.reason), "detail": bad.detail}
        return None
    row["status"] = OK
    return pixels


def _asked(task: TargetTask, waiting: list[tuple[Row, NDArray[np.uint8] | None]]) -> Iterator[Row]:
    """The rows with the teacher's features."""
    target = task.target
    stacked = [pixels for _, pixels in waiting if pixels is not None]
    features_NRC = np.zeros((0, target.rows, target.width), np.float32)
    if stacked:
        features_NRC = np.asarray(load_teacher(target)(np.stack(stacked)), np.float32)
    expected = (len(stacked), target.rows, target.width)
    if features_NRC.shape != expected:
        raise DataError(
            f"targets: teacher {target.teacher} gives {list(features_NRC.shape[1:])} an image; "
            f"expected {[*expected[1:]]}, set rows and width to what it gives"
        )
    found = iter(pool_rows(features_NRC, target.pool))
    for row, pixels in waiting:
        yield row if pixels is None else row | _stored(next(found), target.storage)


def _stored(rows_RC: NDArray[np.float32], storage: Any) -> Row:
    """Features as they are stored, and what that has changed."""
    if not np.isfinite(rows_RC).all():
        count = int((~np.isfinite(rows_RC)).sum())
        return {"status": REFUSED, "detail": f"{count} of {rows_RC.size} numbers are not finite"}
    features, scales = encode_rows(rows_RC, storage)
    bytes_of = (np.frombuffer(features, np.uint8), np.frombuffer(scales, np.uint8))
    kept_RC = decode_rows(*stored_rows(*bytes_of, *rows_RC.shape))
    return {
        "features": features,
        "scales": scales,
        "squared_difference": float(np.square(kept_RC - rows_RC, dtype=np.float64).sum()),
        "squared_length": float(np.square(rows_RC, dtype=np.float64).sum()),
    }
