"""Runs whose rows hold several samples: the same batches and losses as rows of one sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.data.batches.tree_plan import TreePlan
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.dataset.prefixes import shared_prefixes
from lapilli.model.config import LoraConfig
from lapilli.model.parts.trainable import set_modes
from lapilli.model.vlm import build_model
from lapilli.train.config import OptimConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.errors import TrainError
from lapilli.train.metrics.step_metrics import padded_numbers
from lapilli.train.steps.feed import Feed, StepBatches
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.rows import EpochPlans
from lapilli.train.steps.step import to_device, train_step
from pipelines.reports.describe import describe_run
from pipelines.show import main as show_main
from tests.train.small_run import VIEW, small_dataset, small_run

CPU = torch.device("cpu")
KINDS: list[dict[str, Any]] = [
    {"share_images": True},
    {"pack": True, "row_length": 1024},
    {"share_images": True, "pack": True, "row_length": 1024},
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three records about each of twelve images, and six without."""
    path = small_dataset(tmp_path_factory.mktemp("trees"), images=12, text_only=6, asked=3)
    return open_dataset(path, view=VIEW, image_tokens=4, max_length=640)


def config_for(**values: Any) -> RunConfig:
    given = {"num_workers": 1, "max_length": 640, "epochs": 2, **values}
    return small_run(Path("unused"), Path("unused"), **given)


def feeds_of(dataset: Dataset, world_size: int, **values: Any) -> list[Feed]:
    config = config_for(num_workers=world_size, **values)
    return [Feed(dataset, config, rank=rank, world_size=world_size) for rank in range(world_size)]


def test_groups_are_the_records_of_an_image(dataset: Dataset) -> None:
    found = shared_prefixes(dataset)
    images = [dataset.sample(index).pixels.tobytes() for index in range(len(dataset))]
    for one in range(len(dataset)):
        ids = dataset.sample(one).input_ids
        before = ids[: np.argmin(ids)]  # an image's place is -200
        alike = [
            other
            for other in range(len(dataset))
            if images[one]
            and images[other] == images[one]
            and np.array_equal(dataset.sample(other).input_ids[: len(before)], before)
        ]
        assert (found.prefixes[one] > 0) == (len(alike) > 1)
        if alike:
            assert np.flatnonzero(found.groups == found.groups[one]).tolist() == alike
            assert found.prefixes[one] in (0, len(before) + dataset.image_tokens)
    assert (found.prefixes > 0).sum() == 36


@pytest.mark.parametrize("kind", KINDS)
def test_every_world_size_has_the_same_steps_and_each_record_once(
    dataset: Dataset, kind: dict[str, Any]
) -> None:
    steps: dict[int, list[list[str]]] = {}
    for world_size in (1, 2, 4):
        feeds = feeds_of(dataset, world_size, micro_batch_size=2, **kind)
        steps[world_size] = [
            sorted(name for feed in feeds for b in feed.make(step).batches for name in b.sample_ids)
            for step in range(feeds[0].total_steps)
        ]
    assert steps[1] == steps[2] == steps[4]
    epoch = [name for names in steps[1][: len(steps[1]) // 2] for name in names]
    assert sorted(epoch) == sorted(dataset.sample_id(index) for index in range(len(dataset)))
    assert all(len(names) <= 8 for names in steps[1])


@pytest.mark.parametrize("bound", [{"micro_batch_size": 2}, {"micro_batch_tokens": 2048}])
def test_packs_are_of_one_shape_with_one_shape_allowed(
    dataset: Dataset, bound: dict[str, Any]
) -> None:
    """Every tensor that a model is given, over two epochs: nothing is compiled again."""
    (feed,) = feeds_of(dataset, 1, max_shapes=1, share_images=True, pack=True, row_length=1024,
                       **bound)  # fmt: skip
    shapes = {
        tuple((name, tuple(value.shape)) for name, value in to_device(batch, CPU).inputs.items())
        for step in range(feed.total_steps)
        for batch in feed.make(step).batches
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_meter_knows_what_the_collator_makes(dataset: Dataset, kind: dict[str, Any]) -> None:
    feeds = feeds_of(dataset, 2, micro_batch_size=2, **kind)
    for step in range(feeds[0].total_steps):
        made = [feed.make(step) for feed in feeds]
        batches = [batch for rank in made for batch in rank.batches]
        for found, batch in zip(padded_numbers(made[0], feeds[0]), batches, strict=True):
            assert list(found.row_lengths) == [n for n in batch.row_lengths.tolist() if n]
            assert (found.images, found.targets) == (batch.num_images, batch.num_targets)
            assert found.padded_length == batch.input_ids.shape[1]
            assert found.padded_images == len(batch.pixels)
            assert found.padded_targets == len(batch.targets)
            assert found.pairs == pairs_by_loop(batch.tree_ids, batch.branch_ids)


def pairs_by_loop(trees: Any, branches: Any) -> int:
    """Pairs that see each other, counted from the ids alone."""
    pairs = 0
    for tree, branch in zip(trees, branches, strict=True):
        for query in range(len(tree)):
            if tree[query]:
                keys = slice(0, query + 1)
                same = tree[keys] == tree[query]
                pairs += int((same & np.isin(branch[keys], (0, branch[query]))).sum())
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_losses_of_its_batches_one_sample_a_row(
    dataset: Dataset, kind: dict[str, Any]
) -> None:
    epochs = 9 if kind == KINDS[-1] else 2
    (feed,) = feeds_of(
        dataset, 1, micro_batch_size=2, **{**kind, "epochs": epochs, "max_steps": 50}
    )
    shared, apart = engine_of(feed.config), engine_of(feed.config)
    rows = 0
    assert feed.total_steps == 50 or kind != KINDS[-1]
    for step in range(feed.total_steps):
        made = feed.make(step)
        rows += sum(int((batch.row_lengths > 0).sum()) for batch in made.batches)
        found = take(shared, made)
        expected = take_apart(apart, dataset, made)
        assert found == pytest.approx(expected, rel=1e-5)
    assert rows < epochs * len(dataset)
    named = dict(apart.module.named_parameters())
    for name, parameter in shared.module.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-4, msg=name)


def engine_of(config: RunConfig) -> PlainEngine:
    model = build_model(config.model)
    set_modes(model)
    return PlainEngine(model, build_optimizer(model, OptimConfig(lr=1e-3)))


def take(engine: PlainEngine, made: StepBatches) -> float:
    sent = [to_device(batch, CPU) for batch in made.batches]
    total = train_step(engine, sent, global_tokens=made.global_tokens, world_size=1)
    return float(total) / made.global_tokens


def take_apart(engine: PlainEngine, dataset: Dataset, made: StepBatches) -> float:
    """The same samples in one batch of a row each."""
    samples = [dataset.sample(int(index)) for index in made.sample_indices]
    shape = BatchShape(len(samples), (640,), dataset.image_tokens, predict_chunk=64)
    sent = [to_device(collate(samples, shape, dataset.image_size), CPU)]
    total = train_step(engine, sent, global_tokens=made.global_tokens, world_size=1)
    return float(total) / made.global_tokens


def test_with_all_records_in_one_batch_shared_and_separate_runs_agree(dataset: Dataset) -> None:
    """Packed rows mix modalities, so that all of them are one step, as of sampler `random`."""
    everything = {"global_batch_size": len(dataset), "micro_batch_size": 1, "epochs": 5}
    losses: list[list[float]] = []
    for kind in ({"sampler": "random", "remainder": "short"}, *KINDS[1:]):
        (feed,) = feeds_of(dataset, 1, **everything, **kind)
        engine = engine_of(feed.config)
        losses.append([take(engine, feed.make(step)) for step in range(feed.total_steps)])
    assert len(losses[0]) == 5
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=1e-5)


def test_how_many_samples_share_is_said_before_the_start(dataset: Dataset, tmp_path: Path) -> None:
    told: list[str] = []
    config = small_run(
        dataset.path, tmp_path / "run", num_workers=1, launcher="process", max_length=640,
        share_images=True,
    )  # fmt: skip
    ready = preflight(config, told.append)
    assert f"share_images: 36 of {len(dataset)} samples begin like another one" in told
    steps = [Feed(dataset, ready.config, rank=0, world_size=1).make(step)
             for step in range(ready.total_steps // 2)]  # fmt: skip
    images = [sum(batch.num_images for batch in made.batches) for made in steps]
    rows = [sum(int((b.row_lengths > 0).sum()) for b in made.batches) for made in steps]
    shown = (
        f"rows: {len(dataset) / len(steps):.1f} samples of a global batch lie in "
        f"{np.mean(rows):.1f} rows with {np.mean(images):.1f} images ({min(images)} to "
        f"{max(images)}), {36 / sum(images):.3g} samples an image"
    )
    assert shown in told
    assert not any("dropout" in line for line in told)


def test_rows_that_pad_much_are_said_with_a_size_that_pads_less(
    dataset: Dataset, tmp_path: Path
) -> None:
    config = small_run(
        dataset.path, tmp_path / "run", num_workers=1, launcher="process", max_length=640,
        share_images=True, pack=True, row_length=1024, micro_batch_size=8,
    )  # fmt: skip

    def padded(size: int) -> tuple[list[str], float]:
        told: list[str] = []
        sized = replace(config, micro_batch_size=size)
        ready = preflight(sized, told.append)
        feed = Feed(dataset, ready.config, rank=0, world_size=1)
        made = [
            batch for step in range(ready.total_steps // 2) for batch in feed.make(step).batches
        ]
        filled = sum(int((batch.row_lengths > 0).sum()) for batch in made)
        computed = sum(len(batch.row_lengths) for batch in made)
        return [line for line in told if "padding" in line], 1 - filled / computed

    (line,), share = padded(8)
    assert line.startswith(f"rows: {share:.0%} of the rows computed are padding")
    assert share > 0.25
    better = int(line.split("with micro_batch_size ")[1].split()[0])
    lines, less = padded(better)
    assert f"micro_batch_size {better} it is {less:.0%}" in line
    assert not lines
    assert less < share


def test_dropout_of_what_is_shared_is_said(dataset: Dataset, tmp_path: Path) -> None:
    told: list[str] = []
    config = small_run(
        dataset.path, tmp_path / "run", num_workers=1, launcher="process", max_length=640,
        share_images=True,
    )  # fmt: skip
    lora = LoraConfig(rank=2, dropout=0.125)
    preflight(replace(config, model=replace(config.model, lora=lora)), told.append)
    (line,) = [line for line in told if "dropout" in line]
    assert line.startswith("share_images: dropout (0.125) is drawn once for what samples share")


def test_a_run_draws_its_rows_and_counts_their_images(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(
        dataset.path, tmp_path / "run", num_workers=1, launcher="process", max_length=640,
        share_images=True, pack=True, row_length=1024, max_steps=2,
    )  # fmt: skip
    rows = launch(preflight(config))
    made = [Feed(dataset, config, rank=0, world_size=1).make(row.step) for row in rows]
    for row, step in zip(rows, made, strict=True):
        assert row.images == sum(batch.num_images for batch in step.batches)
        assert row.rows == sum(int((b.row_lengths > 0).sum()) for b in step.batches)
    assert show_main([str(tmp_path / "run"), "--samples", "2", "--tokens"]) == 0
    said = capsys.readouterr().out
    taken = sum(row.samples for row in rows), sum(row.images or 0 for row in rows)
    facts = describe_run(tmp_path / "run").facts["rows"]
    assert facts[1:] == (
        f"{taken[1] / 2:.1f} images",
        f"{taken[0] / taken[1]:.3g} samples an image",
    )
    plan = EpochPlans(dataset, config).first
    assert isinstance(plan, TreePlan)
    for tree in plan.row(0):
        places = [said.index(f"{dataset.sample_id(int(one))}: ") for one in tree]
        assert places == sorted(places)
        if len(tree) > 1:
            above = said[: places[0]].rstrip().rsplit("\n", 1)[-1]
            assert above.endswith("├─")
            between = said[places[0] : places[-1]]
            assert "<image" not in between  # once, above what the first has for itself
    assert f"shared by {max(map(len, plan.row(0)))}" in said


def test_compiled_layers_are_refused() -> None:
    config = config_for(share_images=True)
    with pytest.raises(TrainError, match=r"share_images: true with model\.compile blocks"):
        replace(config, model=replace(config.model, compile="blocks"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share_images": True, "sampler": "random"}, "share_images: true with sampler random"),
        ({"pack": True, "loss_reduction": "micro_batch_mean"}, "pack: true with loss_reduction"),
        ({"share_images": True, "remainder": "pad"}, "with remainder pad; expected auto, short"),
        ({"pack": True, "row_length": 100}, "row_length: 100 with pack is below max_length 640"),
        ({"row_length": 512}, "row_length: 512 without share_images or pack"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        config_for(**values)
