"""Pictures used whole: in bounded memory, whatever stands beside them, odd modes counted."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from lapilli.data.errors import DataError
from lapilli.data.images import view as images
from lapilli.data.images.codecs import is_simd
from lapilli.data.images.view import BadImage, ImageSpec, Note, decode, prepare, square
from lapilli.data.record import Reason
from tests.data.test_images_passes import pad_then_resize, pillows_square
from tests.factories import CLIP_MEAN, image_bytes, picture

SPEC = ImageSpec(24, CLIP_MEAN)
Pixels = NDArray[np.uint8]


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- bands ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    short=st.integers(1, 60),
    ratio=st.floats(1, 60),
    wide=st.booleans(),
    size=st.integers(2, 60),
    aspect=st.sampled_from(["pad", "crop", "stretch"]),
    band=st.integers(1, 3000),
)
def test_bands_give_the_pixels_of_the_whole(
    short: int, ratio: float, wide: bool, size: int, aspect: Any, band: int
) -> None:
    long = max(short, min(700, round(short * ratio)))
    image = picture(long, short, 1) if wide else picture(short, long, 1)
    spec = ImageSpec(size, CLIP_MEAN, aspect=aspect)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "BAND_PIXELS", band)
        torchs = square(np.array(image), spec, "torch")
        plain: Any = "simd" if is_simd() else "pillow"
        pillows = square(np.asarray(image), spec, plain)
        four = image.copy()
        four.putalpha(77)
        np.testing.assert_array_equal(square(np.asarray(four), spec, plain), pillows)
    if aspect == "pad":
        np.testing.assert_array_equal(torchs, pad_then_resize(np.asarray(image), size, CLIP_MEAN))
    if not is_simd():
        np.testing.assert_array_equal(pillows, pillows_square(image, spec))
    np.testing.assert_array_equal(torchs, square(np.array(image), spec, "torch"))


@pytest.mark.parametrize("size", [(1400, 20), (20, 1400)])
@pytest.mark.parametrize("resizer", ["torch", "auto"])
def test_a_long_picture_needs_no_square_canvas(size: tuple[int, int], resizer: Any) -> None:
    data = image_bytes("png", *size)
    spec = replace(SPEC, max_pixels=1400 * 24, resizer=resizer)
    np.testing.assert_array_equal(
        prepare(data, spec), pad_then_resize(np.asarray(picture(*size, 0)), 24, CLIP_MEAN)
    )
    with pytest.raises(BadImage, match="needs 33600 pixels"):
        prepare(data, replace(spec, max_pixels=1400 * 24 - 1))


MEASURE = """
import io, sys
from PIL import Image
import torch
from lapilli.data.images.view import ImageSpec, prepare
width, height, mode, resizer = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
buffer = io.BytesIO()
Image.new(mode, (width, height), 200 if len(mode) == 1 else (9, 9, 9, 0)[: len(mode)]).save(
    buffer, "png", compress_level=1)
data = buffer.getvalue()
del buffer
prepare(open(sys.argv[5], "rb").read(), ImageSpec(32, (1, 2, 3), resizer=resizer))
open("/proc/self/clear_refs", "w").write("5")
now = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
prepare(data, ImageSpec(336, (1, 2, 3), resizer=resizer))
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
print(peak - now)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize(
    ("size", "resizer"), [((14000, 800), "torch"), ((800, 14000), "torch"), ((800, 14000), "auto")]
)
def test_memory_is_bounded_by_the_picture_and_not_by_its_square(
    tmp_path: Path, size: tuple[int, int], resizer: str
) -> None:
    """Pillow holds 4 bytes a pixel, the array 3; the square canvas alone would be 588 MB."""
    small = tmp_path / "small.png"
    small.write_bytes(image_bytes("png"))
    command = [sys.executable, "-c", MEASURE, *map(str, size), "RGB", resizer, str(small)]
    peak = int(subprocess.check_output(command, text=True)) << 10
    assert peak < 7 * size[0] * size[1] + (40 << 20)


def test_a_view_may_raise_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "PILLOW_LIMIT", 900)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 450)
    data = image_bytes("png", 50, 33)
    with pytest.raises(BadImage) as caught:
        prepare(data, replace(SPEC, max_pixels=900))
    assert caught.value.reason == Reason.IMAGE_TOO_LARGE
    assert prepare(data, replace(SPEC, max_pixels=1650)).shape == (24, 24, 3)
    assert Image.MAX_IMAGE_PIXELS == 450  # a setting of the process, not ours


# ---- side data -----------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes, check: int = 0) -> bytes:
    return (
        struct.pack(">I", len(body))
        + name
        + body
        + struct.pack(">I", zlib.crc32(name + body) ^ check)
    )


BOMB = zlib.compress(bytes(3 << 20))
SIDE_CHUNKS = {
    "zTXt": chunk(b"zTXt", b"a\0\0" + BOMB),
    "iTXt": chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB),
    "iCCP": chunk(b"iCCP", b"a\0\0" + BOMB),
    "bad check": chunk(b"tEXt", b"a\0b", check=1),
    "bad check of physical size": chunk(b"pHYs", bytes(9), check=1),
    "short": chunk(b"gAMA", b"a"),
    "many": chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(1 << 20))) * 66,
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("name", SIDE_CHUNKS)
def test_a_png_with_bad_side_data_is_decoded_without_it(name: str, before: bool) -> None:
    plain = image_bytes("png", 50, 33, seed=3)
    at = plain.index(b"IDAT") - 4 if before else plain.index(b"IEND") - 4
    decoded = decode(plain[:at] + SIDE_CHUNKS[name] + plain[at:], SPEC)
    np.testing.assert_array_equal(decoded.image, decode(plain, SPEC).image)
    if before:
        assert decoded.notes == (Note.SIDE_DATA,)


def test_a_damaged_png_stays_damaged_whatever_stands_beside_its_pixels() -> None:
    plain = image_bytes("png", 50, 33, seed=3)
    at = plain.index(b"IDAT")
    text = SIDE_CHUNKS["zTXt"]
    for bad in (
        plain[: at - 4] + text + plain[at - 4 : at + 40],  # cut off
        plain[: at - 4] + text + plain[at - 4 : -20] + bytes(8) + plain[-12:],  # another check
        plain[:20] + bytes(4) + plain[24:],  # no width
    ):
        with pytest.raises(BadImage) as caught:
            decode(bad, SPEC)
        assert caught.value.reason == Reason.IMAGE_UNDECODABLE


@pytest.mark.filterwarnings("ignore:::PIL")
def test_side_data_of_a_jpeg_never_loses_its_pixels() -> None:
    """Segments of every kind with anything in them, as cameras and editors leave them."""
    plain, rng = image_bytes("jpeg", 50, 33), random.Random(0)
    expected = decode(plain, SPEC).image
    starts = [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0II*\0\x08\0\0\0", b"MPF\0",
              b"MPF\0MM\0*\0\0\0\x08", b"ICC_PROFILE\0\1\1", b"Photoshop 3.0\0 8BIM",
              b"JFIF\0"]  # fmt: skip
    spec = replace(SPEC, orient="exif")
    for _ in range(400):
        body = rng.choice(starts) + rng.randbytes(rng.choice([0, 3, 30, 300]))
        marker = rng.choice([0xE0, 0xE1, 0xE2, 0xE5, 0xED, 0xFE])
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
        found = decode(plain[:2] + segment + plain[2:], spec).image
        if found.shape == expected.shape:
            np.testing.assert_array_equal(found, expected)


# ---- modes ---------------------------------------------------------------------------------------


def ramp(dtype: Any, highest: float) -> Image.Image:
    values = np.linspace(0, highest, 64, dtype=dtype)
    return Image.fromarray(np.tile(values, (64, 1)))


def drawn(ink: tuple[int, ...], mode: str = "RGBA", share: int = 64) -> Image.Image:
    """A clear picture with some of it inked."""
    image = Image.new("RGBA", (64, 64), (*ink[:3], 0))
    image.paste((*ink[:3], 255), (0, 0, 8, share))
    if mode == "P":
        paletted = Image.new("P", (64, 64), 0)
        paletted.putpalette([*ink[:3], *ink[:3]])
        paletted.paste(1, (0, 0, 8, share))
        return paletted
    return image.convert(mode)


FLAT = {
    "16 bits": saved(ramp(np.uint16, 65535)),
    "16 bits, partly used": saved(ramp(np.uint16, 20000)),
    "16 bits, tiff": saved(ramp(np.uint16, 65535), "tiff"),
    "32 bits": saved(ramp(np.int32, 1e6), "tiff"),
    "float of 1": saved(ramp(np.float32, 1.0), "tiff"),
    "negative": saved(ramp(np.float32, -5.0), "tiff"),
    "black on clear": saved(drawn((0, 0, 0))),
    "white on clear": saved(drawn((255, 255, 255))),
    "a little ink": saved(drawn((0, 0, 0), share=4)),
    "grey and alpha": saved(drawn((0, 0, 0), "LA")),
    "palette": saved(drawn((0, 0, 0), "P"), transparency=0),
    "webp": saved(drawn((0, 0, 0)), "webp", lossless=True, exact=True),
}
NOT_FLAT = {
    "8 bits in 16": saved(ramp(np.uint16, 255)),
    "one value of 16 bits": saved(Image.fromarray(np.full((9, 9), 40000, np.uint16))),
    "one float": saved(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "tiff"),
    "one colour": saved(Image.new("RGB", (9, 9), (1, 2, 3))),
    "all clear": saved(Image.new("RGBA", (9, 9), (0, 0, 0, 0))),
    "opaque": saved(picture(20, 20, 1).convert("RGBA")),
    "grey": saved(picture(20, 20, 1).convert("L")),
    "photo": image_bytes("jpeg", 20, 20),
    "palette of one colour": saved(Image.new("P", (9, 9), 3)),
}


@pytest.mark.parametrize("name", FLAT)
def test_pixels_lost_by_conversion_are_noted_and_those_of_llava(name: str) -> None:
    decoded = decode(FLAT[name], SPEC)
    assert decoded.notes == (Note.FLAT,)
    with Image.open(io.BytesIO(FLAT[name])) as image:
        np.testing.assert_array_equal(decoded.image, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", NOT_FLAT)
def test_what_is_not_lost_is_not_noted(name: str) -> None:
    assert decode(NOT_FLAT[name], SPEC).notes == ()


@pytest.mark.parametrize("alpha", ["white", "mean"])
@pytest.mark.parametrize("name", ["black on clear", "a little ink", "grey and alpha", "palette"])
def test_alpha_puts_a_picture_on_a_ground(name: str, alpha: Any) -> None:
    decoded = decode(FLAT[name], replace(SPEC, alpha=alpha))
    with Image.open(io.BytesIO(FLAT[name])) as image:
        rgba = np.asarray(image.convert("RGBA")).astype(float)
    ground = 255 if alpha == "white" else np.array(CLIP_MEAN)
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + ground * (1 - share)
    assert np.abs(decoded.image - expected).max() <= 1
    assert decoded.notes == ()


def test_alpha_white_is_what_transformers_does() -> None:
    from transformers.image_transforms import convert_to_rgb

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 30, 4), np.uint8), "RGBA")
    ours = decode(saved(image), replace(SPEC, alpha="white")).image.astype(int)
    theirs: Any = convert_to_rgb(image)
    if np.array_equal(np.asarray(theirs), np.asarray(image.convert("RGB"))):
        pytest.skip("this transformers drops transparency")
    assert np.abs(ours - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "highest", "expected"),
    [
        (np.uint16, 65535, np.linspace(0, 255, 64)),
        (np.uint16, 25700, np.linspace(0, 100, 64)),
        (np.int32, 1_000_000, np.linspace(0, 255, 64)),
        (np.float32, 1.0, np.linspace(0, 255, 64)),
        (np.float32, -5.0, np.linspace(255, 0, 64)),
    ],
)
def test_depth_scale_keeps_what_the_values_tell(
    dtype: Any, highest: float, expected: NDArray[np.float64]
) -> None:
    kind = "png" if dtype == np.uint16 else "tiff"
    decoded = decode(saved(ramp(dtype, highest), kind), replace(SPEC, depth="scale"))
    assert np.abs(decoded.image[0].mean(1) - expected).max() <= 1
    assert decoded.notes == ()


def test_values_that_are_no_numbers_are_the_lowest() -> None:
    values = np.array([[np.nan, 1, 2], [np.inf, 3, -np.inf]], np.float32)
    spec = replace(SPEC, depth="scale")
    found = decode(saved(Image.fromarray(values), "tiff"), spec).image[..., 0]
    assert found.tolist() == [[0, 0, 128], [255, 255, 0]]


# ---- the spec ------------------------------------------------------------------------------------


def test_a_view_that_sets_nothing_new_has_the_facts_it_had() -> None:
    assert list(SPEC.facts()) == [
        "size",
        "fill",
        "aspect",
        "mode",
        "resizer",
        "orient",
        "max_pixels",
    ]
    asked = replace(SPEC, alpha="white", depth="scale")
    assert {k: asked.facts()[k] for k in ("alpha", "depth")} == {"alpha": "white", "depth": "scale"}
    for spec in (SPEC, asked):
        assert ImageSpec.of({**spec.facts(), "fill": list(spec.fill)}) == spec
    with pytest.raises(DataError, match="view: setting 'gamma' is unknown here"):
        ImageSpec.of({**SPEC.facts(), "gamma": 2})
