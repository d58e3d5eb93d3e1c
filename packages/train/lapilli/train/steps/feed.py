"""Assemble a worker's batches from dataset and plan, in background threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.collate import (
    Batch,
    BatchShape,
    choose_buckets,
    choose_target_sizes,
    collate_rows,
)
from lapilli.data.batches.sampler import EpochPlan, longest_rows, trained_counts
from lapilli.data.batches.tree_plan import TreePlan, micro_sums
from lapilli.data.batches.tree_rows import Row
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.prefixes import shared_prefixes
from lapilli.train.config import RunConfig
from lapilli.train.steps.aux_targets import OwnTargets, open_readers, read_targets
from lapilli.train.steps.rows import MicroRows, RowSamples, StepRows, plan_rows, share_rows

__all__ = ["Feed", "StepBatches", "batch_shape", "host_bytes", "mean_weights", "mock_steps"]

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


def batch_shape(
    dataset: Dataset,
    config: RunConfig,
    plan: EpochPlan | TreePlan,
) -> BatchShape:
    """The few shapes a run's batches have, chosen for its first epoch; the others are like it."""
    images, text = _longest(dataset, config, plan)
    buckets, text_buckets = choose_buckets(
        images[images > 0], text[text > 0], count=config.max_shapes
    )
    return BatchShape(
        rows=config.micro_batch_size,
        buckets=buckets,
        image_tokens=dataset.image_tokens,
        predict_chunk=config.model.head_chunk,
        text_buckets=text_buckets,
        target_sizes=_target_sizes(dataset, config, plan),
        has_trees=config.shares_rows,
    )


def _longest(
    dataset: Dataset, config: RunConfig, plan: EpochPlan | TreePlan
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of the longest row of each micro-batch that has images, and of each that has none.

    Whatever the other epochs put together: the longest sample has a place, and where rows hold
    several, the longest row. Where a text-only micro-batch may stand beside another rank's images,
    it has one among theirs.
    """
    lengths, has_images = dataset.lengths, dataset.has_images
    if isinstance(plan, TreePlan):
        most = max(config.row_length or config.max_length, int(lengths.max()))
        longest = micro_sums(plan, micro_batch_size=config.micro_batch_size).longest
        return np.array([most]) if config.pack else np.append(longest, most), longest[:0]
    images, text = longest_rows(plan, lengths, has_images, micro_batch_size=config.micro_batch_size)
    is_apart = config.sampler == "grouped"
    with_images = lengths[has_images] if is_apart or not has_images.any() else lengths
    images = np.append(images, with_images.max(initial=0))
    return images, np.append(text, lengths[~has_images].max(initial=0))


def _target_sizes(
    dataset: Dataset, config: RunConfig, plan: EpochPlan | TreePlan
) -> tuple[int, ...]:
    """The few numbers of trained positions; a single one holds whatever may come together.

    Where rows hold several samples a later epoch may have a larger sum than the first: a quarter
    more has a place, and what is larger still is padded to `head_chunk`.
    """
    trained = dataset.num_trained
    if isinstance(plan, TreePlan):
        counts = micro_sums(plan, trained, micro_batch_size=config.micro_batch_size).sums
        counts = np.append(counts, counts.max() * 5 // 4)
    elif config.max_shapes == 1:
        rows = min(config.micro_batch_size, len(trained))
        counts = np.partition(trained, -rows)[-rows:].sum(keepdims=True)
    else:
        counts = trained_counts(
            plan, dataset.lengths, trained, micro_batch_size=config.micro_batch_size
        )
        counts = np.append(counts, trained.max(initial=0))
    return choose_target_sizes(counts.astype(np.int64), count=config.max_shapes)


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
    """A worker's steps from `start` to `total`, the same global batches whatever the world size."""

    def __init__(self, dataset: Dataset, config: RunConfig, *, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._prefixes = shared_prefixes(dataset) if config.share_images else None
        self._readers = open_readers(dataset, config.model.aux)
        first = self._plan_epoch(0)
        self._plan: tuple[int, EpochPlan | TreePlan] = 0, first
        self._planning = threading.Lock()
        self.shape = batch_shape(dataset, config, first)
        steps = first.num_steps * config.epochs
        self.total_steps = min(steps, config.max_steps) if config.max_steps else steps

    @cached_property
    def shared_tokens(self) -> NDArray[np.int64]:
        """int64 [len], tokens that a sample shares with the others of its tree."""
        if self._prefixes is None:
            return np.zeros(len(self.dataset), np.int64)
        return self._prefixes.prefixes

    def _plan_epoch(self, epoch: int) -> EpochPlan | TreePlan:
        return plan_rows(self.dataset, self._prefixes, self.config, epoch)

    def _locate(self, step: int) -> tuple[EpochPlan | TreePlan, int]:
        with self._planning:
            # every epoch has as many steps as the first
            epoch, inside = divmod(step, self._plan[1].num_steps)
            if epoch != self._plan[0]:
                self._plan = epoch, self._plan_epoch(epoch)
            return self._plan[1], inside

    def make(self, step: int) -> StepBatches:
        """This worker's micro-batches of one step."""
        plan, inside = self._locate(step)
        rows, placed = share_rows(
            plan, inside, self.dataset.lengths,
            world_size=self.world_size, micro_batch_size=self.config.micro_batch_size,
        )  # fmt: skip
        batches = [
            collate_rows(
                [self._read(row) for row in micro],
                self.shape,
                self.dataset.image_size,
                with_images=any(self._has_images(rank[number]) for rank in rows),
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
        targets = None
        if self._readers:
            targets = read_targets(
                self.dataset, self._readers, rows, self.rank,
                records=len(filled), weight=float(max(1, tokens)),
            )  # fmt: skip
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
            targets=targets,
        )

    def _read(self, row: RowSamples) -> Row:
        return [[self.dataset.sample(int(one)) for one in tree] for tree in row]

    def _trained(self, micro: MicroRows) -> int:
        """Trained tokens of a micro-batch."""
        return sum(int(self.dataset.num_trained[tree].sum()) for row in micro for tree in row)

    def _has_images(self, micro: MicroRows) -> bool:
        return any(self.dataset.num_images[tree].any() for row in micro for tree in row)

    def steps(self, start: int) -> Iterator[StepBatches]:
        """Steps from `start` on, in order, made ahead by `THREADS` threads.

        At most `AHEAD` steps are kept, and fewer where they would take more than `MOST_BYTES`. An
        error of a thread is raised where its step is due.
        """
        ready: deque[Future[StepBatches]] = deque()
        numbers = iter(range(start, self.total_steps))
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="feed")
        ahead = THREADS
        try:
            while True:
                for number in islice(numbers, ahead - len(ready)):
                    ready.append(pool.submit(self.make, number))
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
