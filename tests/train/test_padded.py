"""What the meter derives from lengths is what the collator makes and what torch counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes
from lapilli.model.vlm import build_model
from lapilli.train.metrics.step_metrics import StepMeter, padded_numbers
from lapilli.train.steps.feed import Feed
from lapilli.train.worker.compatibility import open_for
from tests.model.test_flops import numbers_of, seen_by_torch
from tests.train.small_run import small_dataset, small_run

ORDERS = [
    ("grouped", "pad"),
    ("random", "pad"),
    ("llava", "pad"),
    ("grouped", "short"),
    ("random", "drop"),
    ("llava", "llava"),
]
SIZES = ("images", "targets", "padded_rows", "padded_length", "padded_images", "padded_targets")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("padded"))


@pytest.mark.parametrize(("sampler", "remainder"), ORDERS)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_sizes_are_the_collators_on_every_rank_and_step(
    dataset: Path, workers: int, sampler: str, remainder: str
) -> None:
    config = small_run(
        dataset, Path("unused"), num_workers=workers, sampler=sampler, remainder=remainder
    )
    opened = open_for(build_model(config.model), config)
    feeds = [Feed(opened, config, rank=rank, world_size=workers) for rank in range(workers)]
    assert feeds[0].total_steps
    for step in range(feeds[0].total_steps):
        made = [feed.make(step) for feed in feeds]
        found = padded_numbers(made[0], feeds[0])
        real = [numbers_of(batch) for rank in made for batch in rank.batches]
        for ours, collated in zip(found, real, strict=True):
            for name in SIZES:
                assert getattr(ours, name) == getattr(collated, name), name
            lengths = [length for length in collated.row_lengths if length]
            assert sorted(ours.row_lengths) == sorted(lengths)


@pytest.mark.parametrize("recomputes", [False, True])
def test_operations_are_those_that_torch_counts(dataset: Path, recomputes: bool) -> None:
    config = small_run(dataset, Path("unused"))
    model = build_model(config.model)
    if recomputes:
        recompute_all(model)
    set_modes(model)
    vision: Any = model.vision
    vision.encoder.set_attn_implementation("eager")
    model.language.set_attn_implementation("eager")
    opened = open_for(model, config)
    feeds = [Feed(opened, config, rank=rank, world_size=2) for rank in range(2)]
    meter = StepMeter(feeds[0], model, torch.device("cpu"))
    for step in range(3):
        made = [feed.make(step) for feed in feeds]
        counted = sum(seen_by_torch(model, batch) for rank in made for batch in rank.batches)
        assert meter.speed(made[0], 1.0).hardware_flops == counted
