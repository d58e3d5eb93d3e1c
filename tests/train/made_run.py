"""Runs that were never trained: weights that have moved, saved as a run saves them."""

from __future__ import annotations

import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapilli.data.batches.collate import Batch, collate
from lapilli.data.io.atomic import write_json
from lapilli.model.config import LoraConfig, ModelConfig, Part
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.checkpoint.frozen import FORM
from lapilli.train.config import RunConfig
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.names import CONFIG
from lapilli.train.steps.step import to_device
from lapilli.train.worker.compatibility import build_run
from tests.train.saved import write_small
from tests.train.tiny import IMAGE_SIZE, SHAPE, model_config, random_sample, run_config

__all__ = ["configured", "made_run", "moved", "one_batch", "summed_loss"]


def configured(
    output: Path,
    *trainable: Part,
    lora: LoraConfig | None = None,
    init_from: Path | str = "",
    language: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **values: Any,
) -> RunConfig:
    """Settings of a small run; `language` and `model` change theirs."""
    made: ModelConfig = model_config(*trainable, lora=lora)
    made = replace(made, language=replace(made.language, **(language or {})), **(model or {}))
    return run_config(made, output=str(output), init_from=str(init_from), **values)


@torch.no_grad()
def moved(model: VisionLanguageModel, scale: float = 0.05) -> VisionLanguageModel:
    """Everything that learns is elsewhere, by an amount that follows from its name."""
    for name, value in trainable_parameters(model).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        value += scale * torch.randn(value.shape, generator=generator)
    return model


def made_run(config: RunConfig, step: int = 1, scale: float = 0.05) -> VisionLanguageModel:
    """Save a run's model after it has moved, and return it as it was trained."""
    built = build_run(config)
    moved(built.model, scale)
    save_made(config, built.model, built.frozen, built.start, step)
    return built.model


def save_made(config: RunConfig, model: Any, frozen: Any, start: Any, step: int) -> None:
    """A checkpoint as the loop writes it."""
    run = Path(config.output)
    weights = {n: v.detach().float().clone() for n, v in trainable_parameters(model).items()}
    state = CheckpointState(
        step=step,
        config=asdict(config),
        frozen={"form": FORM, "weights": frozen},
        start=start.state.weights_id if start else "",
        files={},
    )
    write_small(run, weights, state)
    write_json(run / CONFIG, asdict(config))


def one_batch() -> Batch:
    """Samples with images and without."""
    generator = np.random.default_rng(2)
    samples = [random_sample(str(n), generator, images=n) for n in range(3)]
    return collate(samples, SHAPE, IMAGE_SIZE)


@torch.no_grad()
def summed_loss(model: VisionLanguageModel) -> float:
    """Of that batch, without dropout."""
    return float(model.eval()(**to_device(one_batch(), torch.device("cpu")).inputs))
