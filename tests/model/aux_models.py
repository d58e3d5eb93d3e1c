"""A tiny model with task tokens and predictors, its batches and targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.auxiliary.target_loss import AuxInputs, TargetRows
from lapilli.model.config import AuxConfig, ModelConfig
from tests.model import twins

SHAPES = {"depth": (16, 8), "seg": (16, 12), "gen": (1, 10)}
AUX = AuxConfig(
    mode="gen-depth-seg", num_task_tokens=4, layers={"depth": (1, 2), "seg": (1,), "gen": (2,)},
    weights={"depth": 0.25}, shapes=SHAPES,
)  # fmt: skip
ROWS, EACH, PARTS = 9, 9 + 12, ("vision", "projector", "language", "task_tokens", "predictors")


def aux_config(aux: AuxConfig = AUX, **values: Any) -> ModelConfig:
    """A tiny model with task tokens, in which everything learns."""
    fields: dict[str, Any] = {"trainable": PARTS, **values}
    return twins.config(aux=aux, **fields)


def aux_batch(images: tuple[int, ...]) -> Batch:
    """A batch of at most three rows."""
    return collate(twins.samples(7, images), BatchShape(3, (80,), EACH, 4), twins.SIDE)


def made_targets(count: int, seed: int = 0, dtype: torch.dtype = torch.int8) -> dict[str, Any]:
    """Random stored targets of a global batch, the last image but one without any."""
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, TargetRows] = {}
    for task, (rows, width) in SHAPES.items():
        values = torch.randint(-127, 128, (count, rows, width), generator=draw).to(dtype)
        scales = torch.rand(count, rows, generator=draw) / 50 + 0.01
        valid = torch.ones(count, dtype=torch.bool)
        valid[count - 2] = count < 3
        made[task] = TargetRows(values, scales, valid)
    return made


def aux_inputs(batch: Batch, first: int, count: int, **values: Any) -> AuxInputs:
    """What a micro-batch needs whose images are `first`, ... of `count` in the global batch."""
    own = np.full(len(batch.pixels), -1, np.int64)
    own[: batch.num_images] = first + np.arange(batch.num_images)
    fields: dict[str, Any] = {
        "targets": made_targets(count), "own": torch.from_numpy(own),
        "segments": torch.from_numpy(batch.tree_ids), "records": 5, "weight": 7.0,
        "losses": torch.zeros(4, 2), **values,
    }  # fmt: skip
    return AuxInputs(**fields)
