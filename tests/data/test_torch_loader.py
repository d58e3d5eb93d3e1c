"""`torch_loader` gives every sample once, in the trainer's order, whatever the ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapilli.data import DataError, Dataset, open_dataset, torch_loader
from lapilli.data.batches.windows import WindowedPlan
from lapilli.train.config import RunConfig
from lapilli.train.steps.feed import Feed
from tests.train.small_run import VIEW, small_dataset, small_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = small_dataset(tmp_path_factory.mktemp("loader"), images=17, text_only=12)
    return open_dataset(path, view=VIEW, image_tokens=4)


def rows_of(batch: dict[str, torch.Tensor]) -> set[bytes]:
    """The rows that are no padding, as something to compare."""
    ids, merged = batch["input_ids"].numpy(), batch["merge_index"].numpy() >= 0
    rows = np.where(merged, -1, ids)
    return {np.trim_zeros(row).tobytes() for row in rows if row.any()}


@pytest.mark.parametrize("sampler", ["grouped", "random"])
@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 2), (2, 2), (4, 1)])
def test_ranks_share_the_trainers_batches(
    dataset: Dataset, world: int, micro: int | None, sampler: Any
) -> None:
    config: RunConfig = small_run(dataset.path, Path("run"), sampler=sampler, num_workers=world)
    config = replace(config, micro_batch_size=micro or 8, global_batch_size=8)
    loaders = [
        torch_loader(
            dataset, global_batch_size=8, micro_batch_size=micro, rank=rank, world_size=world,
            sampler=sampler,
        )
        for rank in range(world)
    ]  # fmt: skip
    for rank, loader in enumerate(loaders):
        feed = Feed(dataset, config, rank=rank, world_size=world)
        steps = feed.total_steps // config.epochs
        batches = [batch for step in range(steps) for batch in feed.make(step).batches]
        found = [*loader]
        assert len(loader) == len(found) == len(batches)
        for one, other in zip(found, batches, strict=True):
            assert rows_of(one) == rows_of(
                {n: torch.from_numpy(getattr(other, n)) for n in ("input_ids", "merge_index")}
            )
            assert int((one["targets"] >= 0).sum()) == other.num_targets
            assert len(one["pixels"]) == len(other.pixels)
    # every trained token of the dataset once
    total = sum(int((b["targets"] >= 0).sum()) for loader in loaders for b in loader)
    assert total == dataset.num_trained.sum()


def test_processes_that_read_ahead_give_the_same(dataset: Dataset) -> None:
    alone, ahead = (
        [*torch_loader(dataset, global_batch_size=4, micro_batch_size=2, num_workers=workers)]
        for workers in (0, 2)
    )
    assert len(alone) == len(ahead)
    for one, other in zip(alone, ahead, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_epochs_differ_and_seeds_do(dataset: Dataset) -> None:
    def first(**values: Any) -> bytes:
        wanted: dict[str, Any] = {"global_batch_size": 4, "sampler": "random", **values}
        (batch, *_) = torch_loader(dataset, **wanted)
        return batch["input_ids"].numpy().tobytes()

    assert first() == first()
    assert len({first(), first(epoch=1), first(seed=1)}) == 3


def test_a_dataset_is_indexed_like_a_list(dataset: Dataset) -> None:
    assert dataset[-1].sample_id == dataset[len(dataset) - 1].sample_id
    names = [sample.sample_id for sample in (dataset[i] for i in range(len(dataset)))]
    assert [sample.sample_id for sample in dataset] == names  # pyright: ignore[reportGeneralTypeIssues]
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=f"sample {index} of a dataset with {len(dataset)}"):
            dataset[index]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 2, "world_size": 2}, "rank: 2 with world_size 2"),
        ({"micro_batch_size": 3}, "is not a multiple of world_size 1 x micro_batch_size 3"),
        ({"global_batch_size": 1000}, "fewer than one global batch"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(
    dataset: Dataset, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        torch_loader(dataset, **dict[str, Any]({"global_batch_size": 4} | values))


@pytest.mark.parametrize("world", [1, 2])
def test_windows_are_the_trainers_too_and_hold_every_sample(dataset: Dataset, world: int) -> None:
    settings: dict[str, Any] = {"sampler": "random", "order_window": 9}
    config: RunConfig = small_run(dataset.path, Path("run"), num_workers=world, **settings)
    config = replace(config, micro_batch_size=2, global_batch_size=4)
    names = ("input_ids", "merge_index")
    for rank in range(world):
        loader = torch_loader(
            dataset, global_batch_size=4, micro_batch_size=2, rank=rank, world_size=world,
            **settings,
        )  # fmt: skip
        feed = Feed(dataset, config, rank=rank, world_size=world)
        steps = feed.total_steps // config.epochs
        batches = [batch for step in range(steps) for batch in feed.make(step).batches]
        for one, other in zip(loader, batches, strict=True):
            assert rows_of(one) == rows_of(
                {name: torch.from_numpy(getattr(other, name)) for name in names}
            )
    plan = Feed(dataset, config, rank=0, world_size=world).plans.first
    assert isinstance(plan, WindowedPlan)
    seen = np.concatenate([plan.global_batch(step) for step in range(plan.num_steps)])
    assert sorted(seen[seen >= 0].tolist()) == list(range(len(dataset)))
