"""A worker's batches: the same global batches for every world size, and nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.data.dataset import Dataset, open_dataset
from lapilli.data.errors import DataError
from lapilli.model.trainable import set_modes
from lapilli.model.vlm import build_model
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.feed import Feed
from lapilli.train.step import seed_step
from tests.train.small_run import VIEW, small_dataset, small_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = small_dataset(tmp_path_factory.mktemp("feed"))
    return open_dataset(path, view=VIEW, image_tokens=4)


def config_for(workers: int, **values: Any) -> RunConfig:
    return small_run(Path("unused"), Path("unused"), workers=workers, **values)


def sample_ids(feed: Feed) -> list[list[str]]:
    return [[i for b in s.batches for i in b.sample_ids] for s in feed.steps(0)]


@pytest.mark.parametrize(
    ("policy", "remainder"), [("grouped", "pad"), ("random", "pad"), ("grouped", "short")]
)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ranks_together_get_the_global_batch_and_every_sample_once_an_epoch(
    dataset: Dataset, workers: int, policy: str, remainder: str
) -> None:
    config = config_for(workers, policy=policy, remainder=remainder)
    feeds = [Feed(dataset, config, rank=r, world_size=workers) for r in range(workers)]
    alone_config = config_for(1, policy=policy, remainder=remainder)
    alone = Feed(dataset, alone_config, rank=0, world_size=1)
    by_rank = [sample_ids(feed) for feed in feeds]
    expected = [sorted(ids) for ids in sample_ids(alone)]
    found = [sorted(i for ids in ranks for i in ids) for ranks in zip(*by_rank, strict=True)]
    assert found == expected
    epoch = [i for ids in found[: len(found) // config.epochs] for i in ids]
    assert len(epoch) == len(set(epoch)) == len(dataset)


def test_global_tokens_are_what_the_ranks_train(dataset: Dataset) -> None:
    feeds = [Feed(dataset, config_for(2), rank=r, world_size=2) for r in range(2)]
    for steps in zip(*(feed.steps(0) for feed in feeds), strict=True):
        trained = sum(batch.num_targets for step in steps for batch in step.batches)
        assert {step.global_tokens for step in steps} == {trained}


def test_all_ranks_have_images_in_a_micro_step_or_none_has(dataset: Dataset) -> None:
    feeds = [Feed(dataset, config_for(4, micro_batch=1), rank=r, world_size=4) for r in range(4)]
    both = set()
    for steps in zip(*(feed.steps(0) for feed in feeds), strict=True):
        for micros in zip(*(step.batches for step in steps), strict=True):
            kinds = {len(batch.pixels) > 0 for batch in micros}
            assert len(kinds) == 1
            both |= kinds
    assert both == {True, False}


def test_resuming_is_slicing(dataset: Dataset) -> None:
    feed = Feed(dataset, config_for(2), rank=1, world_size=2)
    whole = [step.sample_indices.tolist() for step in feed.steps(0)]
    assert [step.sample_indices.tolist() for step in feed.steps(9)] == whole[9:]


def test_a_steps_randomness_follows_from_seed_step_and_rank() -> None:
    drawn: dict[tuple[int, int, int], float] = {}
    for place in [(7, 0, 0), (7, 1, 0), (7, 0, 1), (8, 0, 0), (2**62, 3, 1)]:
        seed_step(*place)
        drawn[place] = torch.rand(()).item()
        seed_step(*place)
        assert torch.rand(()).item() == drawn[place]
    assert len(set(drawn.values())) == len(drawn)


def test_only_what_learns_is_in_training_mode() -> None:
    model = build_model(config_for(1).model).eval()
    set_modes(model)
    modes = {name: part.training for name, part in model.named_children()}
    assert modes == {"vision": False, "projector": True, "language": True}


def test_few_shapes(dataset: Dataset) -> None:
    feed = Feed(dataset, config_for(2, buckets=3), rank=0, world_size=2)
    lengths = {batch.input_ids.shape for step in feed.steps(0) for batch in step.batches}
    assert 1 <= len(lengths) <= 3


def test_an_error_of_the_thread_is_raised_where_the_batches_are_used(dataset: Dataset) -> None:
    feed = Feed(dataset, config_for(1), rank=0, world_size=1)

    def broken(step: int) -> None:
        raise DataError(f"step {step} cannot be read")

    feed.make = broken  # type: ignore[assignment,method-assign]
    with pytest.raises(DataError, match="step 3 cannot be read"):
        list(feed.steps(3))


def test_fewer_samples_than_a_global_batch_is_one_line(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="global_batch"):
        Feed(dataset, config_for(1, global_batch=64), rank=0, world_size=1)


def test_a_global_batch_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(TrainError, match=r"7 is no multiple of .* 2 x 2 = 4; 4 would fit"):
        config_for(2, global_batch=7)
