"""The rows of one image shard: read each file, decode it, make it square, store the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lapilli.data.codecs import Codecs
from lapilli.data.encoding import ORIGINAL, Encoding, encode_pixels
from lapilli.data.images import BadImage, ImageSpec, decode, square
from lapilli.data.mounts import Located, read_image
from lapilli.data.originals import original_row
from lapilli.data.plan import ImageTask
from lapilli.data.shards import JPEG_SCHEMA, OK, UNUSED

__all__ = ["image_columns"]


def image_columns(task: ImageTask) -> dict[str, list[Any]]:
    """The columns of a task's shard.

    Raises:
        DataError: This process has other codecs than the driver.
    """
    task.codecs.require()
    root = Path(task.root)
    columns: dict[str, list[Any]] = {field.name: [] for field in JPEG_SCHEMA}
    for place in task.images:
        row = _row(root, place, task)
        for name, values in columns.items():
            values.append(row.get(name))
    return columns


def _row(root: Path, place: Located, task: ImageTask) -> dict[str, Any]:
    known = {"image_id": place.image_id, "encoding": task.encoding.kind}
    if not place.container:
        return {**known, "status": UNUSED, "detail": ""}
    if task.encoding.kind == ORIGINAL:
        return {**known, **original_row(root, place, task.spec)}
    return {**known, **_image_row(root, place, task.spec, task.codecs, task.encoding)}


def _image_row(
    root: Path, place: Located, spec: ImageSpec, codecs: Codecs, encoding: Encoding
) -> dict[str, Any]:
    """Decode one image; what is wrong with it ends here, as a status."""
    try:
        decoded = decode(read_image(root, place), spec)
        pixels = square(decoded.image, spec, codecs.resizer)
    except BadImage as bad:
        return {"status": str(bad.reason), "detail": bad.detail}
    return {
        "status": OK, "detail": "", "source_width": decoded.source_width,
        "source_height": decoded.source_height, **encode_pixels(pixels, encoding),
    }  # fmt: skip
