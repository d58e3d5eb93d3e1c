"""A small real dataset and the settings of a run on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lapilli.train.config import CheckpointConfig, OptimConfig, RunConfig
from lapilli.train.run_folder.metrics_file import StepMetrics
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.train.tiny import model_config

VIEW = "pad32"


def small_dataset(folder: Path, *, images: int = 30, text_only: int = 20, asked: int = 1) -> Path:
    """Records with and without images, built in this process; `asked` about each image."""
    mixture = make_mixture(folder / "raw", images=images, text_only=text_only, asked=asked)
    build_dataset(mixture, folder / "dataset", make_tokenizer(folder / "tokenizer"))
    return folder / "dataset"


def small_run(dataset: Path, output: Path, **values: Any) -> RunConfig:
    """Two workers with two micro-batches each on images of 32 px."""
    model = model_config("projector", "language")
    model.vision.settings.update(image_size=32, patch_size=16)
    model.language.settings.update(vocab_size=512)
    settings: dict[str, Any] = {
        "global_batch_size": 8, "micro_batch_size": 0 if values.get("micro_batch_tokens") else 2,
        "num_workers": 2, "epochs": 2,
        "checkpoint": CheckpointConfig(every=4), "optim": OptimConfig(lr=0.01), "device": "cpu",
        **values,
    }  # fmt: skip
    return RunConfig(dataset=str(dataset), output=str(output), view=VIEW, model=model, **settings)


def made_step(step: int, **values: Any) -> StepMetrics:
    """A row of metrics.jsonl with what every run has, and `values`."""
    every = StepMetrics(
        step=step, loss=1.0, samples=8, trained_tokens=40, seconds=0.5, wait_seconds=0.1
    )
    return replace(every, **values)


def disturbed_run(folder: Path, name: str = "run", **values: Any) -> RunConfig:
    """A run on `folder/dataset` that saves when it is asked to and at its end, and can be slowed.

    Its steps last as long as `PLANTED` of `tests.train.planted` says.
    """
    given: dict[str, Any] = {
        "epochs": 5, "checkpoint": CheckpointConfig(every=1000, keep_last=9), **values,
    }  # fmt: skip
    config = small_run(folder / "dataset", folder / name, **given)
    return replace(config, model=replace(config.model, projector="tests.train.planted:projector"))
