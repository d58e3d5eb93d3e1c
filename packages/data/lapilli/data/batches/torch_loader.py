"""A torch `DataLoader` over a dataset, for a training loop of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lapilli.data.batches.collate import (
    BatchShape,
    choose_buckets,
    choose_target_sizes,
    collate,
    static_shape,
)
from lapilli.data.batches.micro_batches import largest_sum, longest_rows, trained_counts
from lapilli.data.batches.sampler import EpochPlan, assign, plan_epoch
from lapilli.data.batches.windows import OrderWindow, WindowedPlan, plan_windows, window_size
from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.sample_shards import sample_blocks
from lapilli.data.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

__all__ = ["FORWARD", "MicroBatches", "torch_loader"]

FORWARD = (
    "input_ids", "position_ids", "merge_index", "pixels", "predict_positions", "targets",
)  # fmt: skip


class MicroBatches:
    """The micro-batches of one rank in one epoch, by number: what a `DataLoader` reads.

    Attributes:
        accumulation: Micro-batches of a step; number `n` is micro-batch `n % accumulation` of
            step `n // accumulation`.
    """

    def __init__(
        self, dataset: Dataset, plan: EpochPlan | WindowedPlan, rows: int, max_shapes: int,
        rank: int, world: int,
    ) -> None:  # fmt: skip
        self._dataset, self._plan, self._rows = dataset, plan, rows
        self._rank, self._world = rank, world
        self.accumulation = len(self._ranks(0)[rank])
        first = plan.first_window if isinstance(plan, WindowedPlan) else plan
        self._shape = _shape(dataset, first, rows, max_shapes)

    def _ranks(self, step: int) -> list[list[Any]]:
        lengths = self._dataset.lengths
        return assign(
            self._plan, step, lengths, world_size=self._world, micro_batch_size=self._rows
        )

    def __len__(self) -> int:
        """Micro-batches of the epoch on this rank."""
        return self._plan.num_steps * self.accumulation

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The tensors of one micro-batch, by `FORWARD`'s names."""
        import torch

        step, micro = divmod(number, self.accumulation)
        ranks = self._ranks(step)
        ids = ranks[self._rank][micro]
        everywhere = np.concatenate([one[micro] for one in ranks])
        batch = collate(
            [self._dataset[int(i)] for i in ids if i >= 0],
            self._shape,
            self._dataset.image_size,
            with_images=bool(self._dataset.num_images[everywhere[everywhere >= 0]].any()),
        )
        return {name: torch.from_numpy(getattr(batch, name)) for name in FORWARD}


def torch_loader(
    dataset: Dataset,
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    epoch: int = 0,
    seed: int = 42,
    sampler: Literal["grouped", "random"] = "grouped",
    order_window: OrderWindow = "auto",
    max_shapes: int = 16,
    num_workers: int = 0,
) -> DataLoader[dict[str, Tensor]]:
    """One epoch's micro-batches of one rank, in the order in which `lapilli train` sees them.

    Each is a dict of the arguments of `lapilli.model.VisionLanguageModel.forward`: `input_ids`,
    `position_ids` [B, S] int64, `merge_index` [B, S] int32, `pixels` [N, H, W, 3] uint8,
    `predict_positions`, `targets` [P] int64, -100 where P is padded. The model gives the summed
    loss; divide it by the trained tokens of all ranks and micro-batches of a step.

    Args:
        dataset: As `open_dataset` gives it.
        global_batch_size: Samples of a step, over all ranks.
        micro_batch_size: Samples of a micro-batch; None takes a rank's whole share of a step.
        rank: This process.
        world_size: Processes.
        epoch: Decides the order with `seed`; make a loader for each epoch.
        seed: As of `plan_epoch`.
        sampler: As of `plan_epoch`; `llava` needs the trainer.
        order_window: As of `window_size`: samples of the windows in which an epoch is ordered.
        max_shapes: Most different pairs of S and images or none, and of P. With 1 all
            micro-batches have one shape, with pixels, also those without an image.
        num_workers: Processes of the `DataLoader` that read ahead; 0 reads in this one.

    Raises:
        DataError: A rank outside of 0 to `world_size` - 1, or sizes that do not divide.
    """
    from torch.utils.data import DataLoader

    if not 0 <= rank < world_size:
        raise DataError(f"rank: {rank} with world_size {world_size}; expected 0 to world_size - 1")
    rows = micro_batch_size or max(1, global_batch_size // world_size)
    window = window_size(order_window, len(dataset))
    if window:
        plan = plan_windows(
            dataset.lengths, dataset.num_images, sample_blocks(dataset), order_window=window,
            global_batch_size=global_batch_size, seed=seed, epoch=epoch, sampler=sampler,
        )  # fmt: skip
    else:
        plan = plan_epoch(
            dataset.lengths, dataset.has_images,
            global_batch_size=global_batch_size, seed=seed, epoch=epoch, sampler=sampler,
        )  # fmt: skip
    micros: Any = MicroBatches(dataset, plan, rows, max_shapes, rank, world_size)
    return DataLoader(micros, batch_size=None, shuffle=False, num_workers=num_workers)


def _shape(dataset: Dataset, plan: EpochPlan, rows: int, max_shapes: int) -> BatchShape:
    """Few shapes that hold every micro-batch of the plan, and of later windows."""
    lengths = dataset.lengths
    if max_shapes == 1:
        length = -(-int(lengths.max()) // 8) * 8
        numbers = dataset.num_images, dataset.num_trained
        return static_shape(rows, length, dataset.image_tokens, *numbers)
    longest = longest_rows(plan, lengths, dataset.num_images, micro_batch_size=rows)
    # beside another rank's images a micro-batch without any has one, and the longest row fits
    images, text = (np.append(one, lengths.max()) if one.size else one for one in longest)
    buckets, text_buckets = choose_buckets(images, text, count=max_shapes)
    counts = trained_counts(plan, lengths, dataset.num_trained, micro_batch_size=rows)
    counts = np.append(counts, largest_sum(dataset.num_trained, rows))
    return BatchShape(
        rows=rows,
        buckets=buckets or text_buckets,
        image_tokens=dataset.image_tokens,
        text_buckets=text_buckets,
        target_sizes=choose_target_sizes(counts.astype(np.int64), count=max_shapes),
    )
