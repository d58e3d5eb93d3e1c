"""Every topic runs at a small size and adds its rows; what is measured is no matter of a test."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lapilli.data.batches.sampler import EpochPlan
from pipelines.benchmarks import harness, planning
from pipelines.benchmarks.__main__ import main
from pipelines.benchmarks.harness import Bar, Spread, by_turns, draw_bars
from pipelines.benchmarks.material.large import write_large
from pipelines.benchmarks.material.photos import write_photos
from pipelines.benchmarks.sides.build_sides import write_alone
from pipelines.benchmarks.sides.image_sides import FILL, SIZE, llava_pixels, llava_square
from pipelines.benchmarks.sides.orders import ORDERS, Samples, Shape
from pipelines.cli.command import UsageError
from tests.factories import image_bytes


@pytest.fixture(autouse=True)
def same_cores() -> Iterator[None]:
    """Let a measurement pin this process, and undo it."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rows go in these tests."""
    folder = tmp_path / "results"
    folder.mkdir()
    add_row = harness.add_row
    for module in (harness, planning):
        monkeypatch.setattr(
            module, "add_row", lambda topic, row, where=folder: add_row(topic, row, where)
        )
    return folder


def rows_of(results: Path, topic: str) -> list[dict[str, str]]:
    with (results / f"{topic}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_images_tells_each_side_of_each_size(tmp_path: Path, results: Path) -> None:
    picture = tmp_path / "images.png"
    # One size: each starts its own processes, most of the time of this test.
    flags = ["--sizes", '["64x48"]', "--photos=2", "--rounds=1", f"--plot={picture}"]
    assert main(["images", *flags]) == 0
    rows = rows_of(results, "images")
    sides = {row["side"] for row in rows}
    assert sides >= {"llava", "floor torch", "floor pillow", "lapilli torch exact"}
    assert len(rows) == len(sides)
    ours = next(row for row in rows if row["side"] == "lapilli torch exact")
    assert float(ours["of_llava"]) > 0
    assert float(ours["time_of_floor"]) > 0
    with Image.open(picture) as drawn:
        assert drawn.width >= 1200
    with pytest.raises(UsageError, match="sizes: '640'; expected WIDTHxHEIGHT"):
        main(["images", "--sizes", '["640"]', "--photos=1", "--rounds=1", "--save=false"])


def test_llavas_path_is_transformers_processor_after_the_padding() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    data = image_bytes("jpeg", seed=3)
    photo = Image.open(io.BytesIO(data)).convert("RGB")
    side = max(photo.size)
    canvas = Image.new("RGB", (side, side), FILL)
    canvas.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    expected = processor(canvas, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(np.asarray(llava_pixels(data)), expected)
    mean, std = (
        np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    square = np.asarray(llava_square(data)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose((square - mean) / std, expected, atol=1e-5)


def test_build_runs_a_floor_and_ours_and_names_what_is_not_there(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--photos=3", "--images=5", "--rounds=1", "--sides", '["bare","here","litdata"]']
    assert main(["build", *flags, f"--folder={tmp_path / 'kept'}"]) == 0
    rows = {row["side"]: row for row in rows_of(results, "build")}
    assert set(rows) >= {"bare loop, one core", "lapilli, one process"}
    assert rows["lapilli, one process"]["distinct"] == "3"
    photos = sorted((tmp_path / "kept" / "photos").iterdir())
    assert len({path.stat().st_ino for path in photos}) == 3 < len(photos) == 5
    if "litdata" not in rows:
        assert "litdata: left out, litdata is not installed" in capsys.readouterr().out
    with pytest.raises(UsageError, match="sides: 'other'; expected some of bare"):
        main(["build", "--sides", '["other"]'])


def test_the_bare_loop_writes_the_squares_one_after_the_other(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 3, (64, 48))
    paths = sorted((tmp_path / "photos").iterdir())
    write_alone(paths, tmp_path, "pillow")
    (written,) = tmp_path.glob("*.raw")
    squares = np.frombuffer(written.read_bytes(), np.uint8).reshape(3, SIZE, SIZE, 3)
    for path, square in zip(paths, squares, strict=True):
        np.testing.assert_array_equal(square, np.asarray(llava_square(path.read_bytes())))


def test_open_and_read_add_their_rows(tmp_path: Path, results: Path) -> None:
    picture = tmp_path / "open.png"
    small = ["--records=300", "--shards=5", "--rounds=1", "--warm=false"]
    assert main(["open", *small, f"--plot={picture}"]) == 0
    assert [row["side"] for row in rows_of(results, "open")] == ["lapilli", "bare"]
    with Image.open(picture) as drawn:
        assert drawn.width >= 1200
    assert main(["read", "--images=5", "--reads=8", "--rounds=1"]) == 0
    sides = {row["side"] for row in rows_of(results, "read")}
    assert sides >= {"numpy map, copied", "lapilli, copied", "lapilli, by reference"}


def test_plan_adds_a_row_for_each_order(tmp_path: Path, results: Path) -> None:
    flags = ["--samples=600", "--rounds=1", "--ranks=2", "--micro_batch_size=4", "--max_shapes=4"]
    assert main(["plan", *flags, f"--plot={tmp_path / 'plan.png'}"]) == 0
    rows = {row["policy"]: row for row in rows_of(results, "plan")}
    assert set(rows) == {*ORDERS, "one sort"}
    assert rows["llava"]["steps"] == rows["ungrouped"]["steps"] == "75"
    for order in ("grouped", "modality", "prismatic"):  # each modality has a tail of its own
        assert int(rows[order]["steps"]) in (75, 76)
    assert rows["llava"]["of_llava"] == rows["ungrouped"]["of_ungrouped"] == "1.0"
    for order in ORDERS:
        row = rows[order]
        assert int(row["bucket_shapes"]) <= 4 < int(row["shapes"])
        assert float(row["bucket_padded_percent"]) >= float(row["padded_percent"])
    # A dataset that was built tells its own lengths and words.
    write_large(tmp_path / "built", records=100, size=8)
    flags = ["--rounds=1", "--ranks=2", "--micro_batch_size=4", "--save=false"]
    assert main(["plan", f"--dataset={tmp_path / 'built'}", *flags]) == 0


def test_plan_adds_a_row_for_each_window(results: Path) -> None:
    flags = ["--samples=60000", "--ranks=2", "--micro_batch_size=8"]
    assert main(["plan", *flags, "--order_windows=[0, 17000]"]) == 0
    one, windows = rows_of(results, "windows")
    assert (one["policy"], windows["policy"]) == ("one order", "windowed 17,000")
    assert (one["windows"], windows["windows"]) == ("1", "4")
    assert one["steps"] == windows["steps"]
    assert float(windows["peak_megabytes"]) < float(one["peak_megabytes"])
    assert float(windows["same_shard_percent"]) > float(one["same_shard_percent"])


def test_mixing_is_that_of_the_pairs_and_places() -> None:
    together = np.arange(40_000).reshape(-1, 10)
    found = planning.mixing(together, 40_000)
    block = planning.BLOCK
    apart = [batch[0] // block != batch[-1] // block for batch in together.tolist()]
    assert found["same_shard_percent"] > 1 - sum(apart) / len(apart)
    assert found["neighbours_percent"] == pytest.approx(3 / 40_000)
    assert found["source_spread_percent"] == pytest.approx(0.3)  # all of a source, or nothing
    mixed = np.random.default_rng(0).permutation(40_000).reshape(-1, 10)
    found = planning.mixing(mixed, 40_000)
    sizes = np.diff([0, 8192, 16384, 24576, 32768, 40_000]) / 40_000
    assert found["same_shard_percent"] == pytest.approx(float((sizes**2).sum()), rel=0.05)
    assert found["neighbours_percent"] == pytest.approx(1, rel=0.02)
    assert found["source_spread_percent"] == pytest.approx((0.09 / 10) ** 0.5, rel=0.02)


def test_prismatics_batches_are_dealt_as_its_code_deals_them() -> None:
    shape = Shape(ranks=2, micro_batch_size=2, accumulation=2)
    draw = np.random.default_rng(5)
    has_image = draw.random(100) < 0.7
    words = draw.integers(1, 500, 100)
    plan = ORDERS["prismatic"](Samples(words, words, has_image), shape)
    batches = plan.order.reshape(-1, 8)
    assert set(plan.order.tolist()) == set(range(100))
    full = [-(-int(kind.sum()) // 8) for kind in (has_image, ~has_image)]
    assert len(batches) == sum(full)
    for batch in batches:
        assert len(set(has_image[batch].tolist())) == 1
        # micro-step, rank, micro-batch: a rank's share is its micro-batches one after the other
        found = [
            words[share.reshape(-1)].tolist() for share in batch.reshape(2, 2, 2).swapaxes(0, 1)
        ]
        assert found == dealt_by_hand(sorted(words[batch].tolist(), reverse=True), ranks=2)


def dealt_by_hand(lengths: list[int], ranks: int) -> list[list[int]]:
    """What `SplitModalitySampler.reindex_batch` does: the emptiest rank that has room is next."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for length in lengths:
        room = [share for share in shares if len(share) < len(lengths) // ranks]
        min(room, key=sum).append(length)
    return shares


def test_modalities_apart_are_permuted_and_nothing_else() -> None:
    shape = Shape(ranks=2, micro_batch_size=2, accumulation=1)
    has_image = np.arange(23) % 3 > 0
    lengths = np.arange(1, 24)
    plan = ORDERS["modality"](Samples(lengths, lengths, has_image), shape)
    assert sorted(plan.order[plan.order >= 0].tolist()) == list(range(23))
    for batch in plan.order.reshape(-1, 4):
        assert len(set(has_image[batch[batch >= 0]].tolist())) == 1


def test_waste_is_what_a_hand_counts() -> None:
    config = planning.PlanConfig(samples=8, ranks=2, micro_batch_size=2, max_shapes=2)
    plan = EpochPlan(np.arange(8), np.array([0, 4, 8]), fixed_micro_batch=2)
    lengths = np.array([1, 3, 2, 2, 5, 5, 1, 4])
    samples = Samples(lengths, lengths, np.array([True] * 4 + [False] * 4))
    found = planning.waste(plan, samples, config)
    # micro-batches (1 3) (2 2) | (5 5) (1 4): 6 and 4, 10 and 8 tokens with padding
    assert found["padded"] == pytest.approx(1 - 23 / 28)
    assert found["computed"] == 2 * 6 + 2 * 10
    assert found["waiting"] == pytest.approx(32 / 28 - 1)
    assert found["shapes"] == 4
    # A bucket of 8 for each modality, since lengths are multiples of 8.
    assert found["bucket_shapes"] == 2
    assert found["bucket_padded"] == pytest.approx(1 - 23 / 64)


def test_sides_take_turns_and_the_first_round_may_not_count() -> None:
    called: list[str] = []
    clocks = {name: lambda name=name: called.append(name) or float(len(called)) for name in "abc"}
    found = by_turns(clocks, 2)
    assert [called[start : start + 3] for start in (0, 3, 6)] == [
        ["c", "a", "b"],
        ["a", "b", "c"],
        ["b", "c", "a"],
    ]
    assert found["a"] == Spread(6.5, 4, 9)
    assert Spread(2, 1, 4).rate(8) == Spread(4, 2, 8)


def test_a_plot_of_an_unknown_kind_says_so(tmp_path: Path) -> None:
    bars = [Bar("one", Spread(1, 1, 1), "ours"), Bar("two", Spread(30, 20, 40))]
    draw_bars(tmp_path / "a.svg", "title", "unit", bars, "caption")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    with pytest.raises(UsageError, match=r"a\.nothing"):
        draw_bars(tmp_path / "a.nothing", "title", "unit", bars, "caption")
