"""What a model's predictors say of sample images, beside the teachers' features.

Shape suffix legend: N images, R rows of a target, C its width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.shards.target_rows import decode_rows
from lapilli.model.auxiliary.target_loss import fit_rows
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.errors import TrainError
from lapilli.train.steps.aux_targets import open_readers
from lapilli.train.steps.step import to_device

__all__ = ["ImagePrediction", "predict_targets"]


@dataclass(frozen=True)
class ImagePrediction:
    """One image.

    Attributes:
        name: Its record's id.
        pixels: uint8 [H, W, 3], as the model sees it.
        targets: By task, the teacher's features, fp32 [R, C]; tasks whose teacher gave none are
            left out.
        predicted: By task and layer, the predictor's, fp32 [R, C].
    """

    name: str
    pixels: NDArray[np.uint8]
    targets: Mapping[str, NDArray[np.float32]]
    predicted: Mapping[tuple[str, int], NDArray[np.float32]]


def predict_targets(
    model: VisionLanguageModel, dataset: Dataset, count: int, device: torch.device
) -> list[ImagePrediction]:
    """Ask a model's predictors about the first images of some records, from all over a dataset.

    Args:
        model: In evaluation mode, on the device.
        dataset: With targets, as the model was trained on.
        count: Most records.
        device: The model's.

    Raises:
        TrainError: The model predicts nothing, or targets of another shape.
        DataError: The dataset has no targets of a task.
    """
    if not model.config.aux.heads:
        raise TrainError("predictions: the model has no predictors; expected one with aux.layers")
    readers = open_readers(dataset, model.config.aux)
    rows = {task: reader.facts.rows for task, reader in readers.items()}
    found: list[ImagePrediction] = []
    for index in _spread(np.flatnonzero(dataset.has_images), count):
        sample = dataset.sample(index)
        shape = BatchShape(
            rows=1, buckets=(int(dataset.lengths[index]),), image_tokens=dataset.image_tokens,
            predict_chunk=4,
        )  # fmt: skip
        batch = collate([sample], shape, dataset.image_size)
        given = to_device(batch, device).inputs
        predicted = model.predict_targets(
            given["input_ids"], given["position_ids"], given["merge_index"], given["pixels"],
            torch.from_numpy(batch.tree_ids).to(device),
        )  # fmt: skip
        stored = {task: reader.read(_slot(dataset, index)) for task, reader in readers.items()}
        found.append(
            ImagePrediction(
                name=dataset.sample_id(index),
                pixels=sample.pixels[0],
                targets={task: decode_rows(*one) for task, one in stored.items() if one},
                predicted={
                    head: fit_rows(each[:1].float(), rows[head[0]])[0].cpu().numpy()
                    for head, each in predicted.items()
                },
            )
        )
    return found


def _spread(places: NDArray[np.int64], count: int) -> Sequence[int]:
    if not len(places):
        return []
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).astype(np.int64)
    return [int(place) for place in places[chosen]]


def _slot(dataset: Dataset, index: int) -> int:
    return int(dataset.image_slots(index)[0])
