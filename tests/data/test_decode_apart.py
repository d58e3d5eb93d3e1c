"""Images decoded in processes of their own: the same pixels, and an end to what takes too much."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from lapilli.data.images.decode_worker import DecodeLimits, DecoderProcess, OverLimit
from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.record import Reason
from tests.factories import BAD_KINDS, IMAGE_KINDS, bad_image, image_bytes

SPEC = ImageSpec(32, (122, 116, 104), max_pixels=50_000_000)
LIMITS = DecodeLimits(seconds=10, memory_bytes=300 << 20)


@pytest.fixture(scope="module")
def decoder() -> Iterator[DecoderProcess]:
    found = DecoderProcess(SPEC)
    yield found
    found.close()


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_the_pixels_are_those_of_prepare(decoder: DecoderProcess, kind: str) -> None:
    data = image_bytes(kind, 57, 40)
    assert np.array_equal(decoder.prepare(data, LIMITS), prepare(data, SPEC))


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_a_bad_image_is_told_as_prepare_tells_it(decoder: DecoderProcess, kind: str) -> None:
    data = bad_image(kind)
    with pytest.raises(BadImage) as here:
        prepare(data, SPEC)
    with pytest.raises(BadImage) as apart:
        decoder.prepare(data, LIMITS)
    assert (apart.value.reason, apart.value.detail) == (here.value.reason, here.value.detail)


def test_memory_is_bounded(decoder: DecoderProcess) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (5000, 5000)).save(file, "PNG", compress_level=1)  # 100 MB of pixels
    with pytest.raises((OverLimit, BadImage)) as raised:
        decoder.prepare(file.getvalue(), DecodeLimits(10, 50 << 20))
    assert not isinstance(raised.value, BadImage) or raised.value.reason is Reason.IMAGE_UNDECODABLE
    assert decoder.prepare(image_bytes("png"), LIMITS).shape == (32, 32, 3)


def test_what_nobody_waits_for_is_ended(decoder: DecoderProcess) -> None:
    with pytest.raises(OverLimit):
        decoder.prepare(image_bytes("jpeg", 4000, 4000), LIMITS, lambda: True)


def test_a_helper_that_was_killed_is_started_again() -> None:
    decoder = DecoderProcess(SPEC)
    process = decoder._process  # pyright: ignore[reportPrivateUsage]
    process.kill()
    process.wait()
    assert decoder.prepare(image_bytes("png"), LIMITS).shape == (32, 32, 3)
    decoder.close()
