"""The rows of one image shard: read each file, decode it, make it square."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lapilli.data.codecs import Codecs
from lapilli.data.images import BadImage, ImageSpec, decode, square
from lapilli.data.mounts import Located, read_image
from lapilli.data.plan import ImageTask
from lapilli.data.shards import IMAGE_SCHEMA, OK

__all__ = ["image_columns"]


def image_columns(task: ImageTask) -> dict[str, list[Any]]:
    """The columns of a task's shard.

    Raises:
        DataError: This process has other codecs than the driver.
    """
    task.codecs.require()
    root = Path(task.root)
    columns: dict[str, list[Any]] = {field.name: [] for field in IMAGE_SCHEMA}
    for place in task.images:
        row = _image_row(root, place, task.spec, task.codecs)
        for name, value in {"image_id": place.image_id, "encoding": "raw", **row}.items():
            columns[name].append(value)
    return columns


def _image_row(root: Path, place: Located, spec: ImageSpec, codecs: Codecs) -> dict[str, Any]:
    """Decode one image; what is wrong with it ends here, as a status."""
    try:
        decoded = decode(read_image(root, place), spec)
        pixels = square(decoded.image, spec, codecs.resizer)
    except BadImage as bad:
        return {
            "status": str(bad.reason), "detail": bad.detail,
            "source_width": None, "source_height": None, "pixels": None,
        }  # fmt: skip
    return {
        "status": OK, "detail": "", "source_width": decoded.source_width,
        "source_height": decoded.source_height, "pixels": pixels.tobytes(),
    }  # fmt: skip
