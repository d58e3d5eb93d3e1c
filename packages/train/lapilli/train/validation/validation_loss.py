"""Compute the loss on held-out samples during training, independent of world size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lapilli.data.batches.collate import Batch, BatchShape, choose_target_sizes, collate
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.model.parts.trainable import set_modes
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.dataset_files import check_same_data, other_teachers, training_data
from lapilli.train.steps.aux_targets import (
    OwnTargets,
    aux_inputs,
    gathered,
    loss_names,
    open_readers,
    read_targets,
)
from lapilli.train.steps.step import to_device

__all__ = [
    "HeldOut",
    "HeldOutLosses",
    "check_same_tokenizer",
    "held_out_buckets",
    "open_held_out",
]

Chunks: TypeAlias = Sequence[NDArray[np.int64]]  # the samples of each micro-batch


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
        cache=config.cache.folder,
        cache_limit=config.cache.limit,
    )


def check_same_tokenizer(dataset: Dataset, held_out: Dataset, tasks: Iterable[str] = ()) -> None:
    """Reject validation data with another tokenizer, template or view than the training data.

    The same for the teachers of what a model predicts.

    Args:
        dataset: The training data.
        held_out: The validation data.
        tasks: Targets that the model predicts.

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
    if others := other_teachers(theirs, mine, tasks):
        raise TrainError(
            f"validation.dataset: {held_out.path} has {others[0]} as {dataset.path}; preprocess it "
            "with the same teacher"
        )


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses on held-out samples.

    Attributes:
        text: Mean over their trained tokens.
        aux: By predictor and kind (`loss_names`), the mean over their images that `aux.mean_over`
            says, before the weights; None where nothing is predicted or no sample has an image.
    """

    text: float
    aux: dict[str, float] | None = None


class HeldOut:
    """Held-out samples in micro-batches that know neither world size nor rank.

    Where a model has predictors, samples with images lie in groups of `global_batch_size`: a
    group's targets are each other's negatives, as in training.

    Args:
        dataset: The samples, of which `config.validation.samples` from all over it are used.
        config: The run's settings.
        shape: The shape of training's batches; held-out ones have lengths of their own, unless it
            is static.
        place: Rank and world size.

    Raises:
        DataError, TrainError: They have images, and no targets of what the model predicts.
    """

    def __init__(
        self, dataset: Dataset, config: RunConfig, shape: BatchShape, place: tuple[int, int]
    ) -> None:
        self._dataset = dataset
        self._aux = config.model.aux
        self._rank, self._world_size = place
        count = min(config.validation.samples, len(dataset))
        chosen = np.unique(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
        longest = int(dataset.lengths[chosen].max())
        buckets = held_out_buckets(longest)
        # not the rows of a rank's share: losses are added alike for any number of workers
        rows = max(1, shape.tokens // buckets[-1]) if shape.tokens else shape.rows
        has_images = bool(dataset.has_images[chosen].any())
        self._readers = open_readers(dataset, self._aux) if has_images else {}
        together = config.global_batch_size if self._readers else len(chosen)
        self._groups = _groups(chosen, dataset, rows, together)
        chunks = [chunk for group in self._groups for chunk in group]
        if not self._readers:  # one modality need not wait for the other
            self._groups = [chunks]
        counts = np.array([dataset.num_trained[ids].sum() for ids in chunks], np.int64)
        self._shape = shape
        if not config.is_static:
            self._shape = replace(
                shape, rows=rows, buckets=buckets, text_buckets=(), tokens=0,
                target_sizes=choose_target_sizes(counts, count=4),
            )  # fmt: skip
        self._samples, self._tokens = len(chosen), int(dataset.num_trained[chosen].sum())

    def loss(
        self, engine: Any, device: torch.device, flush: Callable[[], None] = lambda: None
    ) -> HeldOutLosses:
        """Means over the samples. Collective: all ranks do as many passes.

        A micro-batch's loss is one rank's number; they are added in one order on the host. `flush`
        is called after each (`step_marker`).
        """
        engine.module.eval()
        heads, first = len(self._aux.heads), 0
        losses = torch.zeros(sum(map(len, self._groups)), dtype=torch.float32, device=device)
        shares = torch.zeros(len(losses), heads, 2, device=device)
        images = torch.zeros(heads, device=device)
        with torch.no_grad():
            for group in self._groups:
                counts = torch.zeros(heads, device=device)
                for number, (batch, aux) in enumerate(self._passes(group, device)):
                    beside = {"aux": aux} if aux else {}
                    loss = engine.module(**to_device(batch, device).inputs, **beside)
                    place = number * self._world_size + self._rank
                    if aux:
                        counts = self._counts(aux)
                    if place < len(group):
                        losses[first + place] = loss
                    if aux and place < len(group):
                        shares[first + place] = aux.losses * counts.unsqueeze(1)
                    flush()
                first, images = first + len(group), images + counts
        set_modes(engine.module)
        if self._world_size > 1:
            dist.all_reduce(losses)
            dist.all_reduce(shares)
        text = math.fsum(losses.tolist()) / max(1, self._tokens)
        return HeldOutLosses(text, self._means(shares, images) if self._readers else None)

    def _passes(
        self, group: Chunks, device: torch.device
    ) -> Iterator[tuple[Batch, AuxInputs | None]]:
        """This rank's micro-batches of a group, and what the predictors take beside each."""
        size = self._world_size
        rounds = [group[start : start + size] for start in range(0, len(group), size)]
        own = self._own_targets(rounds)
        targets = None
        for number, together in enumerate(rounds):
            batch = collate(
                [self._dataset.sample(int(i)) for i in _of_rank(together, self._rank)],
                self._shape,
                self._dataset.image_size,
                with_images=any(self._dataset.has_images[part].any() for part in together),
            )
            if own is None:
                yield batch, None
                continue
            mine = replace(own, own=[own.own[number]])
            if targets is None:
                given = aux_inputs(mine, [batch], len(self._aux.heads), device)
                (aux,) = gathered(given, size)
                targets = aux.targets
            else:
                mine = replace(mine, values={}, scales={}, valid={})
                (aux,) = aux_inputs(mine, [batch], len(self._aux.heads), device)
            yield batch, replace(aux, targets=targets)

    def _own_targets(self, rounds: Sequence[Chunks]) -> OwnTargets | None:
        """This rank's targets of a group; None for text, and where nothing is predicted."""
        if not self._readers or not self._dataset.has_images[rounds[0][0]].any():
            return None
        rows = [
            [[[ids[at : at + 1]] for at in range(len(ids))] for ids in of_rank]
            for of_rank in (
                [_of_rank(together, rank) for together in rounds]
                for rank in range(self._world_size)
            )
        ]
        return read_targets(
            self._dataset, self._readers, rows, self._rank,
            records=sum(len(ids) for together in rounds for ids in together),
            weight=0.0,  # the loss stays the text's alone
        )  # fmt: skip

    def _counts(self, aux: AuxInputs) -> Tensor:
        """What each predictor's losses of a group were divided by, fp32 [heads]."""
        if self._aux.mean_over == "records":
            return torch.full_like(aux.losses[:, 0], aux.records)
        counts = [aux.targets[task].valid.sum() for task, _ in self._aux.heads]
        return torch.stack(counts).float().clamp(min=1)

    def _means(self, shares: Tensor, counts: Tensor) -> dict[str, float]:
        """Over all groups."""
        if self._aux.mean_over == "records":
            counts = torch.full_like(counts, self._samples)
        means = shares.cpu().double().sum(0) / counts.cpu().double().unsqueeze(1)
        return dict(zip(loss_names(self._aux.heads), means.flatten().tolist(), strict=True))


def held_out_buckets(longest: int) -> tuple[int, ...]:
    """At most four lengths, evenly spaced, multiples of 8; the last holds the longest sample."""
    step = -(-longest // 32) * 8
    return tuple(range(step, longest + step, step))


def _of_rank(together: Chunks, rank: int) -> NDArray[np.int64]:
    """A rank's micro-batch of a pass; an empty one where there are fewer than ranks."""
    return together[rank] if rank < len(together) else together[0][:0]


def _groups(
    chosen: NDArray[np.int64], dataset: Dataset, rows: int, together: int
) -> Sequence[Chunks]:
    """Samples of one modality and about one length, longest first: groups of micro-batches."""
    groups: list[Chunks] = []
    for with_images in (True, False):
        ids = chosen[dataset.has_images[chosen] == with_images]
        ids = ids[np.argsort(-dataset.lengths[ids], kind="stable")]
        groups += [
            _cut(ids[start : start + together], rows) for start in range(0, len(ids), together)
        ]
    return groups


def _cut(ids: NDArray[np.int64], size: int) -> Chunks:
    return [ids[start : start + size] for start in range(0, len(ids), size)]
