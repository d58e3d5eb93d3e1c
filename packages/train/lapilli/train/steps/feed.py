"""Assemble a worker's batches from dataset and plan, in background threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from lapilli.data.batches.collate import Batch, collate_rows
from lapilli.data.batches.sampler import Steps
from lapilli.data.batches.tree_plan import TreePlan
from lapilli.data.batches.tree_rows import Row
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.read_ahead import HORIZON, ReadAhead
from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.train.config import RunConfig
from lapilli.train.steps.aux_targets import (
    OwnTargets,
    aux_inputs,
    blank_targets,
    open_readers,
    read_targets,
)
from lapilli.train.steps.rows import EpochPlans, MicroRows, RowSamples, StepRows, share_rows
from lapilli.train.steps.shapes import batch_shape
from lapilli.train.steps.step_shards import StepShards

__all__ = ["Feed", "StepBatches", "host_bytes", "mean_weights", "mock_steps"]

THREADS = 2  # copying pixels leaves Python's lock to the others
AHEAD = 4  # steps kept ready
MOST_BYTES = 2**30  # of steps kept ready


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step of one worker.

    Attributes:
        step: Number of the step in the run, from 0.
        batches: The worker's micro-batches.
        global_tokens: Trained tokens of the whole global batch.
        global_samples: Samples of the whole global batch, empty slots left out.
        sample_indices: The global batch's samples, -1 for empty slots.
        weights: What each micro-batch's summed loss is multiplied by before it is divided by
            `global_tokens`.
        rows: Samples of the whole global batch by rank, micro-step, row and tree.
        placed: The same samples in that order, -1 for empty slots.
        slots: Of each sample of each of this worker's micro-batches, its place in `placed`.
        targets: Of this worker's images, where something predicts them.
    """

    step: int
    batches: list[Batch]
    global_tokens: int
    global_samples: int
    sample_indices: NDArray[np.int64]
    weights: list[float]
    rows: StepRows
    placed: NDArray[np.int64]
    slots: list[NDArray[np.int64]]
    targets: OwnTargets | None = None


def mean_weights(trained: Sequence[Sequence[int]], rank: int) -> list[float]:
    """Weights under which a global batch's loss is the mean of its micro-batches' means.

    With m micro-batches that train anything, T trained tokens in all and t in one of them, its
    summed loss over T times T / (t m) is its mean over m. That is what LLaVA's trainer computes
    where all micro-batches train something; there one that does not makes the loss no number.

    Args:
        trained: Trained tokens by [rank][micro-step].
        rank: Whose weights are asked for.

    Returns:
        One weight a micro-step; 0 where nothing is trained.
    """
    counts = [count for of_rank in trained for count in of_rank]
    means = sum(count > 0 for count in counts)
    return [sum(counts) / (count * means) if count else 0.0 for count in trained[rank]]


class Feed:
    """A worker's steps from `start` to `total`, the same global batches whatever the world size.

    Args:
        dataset: What is trained on.
        config: The run's settings, with a micro-batch.
        rank: This worker's.
        world_size: Workers.
        held_out: What the run is validated on; with `max_shapes: 1` its batches have the same
            shape.
        plans: Of the run's epochs, where they are made already.

    `requests` are the shards of a remote dataset that this worker copies at a time.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: RunConfig,
        *,
        rank: int,
        world_size: int,
        held_out: Dataset | None = None,
        plans: EpochPlans | None = None,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._readers = open_readers(dataset, config.model.aux)
        self.plans = plans or EpochPlans(dataset, config)
        first = self.plans.first
        self._plans: dict[int, Steps | TreePlan] = {0: first}
        self.shards = StepShards(dataset, self._readers)
        self.requests = config.cache.requests
        self._planning = threading.Lock()
        self.shape = batch_shape(dataset, config, self.plans.sampled, world_size, held_out)
        steps = first.num_steps * config.epochs
        self.total_steps = min(steps, config.max_steps) if config.max_steps else steps

    def _locate(self, step: int) -> tuple[Steps | TreePlan, int]:
        with self._planning:
            # every epoch has as many steps as the first
            epoch, inside = divmod(step, self.plans.first.num_steps)
            if epoch not in self._plans:
                kept = {one: plan for one, plan in self._plans.items() if one == epoch - 1}
                self._plans = {**kept, epoch: self.plans.of(epoch)}
            return self._plans[epoch], inside

    def make(self, step: int) -> StepBatches:
        """This worker's micro-batches of one step."""
        plan, inside = self._locate(step)
        rows, placed = share_rows(
            plan, inside, self.dataset, self.shape, world_size=self.world_size
        )
        batches = [
            collate_rows(
                [self._read(row) for row in micro],
                self.shape,
                self.dataset.image_size,
                with_images=self.carries_images(rows, number),
            )
            for number, micro in enumerate(rows[self.rank])
        ]
        indices = plan.global_batch(inside)
        filled = indices[indices >= 0]
        weights = [1.0] * len(batches)
        if self.config.loss_reduction == "micro_batch_mean":
            trained = [[self._trained(micro) for micro in rank] for rank in rows]
            weights = mean_weights(trained, self.rank)
        tokens = int(self.dataset.num_trained[filled].sum())
        return StepBatches(
            step=step,
            batches=batches,
            global_tokens=tokens,
            global_samples=len(filled),
            sample_indices=indices,
            weights=weights,
            rows=rows,
            placed=placed,
            slots=_slots(rows, placed, self.rank),
            targets=self.targets_of(rows, self.rank, records=len(filled), tokens=tokens),
        )

    def blank_aux(self, batch: Batch, device: torch.device) -> AuxInputs | None:
        """What predictors take beside a batch without a sample; None where there are none.

        The targets are as many as a global batch has samples, none of them valid.
        """
        if not self._readers:
            return None
        heads = len(self.config.model.aux.heads)
        own = blank_targets(self._readers, self.config.global_batch_size)
        (aux,) = aux_inputs(own, [batch], heads, device)
        return aux

    def targets_of(
        self, rows: StepRows, rank: int, *, records: int, tokens: int
    ) -> OwnTargets | None:
        """The targets of a rank's images; None where nothing is predicted.

        Args:
            rows: A step's, by rank and micro-step.
            rank: Whose.
            records: Of the global batch.
            tokens: Its trained tokens.
        """
        if not self._readers:
            return None
        return read_targets(
            self.dataset, self._readers, rows, rank,
            records=records, weight=float(max(1, tokens)),
        )  # fmt: skip

    def _read(self, row: RowSamples) -> Row:
        return [[self.dataset.sample(int(one)) for one in tree] for tree in row]

    def _trained(self, micro: MicroRows) -> int:
        """Trained tokens of a micro-batch."""
        return sum(int(self.dataset.num_trained[tree].sum()) for row in micro for tree in row)

    def carries_images(self, rows: StepRows, number: int) -> bool:
        """Whether micro-step `number` has image slots: any rank has images, or one shape is all.

        Args:
            rows: The step's, by rank and micro-step.
            number: The micro-step.
        """
        images = self.dataset.num_images
        if self.shape.image_slots or (
            self.config.pack and self.config.max_shapes == 1 and images.any()
        ):
            return True
        return any(images[tree].any() for rank in rows for row in rank[number] for tree in row)

    def shards_of(self, step: int, ranks: Sequence[int]) -> NDArray[np.int64]:
        """Numbers of the shards (`StepShards`) that some workers read for a step, sorted.

        Rank 0 reads the ids of the whole global batch, for the metrics.
        """
        plan, inside = self._locate(step)
        samples = plan.global_batch(inside)
        named = samples[samples >= 0] if 0 in ranks else samples[:0]
        if len(ranks) == self.world_size:
            return self.shards.of(named, named)
        rows, _ = share_rows(plan, inside, self.dataset, self.shape, world_size=self.world_size)
        trees = [tree for rank in ranks for micro in rows[rank] for row in micro for tree in row]
        return self.shards.of(np.concatenate([samples[:0], *trees]), named)

    @contextmanager
    def _making(self, start: int) -> Generator[Callable[[int], StepBatches]]:
        """A way to make steps from `start` on; shards at an address are fetched ahead of them."""
        mirror = self.dataset.mirror
        if mirror is None:
            yield self.make
            return
        steps = range(start, self.total_steps)
        ahead = ReadAhead(
            mirror, self.shards.all, (self.shards_of(step, [self.rank]) for step in steps),
            ahead=self.config.cache.read_ahead, requests=self.requests,
            kept=[self.dataset.manifest.selection],
            horizon=min(HORIZON, self.plans.first.num_steps),  # two epochs have plans at a time
        )  # fmt: skip

        def make(step: int) -> StepBatches:
            made = self.make(step)
            ahead.done(step - start)
            if mirror.limit is not None:
                self.shards.forget_maps()
            return made

        with ahead:
            yield make

    def steps(self, start: int) -> Iterator[StepBatches]:
        """Steps from `start` on, in order, made ahead by `THREADS` threads.

        At most `AHEAD` steps are kept, and fewer where they would take more than `MOST_BYTES`. An
        error of a thread is raised where its step is due.
        """
        with self._making(start) as make:
            yield from self._made(start, make)

    def _made(self, start: int, make: Callable[[int], StepBatches]) -> Iterator[StepBatches]:
        ready: deque[Future[StepBatches]] = deque()
        numbers = iter(range(start, self.total_steps))
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="feed")
        ahead = THREADS
        try:
            while True:
                for number in islice(numbers, ahead - len(ready)):
                    ready.append(pool.submit(make, number))
                if not ready:
                    return
                made = ready.popleft().result()
                ahead = max(THREADS, min(AHEAD, MOST_BYTES // max(1, host_bytes(made))))
                yield made
        finally:
            pool.shutdown(cancel_futures=True)


def _slots(rows: StepRows, placed: NDArray[np.int64], rank: int) -> list[NDArray[np.int64]]:
    """Where in `placed` the samples of each of a rank's micro-batches are."""
    counts = [[sum(len(tree) for row in micro for tree in row) for micro in of] for of in rows]
    filled = np.flatnonzero(placed >= 0)
    start = sum(map(sum, counts[:rank]))
    slots: list[NDArray[np.int64]] = []
    for count in counts[rank]:
        slots.append(filled[start : start + count])  # a batch's rows have no gaps
        start += count
    return slots


def host_bytes(step: StepBatches) -> int:
    """Bytes of a step's arrays."""
    arrays = [getattr(batch, f.name) for batch in step.batches for f in fields(batch)]
    targets = 0 if step.targets is None else step.targets.nbytes
    return targets + sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def mock_steps(feed: Feed, start: int = 0) -> Iterator[StepBatches]:
    """Yield steps of the shapes of one of the feed at no cost: an upper bound for any feed."""
    middle = feed.make(feed.total_steps // 2)
    for step in range(start, feed.total_steps):
        yield replace(middle, step=step)
