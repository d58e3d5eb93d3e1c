"""Targets of a global batch for the embedding losses: each rank reads its own images' alone.

The stored bytes are gathered on the devices, in the plan's order: rank by rank, padded to the most
images that a rank has. Every rank then holds the targets of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lapilli.data.batches.collate import Batch
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.targets import TargetReader, open_targets
from lapilli.model.auxiliary.target_loss import AuxInputs, TargetRows
from lapilli.model.config import AuxConfig
from lapilli.train.errors import TrainError
from lapilli.train.steps.rows import MicroRows, StepRows

__all__ = [
    "OwnTargets",
    "aux_inputs",
    "blank_targets",
    "gathered",
    "joined",
    "loss_names",
    "open_readers",
    "read_targets",
]

KINDS = ("smooth_l1", "info_nce")


@dataclass(frozen=True)
class OwnTargets:
    """What a rank reads of a step's targets, and where it stands among those of all ranks.

    Attributes:
        values: By task, int8 or the bits of bf16, [images, rows, width].
        scales: By task, fp32 [images, rows].
        valid: By task, bool [images].
        own: Of each micro-batch, int64 [images], their places among all ranks' images.
        records: Of the global batch.
        weight: Its trained tokens, by which the loss is divided later.
    """

    values: Mapping[str, NDArray[Any]]
    scales: Mapping[str, NDArray[np.float32]]
    valid: Mapping[str, NDArray[np.bool_]]
    own: Sequence[NDArray[np.int64]]
    records: int
    weight: float

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        kinds = (self.values, self.scales, self.valid)
        return sum(array.nbytes for kind in kinds for array in kind.values())


def loss_names(heads: Sequence[tuple[str, int]]) -> list[str]:
    """The names of predictors' losses in metrics, as `AuxInputs.losses` has them, flattened."""
    return [f"{task}.{layer}.{kind}" for task, layer in heads for kind in KINDS]


def open_readers(dataset: Dataset, aux: AuxConfig) -> dict[str, TargetReader]:
    """The targets of every task that something predicts.

    Raises:
        DataError: The dataset has none of that name, or a file is missing.
        TrainError: They are of another shape than the predictors'.
    """
    readers = {task: open_targets(dataset, task) for task in dict.fromkeys(t for t, _ in aux.heads)}
    for task, reader in readers.items():
        (rows, width), facts = aux.shape(task), reader.facts
        side, wanted = round(rows**0.5), round(facts.rows**0.5)
        pools = rows == facts.rows or (
            (side * side, wanted * wanted) == (rows, facts.rows) and side % wanted == 0
        )
        if facts.width != width or not pools:
            raise TrainError(
                f"aux.shapes.{task}: [{rows}, {width}], and the targets of {dataset.path} are "
                f"{facts.rows} x {facts.width} of {facts.teacher}; set the shape to theirs, or "
                "preprocess with the teacher that is meant"
            )
    return readers


def read_targets(
    dataset: Dataset, readers: Mapping[str, TargetReader], rows: StepRows, rank: int,
    *, records: int, weight: float,
) -> OwnTargets:  # fmt: skip
    """Read the targets of a rank's images.

    Args:
        dataset: Their dataset.
        readers: By task.
        rows: The samples of all ranks.
        rank: Whose.
        records: Of the global batch.
        weight: Its trained tokens.
    """
    counts = [sum(len(_slots(dataset, micro)) for micro in micros) for micros in rows]
    most = max(1, *counts)
    own = [_slots(dataset, micro) for micro in rows[rank]]
    starts = rank * most + np.cumsum([0, *map(len, own)])
    values: dict[str, NDArray[Any]] = {}
    scales: dict[str, NDArray[np.float32]] = {}
    valid: dict[str, NDArray[np.bool_]] = {}
    for task, reader in readers.items():
        values[task], scales[task], valid[task] = _none(reader, most)
        for place, slot in enumerate(np.concatenate(own).tolist()):
            if (stored := reader.read(slot)) is not None:
                values[task][place], scales[task][place] = stored
                valid[task][place] = True
    return OwnTargets(
        values=values, scales=scales, valid=valid,
        own=[
            start + np.arange(len(one)) for start, one in zip(starts[:-1], own, strict=True)
        ],
        records=records, weight=weight,
    )  # fmt: skip


def blank_targets(readers: Mapping[str, TargetReader], images: int) -> OwnTargets:
    """Targets of so many images that have none, for a micro-batch without a sample."""
    none = {task: _none(reader, images) for task, reader in readers.items()}
    return OwnTargets(
        values={task: arrays[0] for task, arrays in none.items()},
        scales={task: arrays[1] for task, arrays in none.items()},
        valid={task: arrays[2] for task, arrays in none.items()},
        own=[np.zeros(0, np.int64)], records=1, weight=1.0,
    )  # fmt: skip


def joined(ranks: Sequence[OwnTargets], rank: int) -> OwnTargets:
    """What a rank has once all have gathered, made in one process."""
    tasks = ranks[0].values
    return replace(
        ranks[rank],
        values={task: np.concatenate([one.values[task] for one in ranks]) for task in tasks},
        scales={task: np.concatenate([one.scales[task] for one in ranks]) for task in tasks},
        valid={task: np.concatenate([one.valid[task] for one in ranks]) for task in tasks},
    )


def _none(
    reader: TargetReader, images: int
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.bool_]]:
    """Values, scales and which are valid, of images without a target."""
    shape = (images, reader.facts.rows, reader.facts.width)
    kind = np.int8 if reader.facts.storage == "int8" else np.uint16
    return np.zeros(shape, kind), np.zeros(shape[:2], np.float32), np.zeros(images, np.bool_)


def _slots(dataset: Dataset, micro: MicroRows) -> NDArray[np.int32]:
    """The slots of a micro-batch's images, in the order of its pixels."""
    slots = [dataset.image_slots(int(tree[0])) for row in micro for tree in row]
    return np.concatenate([np.zeros(0, np.int32), *slots])


def aux_inputs(
    own: OwnTargets, batches: Sequence[Batch], heads: int, device: torch.device
) -> list[AuxInputs]:
    """What the model's forward takes beside each micro-batch, with this rank's targets alone.

    Args:
        own: What was read for this rank.
        batches: Its micro-batches.
        heads: Predictors.
        device: Where to; copies to a GPU are not waited for.
    """
    targets = {
        task: TargetRows(
            values=_send(_bits(own.values[task]), device),
            scales=_send(torch.from_numpy(own.scales[task]), device),
            valid=_send(torch.from_numpy(own.valid[task]), device),
        )
        for task in own.values
    }
    found: list[AuxInputs] = []
    for batch, places in zip(batches, own.own, strict=True):
        padded = np.full(len(batch.pixels), -1, np.int64)
        padded[: len(places)] = places
        found.append(AuxInputs(
            targets=targets,
            own=_send(torch.from_numpy(padded), device),
            segments=_send(torch.from_numpy(batch.tree_ids), device),
            records=own.records,
            weight=own.weight,
            losses=torch.zeros(heads, 2, device=device),
        ))  # fmt: skip
    return found


def _bits(values: NDArray[Any]) -> Tensor:
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def gathered(given: Sequence[AuxInputs], world_size: int) -> list[AuxInputs]:
    """The same with the targets of all ranks. Collective."""
    if not given or world_size == 1:
        return [*given]
    targets = {
        task: TargetRows(
            *(_all(part, world_size) for part in (rows.values, rows.scales, rows.valid))
        )
        for task, rows in given[0].targets.items()
    }
    return [replace(one, targets=targets) for one in given]


def _all(part: Tensor, world_size: int) -> Tensor:
    """A tensor of every rank, one after another; as bytes, which every backend knows."""
    whole = part.new_empty((world_size, *part.shape))
    dist.all_gather([*whole.view(torch.uint8)], part.contiguous().view(torch.uint8))
    return whole.flatten(0, 1)
