"""Compute the loss on held-out samples during training, independent of world size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lapilli.data.batches.collate import BatchShape, choose_target_sizes, collate
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.model.parts.trainable import set_modes
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.dataset_files import check_same_data, training_data
from lapilli.train.steps.step import to_device

__all__ = ["HeldOut", "check_same_tokenizer", "held_out_buckets", "open_held_out"]


def open_held_out(config: RunConfig, image_tokens: int) -> Dataset | None:
    """The samples a run is measured on: another dataset's, else what its own holds out.

    Returns:
        None where nothing asks for them.

    Raises:
        DataError: It cannot be opened, or nothing is held out.
    """
    if not (config.validation.every or config.validation.answers_every):
        return None
    return open_dataset(
        config.validation.dataset or config.dataset,
        view=config.view,
        image_tokens=image_tokens,
        max_length=config.max_length,
        split=TRAIN if config.validation.dataset else HELD_OUT,
    )


def check_same_tokenizer(dataset: Dataset, held_out: Dataset) -> None:
    """Reject validation data with another tokenizer, template or view than the training data.

    Raises:
        TrainError: Names what differs, with both values.
    """
    here, there = dataset.manifest.tokenizer, held_out.manifest.tokenizer
    if here["fingerprint"] != there["fingerprint"]:
        raise TrainError(
            f"validation.dataset: {held_out.path} was made with tokenizer {there['name']} "
            f"(fingerprint {there['fingerprint'][:12]}), {dataset.path} with {here['name']} "
            f"({here['fingerprint'][:12]}); preprocess it with the same"
        )
    mine, theirs = (training_data(one) for one in (dataset, held_out))
    check_same_data(theirs, mine, f"validation.dataset: {held_out.path}")


class HeldOut:
    """Held-out samples in micro-batches that know neither world size nor rank.

    Args:
        dataset: The samples, of which `config.validation.samples` from all over it are used.
        config: The run's settings.
        shape: The shape of training's batches; held-out ones have lengths of their own, unless it
            is static.
        place: Rank and world size.
    """

    def __init__(
        self, dataset: Dataset, config: RunConfig, shape: BatchShape, place: tuple[int, int]
    ) -> None:
        self._dataset = dataset
        self._rank, self._world_size = place
        count = min(config.validation.samples, len(dataset))
        chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
        longest = int(dataset.lengths[chosen].max())
        buckets = held_out_buckets(longest)
        # not the rows of a rank's share: losses are added alike for any number of workers
        rows = max(1, shape.tokens // buckets[-1]) if shape.tokens else shape.rows
        self._chunks = _chunks(chosen, dataset, rows)
        counts = np.array([dataset.num_trained[ids].sum() for ids in self._chunks], np.int64)
        self._shape = shape
        if not config.is_static:
            self._shape = replace(
                shape, rows=rows, buckets=buckets, text_buckets=(), tokens=0,
                target_sizes=choose_target_sizes(counts, count=4),
            )  # fmt: skip
        self._tokens = int(dataset.num_trained[chosen].sum())

    def loss(
        self, engine: Any, device: torch.device, flush: Callable[[], None] = lambda: None
    ) -> float:
        """Mean over the samples' trained tokens. Collective: all ranks do as many passes.

        A micro-batch's loss is one rank's number; they are added in one order on the host. `flush`
        is called after each (`step_marker`).
        """
        engine.module.eval()
        losses = torch.zeros(len(self._chunks), dtype=torch.float32, device=device)
        with torch.no_grad():
            for first in range(0, len(self._chunks), self._world_size):
                together = self._chunks[first : first + self._world_size]
                mine = first + self._rank
                ids = together[self._rank] if self._rank < len(together) else together[0][:0]
                batch = collate(
                    [self._dataset.sample(int(i)) for i in ids],
                    self._shape,
                    self._dataset.image_size,
                    with_images=any(self._dataset.has_images[part].any() for part in together),
                )
                loss = engine.module(**to_device(batch, device).inputs)
                if mine < len(losses):
                    losses[mine] = loss
                flush()
        set_modes(engine.module)
        if self._world_size > 1:
            dist.all_reduce(losses)
        return math.fsum(losses.tolist()) / max(1, self._tokens)


def held_out_buckets(longest: int) -> tuple[int, ...]:
    """At most four lengths, evenly spaced, multiples of 8; the last holds the longest sample."""
    step = -(-longest // 32) * 8
    return tuple(range(step, longest + step, step))


def _chunks(chosen: NDArray[np.int64], dataset: Dataset, rows: int) -> Sequence[NDArray[np.int64]]:
    """Samples of one modality and about one length together, longest first."""
    chunks: list[NDArray[np.int64]] = []
    for with_images in (True, False):
        ids = chosen[dataset.has_images[chosen] == with_images]
        ids = ids[np.argsort(-dataset.lengths[ids], kind="stable")]
        chunks += [ids[start : start + rows] for start in range(0, len(ids), rows)]
    return chunks
