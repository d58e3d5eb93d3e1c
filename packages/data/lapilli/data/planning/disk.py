"""Estimate the disk space a build needs and check it before the build starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from lapilli.data.errors import DataError
from lapilli.data.images.encodings import ORIGINAL, estimated_bytes
from lapilli.data.io.access import exists
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.planning.parts.entry_views import packed_bytes
from lapilli.data.planning.shard_task import ImageTask, TargetTask, Task, source_bytes

__all__ = [
    "check_disk",
    "task_bytes",
]


TOKEN_ROW_BYTES = 100  # names, spans and offsets of a row


def check_disk(output: Output, missing: Iterable[Task]) -> None:
    """Stop before the work if the shards still to be written do not fit on the disk.

    Raises:
        DataError: Names the bytes needed and free.
    """
    if isinstance(output, RemotePath):
        return  # no store says how much it has left
    needed = sum(map(task_bytes, missing))
    existing = next(
        folder for folder in (output.absolute(), *output.absolute().parents) if exists(folder)
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"output: {output} has {bytes_text(free)} free, the shards need "
            f"{bytes_text(needed)}; free space or choose another --output"
        )


def task_bytes(task: Task) -> int:
    """Bytes that a task's shard will take: exact for raw pixels, estimated for the rest."""
    if not isinstance(task, ImageTask):
        # A token of four letters takes as many bytes as its letters.
        return packed_bytes(task.packed) + TOKEN_ROW_BYTES * len(task.packed)
    if isinstance(task, TargetTask):
        return len(task.images) * task.target.image_bytes
    if task.encoding.kind == ORIGINAL:
        return sum(map(source_bytes, task.images))
    return len(task.images) * estimated_bytes(task.spec.size**2 * 3, task.encoding)
