"""The harness and its corpus; what a measurement finds is no matter of a test."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lapilli.data.sources.validation import check_record
from pipelines.benchmarks import __main__ as figures
from pipelines.benchmarks import harness, tokens
from pipelines.benchmarks.__main__ import main
from pipelines.benchmarks.material import photos
from pipelines.benchmarks.material.corpus import KINDS, conversations
from pipelines.benchmarks.material.photos import photo_name, write_photos
from pipelines.benchmarks.step import training
from pipelines.benchmarks.whole import watch
from pipelines.cli.command import UsageError
from tests.factories import make_tokenizer


@pytest.fixture
def same_cores() -> Iterator[None]:
    """Let a measurement pin this process, and undo it."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    if before:
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("same_cores")
def test_tokens_adds_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "add_row", lambda t, row: harness.add_row(t, row, tmp_path))
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "false"))
    flags = ["--records=40", "--records_per_shard=16"]
    assert main(["tokens", f"--tokenizer={make_tokenizer(tmp_path / 'small')}", *flags]) == 0
    with (tmp_path / "tokens.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["tokenizer"], row["records"], row["shards"]) == ("small", "40", "3")
    assert row["command"].startswith("python -m pipelines.benchmarks tokens --tokenizer=")
    assert float(row["ratio"]) > 0
    assert int(row["tokens"]) > 40 * 50
    with pytest.raises(UsageError, match="move the file away"):
        harness.add_row("tokens", {"other": 1}, tmp_path)


def test_train_adds_a_row_without_ray_and_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "add_row", lambda t, row: harness.add_row(t, row, tmp_path))
    for name in ("ray", "deepspeed"):
        monkeypatch.setitem(sys.modules, name, None)
    flags = ["--size=tiny", "--modes=[lora]", "--steps=1"]
    assert main(["train", *flags, f"--trace={tmp_path / 'trace'}"]) == 0
    with (tmp_path / "train.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["mode"], row["length"]) == ("lora", "240")
    assert min(float(row[name]) for name in ("seconds", "mfu", "hfu", "trainer_seconds")) > 0
    assert len(row["costs"].split("; ")) == 3
    assert (tmp_path / "trace" / "lora.json").stat().st_size > 0


def test_an_unknown_topic_lists_the_topics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="topic 'speed' is unknown: take one of images"):
        main(["speed"])
    assert main([]) == 0
    assert "topics: images" in capsys.readouterr().out


def test_the_corpus_is_the_mixtures_size_well_formed_and_the_seeds() -> None:
    assert sum(kind.records for kind in KINDS) == 665_298
    assert sum(kind.records for kind in KINDS if not kind.has_image) == 40_688
    some = list(conversations(300, 7))
    assert some == list(conversations(300, 7)) != list(conversations(300, 8))
    assert all(check_record(record).kept for record in some)
    images = Counter(len(record.images) for record in some)
    assert set(images) == {0, 1}
    assert images[0] < images[1]


def test_a_command_is_watched_line_by_line() -> None:
    seen = watch([sys.executable, "-c", "import time; print('one'); time.sleep(1.2); print('two')"])
    assert [line for _, line in seen.lines] == ["one", "two"]
    assert seen.when("one") < seen.seconds
    assert 0 < seen.driver <= seen.everything
    with pytest.raises(UsageError, match="exit code 3: no more"):
        watch([sys.executable, "-c", "print('no more'); raise SystemExit(3)"])


def test_readme_has_the_newest_figures() -> None:
    readme = figures.README.read_text(encoding="utf-8")
    assert readme == figures.with_table(readme), (
        "run `python -m pipelines.benchmarks figures` and commit README"
    )


def test_the_last_row_that_fits_is_the_newest_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figures.ReadmeFigure("speed", "{n} things", "{rate}/s", {"side": "ours"})
    monkeypatch.setattr(figures, "FIGURES", (figure,))
    rows = ["date,processor,side,n,rate", "1,a,ours,5,10", "2,b,ours,6,20", "3,c,other,7,30"]
    (tmp_path / "speed.csv").write_text("\n".join(rows) + "\n")
    assert figures.newest_table(tmp_path).splitlines()[2] == "| `speed` | 6 things | 20/s | 2, b |"
    (tmp_path / "speed.csv").write_text(rows[0] + "\n")
    with pytest.raises(UsageError, match=r"no row with \{'side': 'ours'\}; run the topic"):
        figures.newest_table(tmp_path)


def test_photos_are_distinct_and_follow_from_the_seed(tmp_path: Path) -> None:
    for package in ("skimage", "sklearn"):
        pytest.importorskip(package, reason=f"{package}, for its photos, is in the bench extra")
    taken = write_photos(tmp_path / "a", 5, (64, 48))
    write_photos(tmp_path / "b", 5, (64, 48))
    first, second = (
        [(tmp_path / folder / photo_name(n)).read_bytes() for n in range(5)] for folder in "ab"
    )
    assert first == second
    assert len(set(first)) == 5
    assert taken == sum(map(len, first))
    with Image.open(tmp_path / "a" / photo_name(0)) as image:
        assert (image.size, image.format) == ((64, 48), "JPEG")


def test_photos_come_from_both_packages_and_a_missing_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "PHOTOS", {"sklearn_that_is_not_there": ("a.jpg",)})
    monkeypatch.setattr(photos, "NAMES", {"sklearn_that_is_not_there": "scikit-learn"})
    photos.sources.cache_clear()
    with pytest.raises(UsageError, match="scikit-learn is not installed; pip install -e"):
        write_photos(tmp_path, 1, (64, 48))
    monkeypatch.undo()
    pytest.importorskip("sklearn", reason="scikit-learn, for its photos, is in the bench extra")
    names = {path.name for path in photos.sources()}
    assert {"china.jpg", "flower.jpg", "astronaut.png"} <= names
    assert all(path.is_file() for path in photos.sources())
