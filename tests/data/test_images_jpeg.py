"""libjpeg-turbo's pixels are Pillow's, for every kind of JPEG."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from lapilli.data.images import view as images
from lapilli.data.images.view import BadImage, ImageSpec, decode, prepare
from tests.factories import CLIP_MEAN, IMAGE_KINDS, bad_image, image_bytes, picture

SPEC = ImageSpec(24, CLIP_MEAN)
Pixels = NDArray[np.uint8]


def pillows(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def jpeg(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(width, height, seed=width).convert(mode).save(buffer, "jpeg", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (33, 47), (161, 120)], ids=str)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("quality", [30, 95])
def test_pixels_are_pillows(size: tuple[int, int], subsampling: str, quality: int) -> None:
    data = jpeg(*size, subsampling=subsampling, quality=quality)
    np.testing.assert_array_equal(decode(data, SPEC).image, pillows(data))


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"restart_marker_rows": 1},
        {"optimize": True},
        {"keep_rgb": True},
        {"mode": "L"},
        {"mode": "L", "progressive": True},
        {"mode": "CMYK"},
    ],
    ids=str,
)
def test_pixels_of_every_kind_of_jpeg_are_pillows(options: dict[str, Any]) -> None:
    data = jpeg(61, 43, **options)
    np.testing.assert_array_equal(decode(data, SPEC).image, pillows(data))


# `picture(17, 11, seed=4)` by libjpeg-turbo's `cjpeg -arithmetic -quality 40`; Pillow writes none.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVt"
    "VkVGZIhlbXd7gYKBTmCNl4x9lnN+gXz/2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8"
    "fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHz/yQARCAALABEDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIR"
    "AxEAPwD9wN29ZgRv2nMESy43nx67CMbiY+UGMjCnhhvGK43VvwFyJSyU9iHghR0/Ft3/AMVr4Hlbxc1GEIZeQPzO"
    "udFhzjya/9k="
)


def test_pixels_of_an_arithmetic_coded_jpeg_are_pillows() -> None:
    with Image.open(io.BytesIO(ARITHMETIC)) as image:
        assert image.size == (17, 11)
    assert b"\xff\xc9" in ARITHMETIC  # start of a frame, sequential, arithmetic coding
    np.testing.assert_array_equal(decode(ARITHMETIC, SPEC).image, pillows(ARITHMETIC))


@pytest.mark.parametrize("orient", ["ignore", "exif"])
@pytest.mark.parametrize("kind", [*IMAGE_KINDS, "turned"])
def test_pixels_are_the_same_in_pillows_layout(kind: str, orient: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(40, 23, exif=exif) if kind == "turned" else image_bytes(kind, 40, 23)
    spec = replace(SPEC, orient=orient)
    plain, pillow = decode(data, spec, "torch").image, decode(data, spec, "pillow").image
    assert (plain.shape[2], pillow.shape[2]) == (3, 4)
    np.testing.assert_array_equal(pillow[..., :3], plain)


def test_a_whole_jpeg_does_not_come_from_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = simplejpeg.decode_jpeg

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append("decoded")
        return real(*arguments, **options)

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", counted)
    monkeypatch.delattr(images, "_decode_with_pillow")
    decode(image_bytes("jpeg"), SPEC)
    assert calls == ["decoded"]


def test_what_is_damaged_is_judged_by_pillow() -> None:
    data = bad_image("truncated_jpeg")
    with pytest.raises(OSError, match="truncated") as caught:
        pillows(data)
    with pytest.raises(BadImage) as bad:
        prepare(data, SPEC)
    assert str(caught.value) in bad.value.detail
