"""What a run writes down: whose loss, how fast; against transformers' logits and torch's loss."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.data.dataset.dataset import open_dataset
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.config import ValidationConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.metrics.step_metrics import group_means
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.sample_losses import SampleLoss, read_worst
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.step import to_device
from lapilli.train.validation.validation_loss import HeldOut
from lapilli.train.worker.compatibility import open_for
from pipelines.reports.run_report import smoothed, write_run_report
from tests.browser import Chromium
from tests.train.small_run import VIEW, small_dataset, small_run
from tests.train.tiny import model_config, random_steps

CPU = torch.device("cpu")


def plain_losses(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """[B]: each row's summed loss by torch's own cross_entropy over transformers' logits."""
    inputs = to_device(batch, CPU).inputs
    embedded = model.embed(inputs["input_ids"], inputs["merge_index"], inputs["pixels"])
    logits = model.language(inputs_embeds=embedded).logits
    length = logits.shape[1]
    sums = torch.zeros(len(logits))
    for position, target in zip(inputs["predict_positions"], inputs["targets"], strict=True):
        row, place = divmod(int(position), length)
        chosen = logits[row, place]
        sums[row] += (
            torch.nn.functional.cross_entropy(chosen, target, ignore_index=-100)
            if (int(target) >= 0)
            else 0.0
        )
    return sums


def test_each_rows_loss_is_torchs_own() -> None:
    model = build_model(model_config())
    for ranks in random_steps(4, seed=5):
        for batch in ranks[0]:
            inputs = to_device(batch, CPU).inputs
            total = model(**inputs)
            with torch.no_grad():
                expected = plain_losses(model, batch)
            torch.testing.assert_close(inputs["sample_losses"], expected, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(inputs["sample_losses"].sum(), total.detach())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run in this process, and its dataset."""
    folder = tmp_path_factory.mktemp("metrics")
    dataset = small_dataset(folder)
    config = small_run(
        dataset,
        folder / "run",
        num_workers=1,
        launcher="process",
        max_steps=6,
        loggers=("tensorboard",),
        validation=ValidationConfig(every=3, samples=7, dataset=str(dataset)),
    )
    launch(preflight(config))
    return folder / "run", dataset


def test_a_rows_parts_add_up_to_its_loss(finished: tuple[Path, Path]) -> None:
    rows = read_metrics(finished[0])
    assert len(rows) == 6
    for row in rows:
        for groups in (row.loss_by_source, row.loss_by_modality):
            total = sum(mean * tokens for mean, tokens in groups.values())
            assert sum(tokens for _, tokens in groups.values()) == row.trained_tokens
            assert total / row.trained_tokens == pytest.approx(row.loss, rel=1e-5)
        assert row.tokens
        assert row.mfu
        assert row.hfu
        assert row.hardware_flops
        assert row.flops
        assert row.tokens_per_second == pytest.approx(row.tokens / row.seconds)
        assert 0 < row.mfu < row.hfu < 1
        assert 0 < row.flops < row.hardware_flops
    assert {name for row in rows for name in row.loss_by_modality} <= {"image", "text"}


def test_the_norms_of_the_parts_add_up_to_deepspeeds_of_the_whole(
    finished: tuple[Path, Path],
) -> None:
    for row in read_metrics(finished[0]):
        parts = row.grad_norm_by_part
        assert parts.keys() == {"projector", "language"}
        assert math.hypot(*parts.values()) == pytest.approx(row.grad_norm, rel=1e-5)


def test_the_worst_samples_of_the_first_step_are_those_of_a_plain_model(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    _, dataset = finished
    config = small_run(dataset, tmp_path / "run", num_workers=1, launcher="process", max_steps=1)
    launch(preflight(config))
    model = build_model(config.model)
    opened = open_for(model, config)
    step = Feed(opened, config, rank=0, world_size=1).make(0)
    expected: dict[str, float] = {}
    with torch.no_grad():
        for batch in step.batches:
            losses = plain_losses(model, batch)
            for row, name in enumerate(batch.sample_ids):
                trained = (batch.targets >= 0) & (
                    batch.predict_positions // batch.input_ids.shape[1] == row
                )
                expected[name] = float(losses[row]) / int(trained.sum())
    found = read_worst(tmp_path / "run")
    assert [s.sample_id for s in found] == sorted(expected, key=lambda name: -expected[name])
    for sample in found:
        assert sample.mean == pytest.approx(expected[sample.sample_id], rel=1e-4)


def test_two_workers_attribute_the_same_losses(finished: tuple[Path, Path]) -> None:
    """Each rank's rows fill their own places: together every sample once."""
    _, dataset = finished
    config = small_run(dataset, Path("unused"))
    opened = open_for(build_model(config.model), config)
    for step in range(4):
        made = [Feed(opened, config, rank=r, world_size=2).make(step) for r in range(2)]
        named: defaultdict[int, list[str]] = defaultdict(list)
        for of_rank in made:
            for places, batch in zip(of_rank.slots, of_rank.batches, strict=True):
                for place, name in zip(places.tolist(), batch.sample_ids, strict=True):
                    named[place].append(name)
        placed = made[0].placed
        assert sorted(placed.tolist()) == sorted(made[0].sample_indices.tolist())
        expected = {p: [opened.sample_id(int(i))] for p, i in enumerate(placed) if i >= 0}
        assert dict(named) == expected


def test_means_are_over_tokens_and_not_over_samples() -> None:
    samples = [
        SampleLoss(0, 0, "a/0", True, 10.0, 5),
        SampleLoss(0, 1, "a/1", False, 1.0, 1),
        SampleLoss(0, 2, "b/0", False, 4.0, 2),
    ]
    assert group_means(samples, "source") == {"a": (11 / 6, 6), "b": (2.0, 2)}
    assert group_means(samples, "modality") == {"image": (2.0, 5), "text": (5 / 3, 3)}


def test_the_file_of_the_worst_is_lines_of_json(finished: tuple[Path, Path]) -> None:
    lines = (finished[0] / "worst.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert 0 < len(losses) <= 20


def test_tensorboard_shows_the_same_losses(finished: tuple[Path, Path]) -> None:
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("loss")]
    assert shown == pytest.approx([row.loss for row in read_metrics(finished[0])])


def test_the_held_out_loss_is_a_plain_models_with_the_checkpoints_weights(
    finished: tuple[Path, Path],
) -> None:
    run, dataset = finished
    rows = read_metrics(run)
    assert [row.step for row in rows if row.held_out_loss is not None] == [2, 5]
    model = load_trained(run).model
    opened = open_dataset(dataset, view=VIEW, image_tokens=model.vision.num_tokens)
    chosen = [int(place) for place in np.linspace(0, len(opened) - 1, 7)]
    shape = BatchShape(1, (int(opened.lengths.max()),), model.vision.num_tokens, 8)
    batches = [collate([opened.sample(i)], shape, opened.image_size) for i in chosen]
    with torch.no_grad():
        total = sum(float(plain_losses(model, batch).sum()) for batch in batches)
    expected = total / sum(int(opened.num_trained[i]) for i in chosen)
    assert rows[-1].held_out_loss == pytest.approx(expected, rel=1e-5)


def test_held_out_micro_batches_are_dealt_out_without_loss(finished: tuple[Path, Path]) -> None:
    """Ranks' shares, added without a process group, are what one rank alone computes."""
    _, dataset = finished
    config = small_run(dataset, Path("unused"), validation=ValidationConfig(every=1, samples=11))
    model = build_model(config.model)
    opened = open_for(model, config)
    shape = Feed(opened, config, rank=0, world_size=1).shape

    class Engine:
        module = model

    alone = HeldOut(opened, config, shape, (0, 1)).loss(Engine(), CPU).text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.all_reduce", lambda tensor: None)
        shares = [
            HeldOut(opened, config, shape, (rank, 3)).loss(Engine(), CPU).text for rank in range(3)
        ]
    assert sum(shares) == pytest.approx(alone, rel=1e-7)
    assert all(share > 0 for share in shares)


def test_the_smoothed_loss_is_the_weighted_mean() -> None:
    values = np.array([3.0, 1.0, 2.0])
    weights = 0.9 ** np.array([2, 1, 0])
    assert smoothed(values, 0.9)[-1] == pytest.approx(np.average(values, weights=weights))


def test_the_report_is_fit_to_be_read(finished: tuple[Path, Path], chromium: Chromium) -> None:
    page = write_run_report(finished[0])
    assert chromium.problems(page) == []
    text = page.read_text(encoding="utf-8")
    worst = read_worst(finished[0])
    for words in (
        "held-out loss",
        "MFU",
        "HFU",
        "optim.lr",
        worst[0].sample_id,
        "Loss by modality",
    ):
        assert words in text
