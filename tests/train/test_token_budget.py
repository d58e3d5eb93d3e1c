"""Micro-batches bounded by tokens: the same global batches and losses, whatever the cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.batches.token_budget import budget_chunks
from lapilli.data.dataset.dataset import Dataset
from lapilli.model.config import KEEP_ALL, ActivationPolicy
from lapilli.train.config import CheckpointConfig, OptimConfig, ValidationConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.memory_estimate import RowSizes, estimate_run, sketch_run
from lapilli.train.driver.memory_policy import choose_memory
from lapilli.train.driver.preflight import preflight
from lapilli.train.driver.replay import rerun
from lapilli.train.errors import TrainError
from lapilli.train.health.step_dump import read_kept
from lapilli.train.metrics.step_metrics import padded_numbers
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.steps.feed import Feed
from pipelines.train import print_preflight
from tests.train.gang import train_together
from tests.train.small_run import small_dataset, small_run
from tests.train.test_tree_rows import dataset as dataset
from tests.train.test_tree_rows import engine_of, feeds_of, take, take_apart
from tests.train.test_tree_run import expected_losses

TOKENS = 1600
LEAN = ActivationPolicy({"vision": 1, "language": 1}, offload=True)
KINDS: list[dict[str, Any]] = [
    {},
    {"sampler": "random"},
    {"share_images": True},
    {"pack": True, "row_length": 1024},
    {"share_images": True, "pack": True, "row_length": 1024},
]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    budget=st.integers(1, 900),
    world_size=st.integers(1, 5),
)
def test_every_row_once_within_the_limit_of_the_longest_in_fewest_steps(
    lengths: list[int], budget: int, world_size: int
) -> None:
    tokens = np.array(lengths)
    limits = np.maximum(1, budget // tokens)
    ranks = budget_chunks(tokens, limits, world_size)
    assert len(ranks) == world_size
    assert len({len(micros) for micros in ranks}) == 1
    placed = [int(place) for micros in ranks for micro in micros for place in micro]
    assert sorted(placed) == list(range(len(lengths)))
    for micro in (micro for micros in ranks for micro in micros if len(micro)):
        assert len(micro) <= limits[micro[np.argmax(tokens[micro])]]
    left, fewest = sorted(lengths, reverse=True), 0
    while left:  # the longest first, each micro-batch as full as it may be
        left = left[max(1, budget // left[0]) :]
        fewest += 1
    assert len(ranks[0]) == -(-fewest // world_size)
    by_step = [
        [tokens[micros[step]] for micros in ranks if len(micros[step])]
        for step in range(len(ranks[0]))
    ]
    for one, after in pairwise(by_step):  # neighbours stand together
        assert not after or min(map(np.min, one)) >= max(map(np.max, after))


@pytest.mark.parametrize("kind", KINDS)
def test_global_batches_are_those_of_rows_and_fit_the_budget(
    dataset: Dataset, kind: dict[str, Any]
) -> None:
    (by_rows,) = feeds_of(dataset, 1, micro_batch_size=1, **kind)
    for world_size in (1, 2, 4):
        feeds = feeds_of(dataset, world_size, micro_batch_tokens=TOKENS, max_shapes=4, **kind)
        assert feeds[0].total_steps == by_rows.total_steps
        shapes: set[tuple[int, ...]] = set()
        for step in range(by_rows.total_steps):
            made = [feed.make(step) for feed in feeds]
            batches = [batch for rank in made for batch in rank.batches]
            names = sorted(name for batch in batches for name in batch.sample_ids)
            expected = [name for b in by_rows.make(step).batches for name in b.sample_ids]
            assert names == sorted(expected)
            assert len({len(rank.batches) for rank in made}) == 1
            assert len(made[0].batches) <= feeds[0].config.accumulation
            shapes |= {batch.input_ids.shape for batch in batches}
            numbers = padded_numbers(made[0], feeds[0])
            for found, batch in zip(numbers, batches, strict=True):
                assert (found.padded_rows, found.padded_length) == batch.input_ids.shape
                assert found.padded_images == len(batch.pixels)
        assert all(rows * length <= TOKENS for rows, length in shapes)
        assert len(shapes) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_batches_one_sample_a_row(
    dataset: Dataset, kind: dict[str, Any]
) -> None:
    (feed,) = feeds_of(dataset, 1, micro_batch_tokens=TOKENS, remainder="short", **kind)
    found, apart = engine_of(feed.config), engine_of(feed.config)
    micros = 0
    for step in range(4):
        made = feed.make(step)
        micros += len(made.batches)
        assert take(found, made) == pytest.approx(take_apart(apart, dataset, made), rel=1e-5)
    assert micros > 4


def test_short_rows_fill_micro_batches_that_long_ones_filled(dataset: Dataset) -> None:
    (feed,) = feeds_of(dataset, 1, micro_batch_tokens=TOKENS, remainder="short")
    sizes = {
        (len(batch.sample_ids), int(batch.row_lengths.max()))
        for step in range(feed.total_steps)
        for batch in feed.make(step).batches
    }
    most, length = max(sizes)
    least, longest = min(sizes)
    assert most > least
    assert length < longest


@pytest.mark.parametrize("kind", [{}, KINDS[-1]])
def test_a_run_has_the_losses_of_plain_torch(tmp_path: Path, kind: dict[str, Any]) -> None:
    data = small_dataset(tmp_path, images=12, text_only=4, asked=3)
    config = small_run(
        data, tmp_path / "run", num_workers=1, launcher="process", max_length=640, max_steps=4,
        micro_batch_tokens=TOKENS, **kind,
        validation=ValidationConfig(every=4, samples=4, dataset=str(data)),
    )  # fmt: skip
    rows = launch(preflight(config))
    assert [row.loss for row in rows] == pytest.approx(expected_losses(config), rel=1e-5)
    assert rows[-1].held_out_loss


@pytest.mark.faults
@pytest.mark.parametrize("kind", [{}, KINDS[-1]])
def test_a_killed_run_of_two_workers_goes_on_as_one(tmp_path: Path, kind: dict[str, Any]) -> None:
    data = small_dataset(tmp_path, images=12, text_only=4, asked=3)
    config = small_run(
        data, tmp_path / "run", max_length=640, micro_batch_tokens=TOKENS, max_steps=7, **kind,
        checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip
    train_together(config, kill_at=3)
    train_together(replace(config, num_workers=1, zero_stage=1, micro_batch_tokens=2 * TOKENS))
    found = [row.loss for row in read_metrics(Path(config.output))]
    assert found == pytest.approx(expected_losses(config), rel=1e-5)


def test_a_step_that_went_wrong_is_replayed(tmp_path: Path) -> None:
    config = small_run(
        small_dataset(tmp_path), tmp_path / "run", num_workers=1, launcher="process",
        micro_batch_tokens=TOKENS, optim=OptimConfig(lr=1e30, grad_clip=0.0),
        checkpoint=CheckpointConfig(every=100),
    )  # fmt: skip
    with pytest.raises(TrainError, match=r"step \d+: loss .*lower optim.lr"):
        launch(preflight(config))
    (path,) = (tmp_path / "run" / "replay").iterdir()
    kept = read_kept(path)
    found = rerun(config, kept)
    assert len(found.samples) == len([index for index in kept.sample_indices if index >= 0])


def test_memory_is_estimated_for_the_longest_and_for_the_most_rows() -> None:
    config = small_run(
        Path("in"), Path("out"), num_workers=1, micro_batch_size=0, micro_batch_tokens=640,
        global_batch_size=64, max_length=320,
    )  # fmt: skip
    model = replace(config.model, trainable=("vision", "projector", "language"))
    config = replace(config, model=model)
    sketch = sketch_run(config)
    rows = RowSizes(length=320, trained=4, shortest=16)
    found = estimate_run(config, sketch, rows)
    few = estimate_run(config, sketch, replace(rows, shortest=None)).batch_bytes(2)
    short = replace(rows, length=16, shortest=None)
    assert found.batch_bytes(2) == max(few, estimate_run(config, sketch, short).batch_bytes(40))
    assert found.batch_bytes(2) > few  # 40 images in place of 2
    budget = found.worker_bytes(2, 2)
    chosen, policy = choose_memory(config, "cpu", budget, lambda _: found)
    assert (chosen, policy.estimated) == (config, budget)
    least = min(found.worker_bytes(2, 1, policy) for policy in (LEAN, KEEP_ALL))
    with pytest.raises(TrainError, match=r"a micro-batch of 2 x 320 .* micro_batch_tokens 320 "):
        choose_memory(config, "cpu", least, lambda _: found)


def test_how_batches_are_cut_is_said(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(
        dataset.path, tmp_path / "run", num_workers=1, launcher="process", max_length=640,
        micro_batch_tokens=TOKENS,
    )  # fmt: skip
    print_preflight(config, preflight(config))
    said = " ".join(capsys.readouterr().out.split())
    assert "global batch 8 = 1 workers, micro-batches of up to 1,600 tokens on cpu" in said


def test_a_row_that_the_budget_does_not_hold_is_named(dataset: Dataset) -> None:
    longest = int(dataset.lengths.max())
    config = small_run(
        Path("unused"), Path("unused"), num_workers=1, max_length=640, micro_batch_tokens=64
    )
    held = -(-longest // 8) * 8
    with pytest.raises(TrainError, match=f"micro_batch_tokens: 64 holds no row of {held} tokens"):
        Feed(dataset, config, rank=0, world_size=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_size": 2}, "micro_batch_tokens: 4096 with micro_batch_size 2; set one"),
        ({"pack": True, "row_length": 8192}, "holds no packed row of 8192 tokens"),
        ({"sampler": "llava"}, "micro_batch_size: 0 with sampler llava .* no micro_batch_tokens"),
        ({"loss_reduction": "micro_batch_mean"}, "no micro_batch_tokens"),
        ({"micro_batch_tokens": -1}, "micro_batch_tokens: -1; expected 0 or more"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"micro_batch_size": 0, "micro_batch_tokens": 4096, **values}
    with pytest.raises(TrainError, match=message):
        small_run(Path("unused"), Path("unused"), **given)
