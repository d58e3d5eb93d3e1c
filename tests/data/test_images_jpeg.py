"""libjpeg-turbo's pixels are Pillow's, and passes apart give the pixels of pad-then-resize."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from lapilli.data import images
from lapilli.data.images import BadImage, ImageSpec, decode, prepare, square
from tests.factories import CLIP_MEAN, bad_image, image_bytes, picture

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


# ---- passes apart ------------------------------------------------------------------------------


def pad_then_resize(image: Pixels, size: int, fill: tuple[int, int, int]) -> Pixels:
    """torch's one call on the padded square, on a copy in its own order of memory."""
    height, width = image.shape[:2]
    side = max(height, width)
    canvas = np.full((side, side, 3), fill, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image
    tensor = torch.from_numpy(canvas.transpose(2, 0, 1).copy())[None]
    resized = torch.nn.functional.interpolate(
        tensor, (size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].numpy().transpose(1, 2, 0)


@settings(max_examples=80, deadline=None)
@given(
    short=st.integers(1, 40),
    ratio=st.floats(1, 60),
    wide=st.booleans(),
    size=st.integers(2, 60),  # at 1 torch's own order of memory trips an assertion in torch
    fill=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_torchs_passes_apart_are_pad_then_resize(
    short: int, ratio: float, wide: bool, size: int, fill: tuple[int, int, int]
) -> None:
    long = max(short, min(700, round(short * ratio)))
    image = np.asarray(picture(long, short, 1) if wide else picture(short, long, 1))
    spec = ImageSpec(size, fill)
    expected = pad_then_resize(image, size, fill)
    np.testing.assert_array_equal(square(image, spec, "torch"), expected)


@pytest.mark.parametrize("size", [224, 336, 384])
@pytest.mark.parametrize("shape", [(640, 480), (480, 640), (350, 500), (336, 336)], ids=str)
def test_torch_at_the_towers_sizes(size: int, shape: tuple[int, int]) -> None:
    image = np.asarray(picture(*shape, seed=3))
    expected = pad_then_resize(image, size, CLIP_MEAN)
    np.testing.assert_array_equal(square(image, ImageSpec(size, CLIP_MEAN), "torch"), expected)
