"""A survey gives each record the verdict that a build gives it, and finds what is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.mounts.published import HOLES
from lapilli.data.planning.decode_check import verify_images
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.scan import survey
from lapilli.data.record import Entry, Reason
from tests.factories import (
    Mixture,
    build_config,
    conversation,
    image_bytes,
    make_mixture,
    make_tokenizer,
)


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    return make_mixture(tmp_path / "root", images=25, defects=True)


@pytest.fixture
def config(mixture: Mixture, tmp_path: Path) -> BuildConfig:
    return build_config(mixture, tmp_path / "out", tmp_path / "no_tokenizer")


def test_every_record_gets_the_verdict_that_was_planted(
    mixture: Mixture, config: BuildConfig
) -> None:
    root = Path(config.root)
    found = survey(config)
    bad_images = verify_images(found.images.values(), root, list(config.views.values()), workers=1)
    bad: list[Entry] = []
    found = survey(config, bad_images, on_bad=bad.append)
    reasons = {entry.sample_id: entry.verdict.reason for entry in bad}
    assert reasons == {name: reason for name, reason in mixture.expected.items() if reason}
    assert found.read.total() == len(mixture.expected)
    assert found.bad.total() == len(bad)
    assert dict(found.repairs) == {"extension": 1, "case": 1, "alias": 1}
    assert not found.clean
    for (source, reason), example in found.examples.items():
        first = next(e for e in bad if e.source == source and e.verdict.reason == reason)
        assert (example.sample_id, example.detail) == (first.sample_id, first.verdict.detail)


def test_known_holes_are_told_by_folder_and_kind(tmp_path: Path) -> None:
    records = [conversation(f"o{n}", f"ocr_vqa/images/{n}.jpg") for n in range(4)]
    records += [conversation("o0 again", "ocr_vqa/images/0.jpg")]
    records += [conversation(f"v{n}", f"vg/VG_100K_2/{n}.jpg") for n in range(3)]
    records += [conversation("c", "coco/train2017/0.jpg")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for name in ("ocr_vqa/images/3.jpg", "vg/VG_100K_2/0.jpg", "coco/train2017/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes("jpeg"))
    for number in (1, 2):
        (tmp_path / "vg" / "VG_100K_2" / f"{number}.jpg").write_bytes(b"")
    mixture = Mixture(tmp_path, [SourceConfig("s", "a.json")], {}, [])
    found = survey(build_config(mixture, tmp_path / "out", tmp_path))
    ocr, genome = HOLES
    assert found.holes == {
        ocr: {f"ocr_vqa/images/{n}.jpg" for n in range(3)},
        genome: {f"vg/VG_100K_2/{n}.jpg" for n in (1, 2)},
    }
    assert found.bad == {("s", Reason.IMAGE_MISSING): 5, ("s", Reason.IMAGE_UNDECODABLE): 2}


def test_progress_ends_at_the_number_of_records(config: BuildConfig) -> None:
    seen: list[int] = []
    found = survey(config, on_progress=seen.append)
    assert seen[-1] == found.read.total()


@pytest.mark.parametrize("reads", [survey, plan_build])
def test_progress_is_told_by_time_however_long_a_record_takes(
    mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[..., object]
) -> None:
    """Each look at the clock is half a second on: every second record is told."""
    tokenizer = make_tokenizer(tmp_path / "tok")
    config = replace(build_config(mixture, tmp_path / "out", tokenizer), max_quarantined=1.0)
    clock = count(0, 0.5)
    monkeypatch.setattr("lapilli.data.planning.progress.monotonic", lambda: next(clock))
    seen: list[int] = []
    reads(config, on_progress=seen.append)
    total = seen[-1]
    assert total > 4
    assert set(range(2, total + 1, 2)) <= set(seen)
