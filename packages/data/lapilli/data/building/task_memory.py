"""Estimate the memory that a task holds, by the largest image it may decode."""

from __future__ import annotations

from lapilli.data.building.image_shard import READ_AHEAD_BYTES
from lapilli.data.planning.disk import task_bytes
from lapilli.data.planning.shard_task import ImageTask, Task, source_bytes

__all__ = ["task_memory"]

PROCESS = 192 << 20  # bytes of a worker with its libraries, beside those it shares
PIXELS_A_BYTE = 16  # of a source file at most: an empty page as JPEG; photos have 2 to 8
PIXEL = 4  # bytes: Pillow keeps one behind each RGB


def task_memory(task: Task) -> int:
    """Bytes: the process, the shard, files read ahead, and the largest image as it is decoded.

    An image's pixels are not known before it is opened; `PIXELS_A_BYTE` of its file are assumed,
    and never more than the view's `max_pixels`.
    """
    if not isinstance(task, ImageTask):
        return PROCESS + 2 * task_bytes(task)
    sizes = [source_bytes(place) for place in task.images if place.container]
    largest = max(sizes, default=0)
    pixels = min(task.spec.max_pixels, PIXELS_A_BYTE * largest)
    return PROCESS + task_bytes(task) + min(sum(sizes), READ_AHEAD_BYTES) + largest + PIXEL * pixels
