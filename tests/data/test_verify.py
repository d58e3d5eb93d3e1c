"""Every image decoded or named with a reason, and nothing that an image does ends the run."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.mounts import Located, Mount
from lapilli.data.planning.decode_check import verify_image, verify_images
from lapilli.data.record import Reason
from tests.factories import BAD_KINDS, CLIP_MEAN, IMAGE_KINDS, bad_image, image_bytes

SPEC = ImageSpec(16, CLIP_MEAN, resizer="pillow", max_pixels=10_000_000)


@dataclass(frozen=True)
class Killer(ImageSpec):
    """A view at whose sight the decoding process dies, as from a decoder's own fault."""

    def __getattribute__(self, name: str) -> object:
        if name == "max_pixels" and os.environ.get("LAPILLI_TEST_PARENT") != str(os.getpid()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getattribute__(name)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A copy with bytes changed, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 12)):
        place = rng.randrange(len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[place] = rng.randrange(256)
        elif kind == 1:
            del changed[place : place + rng.randint(1, 40)]
        elif kind == 2:
            changed[place:place] = changed[place : place + rng.randint(1, 40)]
        else:
            changed[place : place + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff"))
        if not changed:
            break
    return bytes(changed[: rng.randint(1, len(changed))] if rng.random() < 0.2 else changed)


def outcome(data: bytes) -> Reason | None:
    """None for pixels of the right shape, or the reason against the image."""
    try:
        pixels = prepare(data, SPEC)
    except BadImage as bad:
        return bad.reason if bad.detail.isprintable() else None
    return None if pixels.shape == (16, 16, 3) else Reason.SCHEMA


@pytest.mark.filterwarnings("ignore:::PIL")
def test_two_thousand_mutated_images_are_decoded_or_named() -> None:
    rng = random.Random(4)
    whole = {kind: image_bytes(kind, 48, 36, seed=1) for kind in IMAGE_KINDS}
    outcomes = [
        outcome(mutated(rng, whole[IMAGE_KINDS[number % len(IMAGE_KINDS)]]))
        for number in range(2000)
    ]
    good = outcomes.count(None)
    assert {*outcomes} == {None, Reason.IMAGE_UNDECODABLE, Reason.IMAGE_TOO_LARGE}
    assert min(good, 2000 - good) > 300  # of both, or nothing was tested


@pytest.fixture
def images(tmp_path: Path) -> list[Located]:
    """Forty good images and one of each bad kind."""
    for number in range(40):
        (tmp_path / f"good{number}.jpg").write_bytes(image_bytes("jpeg", seed=number))
    for kind in BAD_KINDS:
        (tmp_path / f"{kind}.jpg").write_bytes(bad_image(kind))
    mount = Mount(tmp_path)
    places = [mount.locate(path.name) for path in sorted(tmp_path.iterdir())]
    assert all(isinstance(place, Located) for place in places)
    return [place for place in places if isinstance(place, Located)]


def test_workers_find_what_one_process_finds(tmp_path: Path, images: list[Located]) -> None:
    seen: list[int] = []
    bad = verify_images(images, tmp_path, [SPEC], workers=2, on_progress=seen.append)
    assert {place: verdict.reason for place, verdict in bad.items()} == {
        f"{kind}.jpg": reason for kind, reason in BAD_KINDS.items()
    }
    assert seen[-1] == len(images)
    alone = {place.image_id: verify_image(tmp_path, place, [SPEC]) for place in images}
    assert bad == {name: verdict for name, verdict in alone.items() if not verdict.kept}


@pytest.mark.faults
def test_an_image_that_kills_its_decoder_is_named_and_the_rest_goes_on(
    tmp_path: Path, images: list[Located], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAPILLI_TEST_PARENT", str(os.getpid()))
    killer = Killer(16, CLIP_MEAN, resizer="pillow", max_pixels=10_000_000)
    good = [place for place in images if place.image_id.startswith("good")][:3]
    bad = verify_images(good, tmp_path, [killer], workers=1)
    assert set(bad) == {place.image_id for place in good}
    assert all("ends the process" in verdict.detail for verdict in bad.values())


def test_no_image_is_no_work(tmp_path: Path) -> None:
    assert verify_images([], tmp_path, [replace(SPEC, aspect="crop"), SPEC]) == {}
