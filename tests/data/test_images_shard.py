"""An image shard's bytes are those of plain Arrow; reading ahead is bounded and keeps the order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.building import image_shard
from lapilli.data.building.image_shard import image_columns, read_ahead
from lapilli.data.images.codecs import resolve_codecs
from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.mounts import Located
from lapilli.data.planning.shard_task import ImageTask, writer_version
from lapilli.data.shards.files import write_shard
from lapilli.data.shards.schemas import IMAGE_SCHEMA
from tests.factories import BAD_KINDS, CLIP_MEAN, IMAGE_KINDS, bad_image, image_bytes

SPEC = ImageSpec(24, CLIP_MEAN, max_pixels=1_000_000)


def put(root: Path, name: str, data: bytes) -> Located:
    path = root / name
    path.write_bytes(data)
    return Located(name, name, len(data), path.stat().st_mtime_ns)


def task_of(root: Path, places: list[Located]) -> ImageTask:
    codecs = resolve_codecs("torch")
    return ImageTask("images/v/0.arrow", writer_version(), str(root), tuple(places), SPEC, codecs)


@pytest.mark.parametrize("kinds", [(), ("empty", "truncated_jpeg"), tuple(BAD_KINDS)], ids=len)
def test_a_shard_is_what_arrow_makes_of_plain_rows(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    files = {kind: image_bytes(kind, seed=7) for kind in IMAGE_KINDS}
    files |= {kind: bad_image(kind) for kind in kinds}
    names = sorted(files)  # so that good and bad ones alternate
    places = [put(tmp_path, name, files[name]) for name in names]
    columns = image_columns(task_of(tmp_path, places))
    rows: list[bytes | None] = []
    for name in names:
        try:
            rows.append(prepare(files[name], SPEC).tobytes())
        except BadImage:
            rows.append(None)
    assert sum(row is None for row in rows) == len(kinds)
    ours = write_shard(tmp_path, "ours.arrow", columns, IMAGE_SCHEMA)
    plain = write_shard(tmp_path, "plain.arrow", columns | {"pixels": rows}, IMAGE_SCHEMA)
    assert ours.sha256 == plain.sha256


def test_a_shard_of_bad_images_alone(tmp_path: Path) -> None:
    columns = image_columns(task_of(tmp_path, [put(tmp_path, "a", b""), put(tmp_path, "b", b"")]))
    assert columns["pixels"].to_pylist() == [None, None]
    assert columns["status"] == ["image_undecodable"] * 2


def test_pixels_are_not_copied_into_python(tmp_path: Path) -> None:
    places = [put(tmp_path, f"{n}.jpg", image_bytes("jpeg", seed=n)) for n in range(3)]
    pixels = image_columns(task_of(tmp_path, places))["pixels"]
    values = pixels.buffers()[2]
    assert values.size == 3 * 24 * 24 * 3
    assert np.frombuffer(values, np.uint8).base is not None


def test_reading_ahead_is_bounded_by_bytes_and_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [put(tmp_path, str(n), bytes(100 + n)) for n in range(60)]
    lock, state = threading.Lock(), {"begun": 0}

    def counted(root: Path, place: Located) -> bytes:
        with lock:
            state["begun"] += 1
        return (root / place.container).read_bytes()

    monkeypatch.setattr(image_shard, "read_image", counted)
    monkeypatch.setattr(image_shard, "READ_AHEAD_BYTES", 500)
    taken: list[Any] = []
    for place, read in read_ahead(tmp_path, places):
        assert read is not None
        assert len(read()) == place.size
        taken.append(place)
        assert state["begun"] - len(taken) <= 5  # of 100 bytes and more, within 500
    assert taken == places
