"""A worker's batches: the same global batches for every world size, and nothing lost."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapilli.data.batches.collate import Batch
from lapilli.data.batches.llava_sampler import llava_steps
from lapilli.data.batches.windows import WindowedPlan
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.errors import DataError
from lapilli.model.parts.trainable import set_modes
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.config import RunConfig
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.errors import TrainError
from lapilli.train.steps import feed as feed_module
from lapilli.train.steps.device_copy import send_ahead
from lapilli.train.steps.feed import Feed, StepBatches, host_bytes, mock_steps
from lapilli.train.steps.step import seed_step, to_device, train_step
from tests.train.small_run import VIEW, small_dataset, small_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = small_dataset(tmp_path_factory.mktemp("feed"))
    return open_dataset(path, view=VIEW, image_tokens=4)


def config_for(workers: int, **values: Any) -> RunConfig:
    return small_run(Path("unused"), Path("unused"), num_workers=workers, **values)


def sample_ids(feed: Feed) -> list[list[str]]:
    return [[i for b in s.batches for i in b.sample_ids] for s in feed.steps(0)]


@pytest.mark.parametrize(
    ("sampler", "remainder"),
    [("grouped", "pad"), ("random", "pad"), ("grouped", "short"), ("llava", "pad")],
)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ranks_together_get_the_global_batch_and_every_sample_once_an_epoch(
    dataset: Dataset, workers: int, sampler: str, remainder: str
) -> None:
    config = config_for(workers, sampler=sampler, remainder=remainder)
    feeds = [Feed(dataset, config, rank=r, world_size=workers) for r in range(workers)]
    processes = workers if sampler == "llava" else 0
    alone_config = config_for(1, sampler=sampler, remainder=remainder, llava_processes=processes)
    alone = Feed(dataset, alone_config, rank=0, world_size=1)
    by_rank = [sample_ids(feed) for feed in feeds]
    expected = [sorted(ids) for ids in sample_ids(alone)]
    found = [sorted(i for ids in ranks for i in ids) for ranks in zip(*by_rank, strict=True)]
    assert found == expected
    epoch = [i for ids in found[: len(found) // config.epochs] for i in ids]
    assert len(epoch) == len(set(epoch)) == len(dataset)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_llavas_micro_batches_are_dealt_to_the_ranks_in_turn(
    dataset: Dataset, workers: int
) -> None:
    config = config_for(workers, sampler="llava", epochs=2)
    signed = np.where(dataset.has_images, dataset.llava_lengths, -dataset.llava_lengths)
    blocks = [
        llava_steps(
            signed,
            micro_batch_size=2,
            processes=workers,
            accumulation=config.accumulation,
            seed=config.seed,
            epoch=epoch,
        )
        for epoch in range(2)
    ]
    dealt = np.concatenate(blocks).reshape(-1, workers, 2)
    for rank in range(workers):
        feed = Feed(dataset, config, rank=rank, world_size=workers)
        found = [batch.sample_ids for step in feed.steps(0) for batch in step.batches]
        assert found == [
            tuple(dataset.sample_id(int(i)) for i in ids if i >= 0) for ids in dealt[:, rank]
        ]


def test_other_workers_go_on_in_the_order_of_llavas_processes(dataset: Dataset) -> None:
    config = config_for(1, sampler="llava", llava_processes=4)
    four = config_for(4, sampler="llava")
    alone = Feed(dataset, config, rank=0, world_size=1)
    together = [Feed(dataset, four, rank=rank, world_size=4) for rank in range(4)]
    assert alone.total_steps == together[0].total_steps
    for step in (0, alone.total_steps - 1):
        found = sorted(i for batch in alone.make(step).batches for i in batch.sample_ids)
        parts = [feed.make(step).batches for feed in together]
        assert found == sorted(i for part in parts for batch in part for i in batch.sample_ids)


@pytest.mark.parametrize("max_shapes", [1, 3, 16])
def test_trained_positions_have_few_sizes_on_every_rank_in_every_epoch(
    dataset: Dataset, max_shapes: int
) -> None:
    config = config_for(2, max_shapes=max_shapes, epochs=3)
    feeds = [Feed(dataset, config, rank=rank, world_size=2) for rank in range(2)]
    assert feeds[0].shape == feeds[1].shape
    made = [b for feed in feeds for s in range(feed.total_steps) for b in feed.make(s).batches]
    sizes = {len(batch.targets) for batch in made}
    assert len(sizes) <= max_shapes
    assert sizes <= {*feeds[0].shape.target_sizes}
    if max_shapes == 16:  # what is there is little more than what is trained
        assert sum(len(b.targets) for b in made) < 1.6 * sum(b.num_targets for b in made)


@pytest.mark.parametrize("sampler", ["grouped", "llava"])
def test_the_mean_of_means_is_plain_torchs(dataset: Dataset, sampler: str) -> None:
    """Loss and gradient of two ranks' shares, summed, against cross_entropy's own means."""
    config = config_for(2, sampler=sampler, loss_reduction="micro_batch_mean", remainder="pad")
    feeds = [Feed(dataset, config, rank=rank, world_size=2) for rank in range(2)]
    ours, plain = build_model(config.model), build_model(config.model)
    accumulation = config.accumulation
    engine = PlainEngine(ours, torch.optim.SGD(ours.parameters(), 0.0), accumulation=accumulation)
    engine.step = lambda: None  # type: ignore[method-assign]
    checked = [0, feeds[0].total_steps // config.epochs - 1]
    for number in checked:
        steps = [feed.make(number) for feed in feeds]
        loss, means = torch.zeros(()), []
        for step in steps:
            pairs = zip(step.batches, step.weights, strict=True)
            batches = [to_device(batch, CPU, weight) for batch, weight in pairs]
            share = train_step(engine, batches, global_tokens=step.global_tokens, world_size=1)
            loss += share / step.global_tokens
            means += [_mean(plain, batch) for batch in step.batches if batch.num_targets]
        expected = torch.stack(means).mean()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        expected.backward()
        assert len({batch.num_targets for step in steps for batch in step.batches}) > 1
    for (name, here), there in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if here.requires_grad:
            torch.testing.assert_close(here.grad, there.grad, atol=1e-5, rtol=0, msg=name)


def _mean(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """The mean loss of a micro-batch by torch's own cross_entropy over all logits."""
    inputs = to_device(batch, CPU).inputs
    embedded = model.embed(inputs["input_ids"], inputs["merge_index"], inputs["pixels"])
    logits = model.language(inputs_embeds=embedded).logits.flatten(0, 1)
    chosen = logits[inputs["predict_positions"]]
    return torch.nn.functional.cross_entropy(chosen, inputs["targets"])


def test_global_tokens_are_what_the_ranks_train(dataset: Dataset) -> None:
    feeds = [Feed(dataset, config_for(2), rank=r, world_size=2) for r in range(2)]
    for steps in zip(*(feed.steps(0) for feed in feeds), strict=True):
        trained = sum(batch.num_targets for step in steps for batch in step.batches)
        assert {step.global_tokens for step in steps} == {trained}


def test_all_ranks_have_images_in_a_micro_step_or_none_has(dataset: Dataset) -> None:
    feeds = [
        Feed(dataset, config_for(4, micro_batch_size=1), rank=r, world_size=4) for r in range(4)
    ]
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
    feed = Feed(dataset, config_for(2, max_shapes=3), rank=0, world_size=2)
    shapes = {
        (batch.input_ids.shape, len(batch.pixels) > 0)
        for step in feed.steps(0)
        for batch in step.batches
    }
    assert 2 <= len(shapes) <= 3


def test_an_error_of_the_thread_is_raised_where_the_batches_are_used(dataset: Dataset) -> None:
    feed = Feed(dataset, config_for(1), rank=0, world_size=1)

    def broken(step: int) -> None:
        raise DataError(f"step {step} cannot be read")

    feed.make = broken  # type: ignore[assignment,method-assign]
    with pytest.raises(DataError, match="step 3 cannot be read"):
        list(feed.steps(3))


def test_fewer_samples_than_a_global_batch_is_one_line(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="global_batch_size"):
        Feed(dataset, config_for(1, global_batch_size=64), rank=0, world_size=1)


def test_a_global_batch_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(TrainError, match=r"7 is no multiple of .* 2 x 2 = 4; 4 or 8 would fit"):
        config_for(2, global_batch_size=7)


def test_steps_come_in_order_whichever_thread_is_done_first(dataset: Dataset) -> None:
    feed = Feed(dataset, config_for(1), rank=0, world_size=1)
    made, waiting = feed.make, threading.Event()

    def slow_at_first(step: int) -> StepBatches:
        if step == 0:
            assert waiting.wait(timeout=60)  # another thread makes step 1 meanwhile
        waiting.set()
        return made(step)

    feed.make = slow_at_first  # type: ignore[method-assign]
    assert [step.step for step in feed.steps(0)] == list(range(feed.total_steps))


def test_memory_bounds_what_is_made_ahead(dataset: Dataset, monkeypatch: Any) -> None:
    feed = Feed(dataset, config_for(1), rank=0, world_size=1)
    made: list[int] = []
    make = feed.make

    def counted(step: int) -> StepBatches:
        made.append(step)
        return make(step)

    feed.make = counted  # type: ignore[method-assign]
    monkeypatch.setattr(feed_module, "MOST_BYTES", 1)
    steps = feed.steps(0)
    for taken in range(3):
        assert next(steps).step == taken
        assert len(made) <= taken + 1 + feed_module.THREADS
    steps.close()  # type: ignore[attr-defined]


def test_sent_ahead_they_are_the_same_steps(dataset: Dataset) -> None:
    feed = Feed(dataset, config_for(2, loss_reduction="micro_batch_mean"), rank=1, world_size=2)
    plain = list(feed.steps(0))
    sent = list(send_ahead(feed.steps(0), CPU))
    assert [step.step for step in sent] == [step.step for step in plain]
    for one, other in zip(plain, sent, strict=True):
        assert [moved.weight for moved in other.on_device] == one.weights
        for batch, moved in zip(one.batches, other.on_device, strict=True):
            for name, tensor in moved.inputs.items():
                if name == "sample_losses":
                    assert not tensor.any()  # the model fills it
                    continue
                np.testing.assert_array_equal(tensor.numpy(), getattr(batch, name))


def test_a_mock_feed_has_the_shapes_of_the_middle(dataset: Dataset) -> None:
    feed = Feed(dataset, config_for(1), rank=0, world_size=1)
    steps = list(mock_steps(feed, 2))
    assert [step.step for step in steps] == list(range(2, feed.total_steps))
    middle = feed.make(feed.total_steps // 2)
    assert {host_bytes(step) for step in steps} == {host_bytes(middle)}
    assert host_bytes(middle) > sum(batch.pixels.nbytes for batch in middle.batches) > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler": "llava"}, "order_window: 100 with sampler llava, whose order is one of the"),
        ({"share_images": True, "pack": True}, "order_window: 100 with share_images and pack, "),
        ({"order_window": -1}, "order_window: -1; expected 0 or more"),
    ],
)
def test_a_window_where_the_order_is_one_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        config_for(1, **{"order_window": 100, **changed})


def test_windows_give_the_same_global_batches_to_any_number_of_workers(dataset: Dataset) -> None:
    alone, one_of_two = (
        Feed(dataset, config_for(workers, order_window=7), rank=0, world_size=workers)
        for workers in (1, 2)
    )
    assert isinstance(alone.plans.first, WindowedPlan)
    steps = alone.total_steps // alone.config.epochs
    seen = [alone.make(step).sample_indices for step in range(steps)]
    for step in reversed(range(steps)):  # from the end: nothing is replayed
        np.testing.assert_array_equal(one_of_two.make(step).sample_indices, seen[step])
    ids = np.concatenate(seen)
    assert sorted(ids[ids >= 0].tolist()) == list(range(len(dataset)))
