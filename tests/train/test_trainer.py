"""Our loop against transformers' Trainer: the same weights, samples and schedule, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from lapilli.data.batches.collate import Batch
from lapilli.data.dataset.dataset import Dataset, Sample, open_dataset
from lapilli.model.interop.hf import write_hf
from lapilli.model.parts.vision import FAMILIES
from lapilli.model.vlm import build_model
from lapilli.train.config import CheckpointConfig, OptimConfig, RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.steps.feed import Feed
from tests.train.small_run import VIEW, small_dataset, small_run

STEPS, IMAGE_TOKENS = 50, 4
UNUSED = 511  # an id that the tokenizer has not given out: the image token


class Recorder(Trainer):
    """Trainer that keeps each micro-batch's loss, over the tokens of the whole step."""

    losses: list[tuple[int, float]]

    def training_step(self, *args: Any, **values: Any) -> torch.Tensor:
        loss = super().training_step(*args, **values)
        self.losses.append((self.state.global_step, loss.item()))
        return loss


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("trainer")
    optim = OptimConfig(lr=2e-3, warmup_ratio=0.0, weight_decay=0.1, grad_clip=1.0)
    return small_run(
        small_dataset(folder),
        folder / "run",
        num_workers=1,
        launcher="process",
        epochs=9,
        max_steps=STEPS,
        micro_batch_size=4,
        checkpoint=CheckpointConfig(every=STEPS),
        optim=optim,
    )


@pytest.fixture(scope="module")
def dataset(config: RunConfig) -> Dataset:
    return open_dataset(config.dataset, view=VIEW, image_tokens=IMAGE_TOKENS)


def as_transformers_takes_it(batch: Batch, by_id: dict[str, Sample]) -> dict[str, torch.Tensor]:
    """The samples of a micro-batch as its model's arguments, made anew from the dataset."""
    family = FAMILIES["clip"]
    rows: list[tuple[list[int], list[int]]] = []
    pictures: list[np.ndarray] = []
    for name in batch.sample_ids:
        sample = by_id[name]
        trained = {i for start, end in sample.label_spans.tolist() for i in range(start, end)}
        ids: list[int] = []
        labels: list[int] = []
        for place, token in enumerate(sample.input_ids.tolist()):
            times = IMAGE_TOKENS if token < 0 else 1
            ids += [UNUSED if token < 0 else token] * times
            labels += [token if place in trained and token >= 0 else -100] * times
        rows.append((ids, labels))
        pictures += [
            (p / 255 - np.array(family.mean)) / np.array(family.std) for p in sample.pixels
        ]
    longest = max(len(ids) for ids, _ in rows)
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]
        ),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }
    if pictures:
        pixels = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)
        inputs["pixel_values"] = torch.from_numpy(pixels)
    return inputs


def trainers_losses(config: RunConfig, dataset: Dataset, folder: Path) -> list[float]:
    """Losses by step of transformers' own model under its own loop."""
    write_hf(build_model(config.model), folder / "model", image_token_id=UNUSED)
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder / "model")
    model.model.vision_tower.requires_grad_(requires_grad=False)
    samples = [dataset.sample(index) for index in range(len(dataset))]
    assert not any(UNUSED in sample.input_ids for sample in samples)
    by_id = {sample.sample_id: sample for sample in samples}
    feed = Feed(dataset, config, rank=0, world_size=1)
    micros = [
        as_transformers_takes_it(batch, by_id) for step in feed.steps(0) for batch in step.batches
    ]
    optim = config.optim
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=1,
        use_cpu=True,
        gradient_accumulation_steps=config.accumulation,
        max_steps=STEPS,
        report_to=[],
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        learning_rate=optim.lr,
        lr_scheduler_type="cosine",
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.grad_clip,
        optim="adamw_torch",
        disable_tqdm=True,
    )
    trainer = Recorder(
        model,
        arguments,
        data_collator=lambda rows: rows[0],
        train_dataset=micros,  # type: ignore[arg-type]
    )
    trainer.losses = []
    trainer.train()
    sums = [0.0] * STEPS
    for step, loss in trainer.losses:
        sums[step] += loss
    return sums


def test_fifty_steps_of_transformers_trainer(
    config: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    assert config.accumulation > 1
    expected = trainers_losses(config, dataset, tmp_path)
    found = [row.loss for row in launch(preflight(config))]
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.5  # it has learnt
