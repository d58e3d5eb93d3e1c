"""The orders of an epoch that `planning` compares, ours and others', as plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.llava_sampler import llava_order
from lapilli.data.batches.sampler import EpochPlan, plan_epoch

__all__ = ["ORDERS", "Samples", "Shape"]

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """What an order is made of.

    Attributes:
        tokens: int64 [n], all tokens of a sample, image tokens included.
        words: int64 [n], its words between white space, which is what LLaVA and prismatic count.
        has_image: bool [n].
    """

    tokens: Ids
    words: Ids
    has_image: NDArray[np.bool_]


@dataclass(frozen=True)
class Shape:
    """How an epoch's batches are shared: ranks x accumulation x micro-batch samples a step."""

    ranks: int
    micro_batch_size: int
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.ranks * self.micro_batch_size * self.accumulation


def plain(samples: Samples, shape: Shape) -> EpochPlan:
    """A permutation, cut as it comes: nothing is grouped."""
    return _fixed([np.random.default_rng(0).permutation(samples.tokens.size)], shape)


def by_modality(samples: Samples, shape: Shape) -> EpochPlan:
    """A permutation of each modality, cut as it comes: what keeping them apart does by itself."""
    draw = np.random.default_rng(0)
    return _fixed([draw.permutation(ids) for ids in _kinds(samples)], shape)


def llava(samples: Samples, shape: Shape) -> EpochPlan:
    """LLaVA's own order, index for index, of its word counts."""
    return plan_epoch(
        samples.words, samples.has_image, global_batch_size=shape.global_batch_size, seed=0,
        epoch=0, sampler="llava", llava_micro_batch=shape.micro_batch_size,
    )  # fmt: skip


def prismatic(samples: Samples, shape: Shape) -> EpochPlan:
    """The order of prismatic's `SplitModalitySampler` (874c5bb), but for its draws.

    Random global batches of one modality, each sorted by words and dealt to the ranks so that the
    sums of words are alike; a rank's share is then cut into micro-batches as it lies. The last
    batch of a modality is filled with samples of its first, which are trained twice.
    """
    batches: list[Ids] = []
    for number, ids in enumerate(_kinds(samples)):
        if not ids.size:
            continue
        dealt = _dealt(ids, samples.words, shape, seed=number)
        whole = dealt.size // shape.global_batch_size * shape.global_batch_size
        batches.append(dealt[:whole])
        if left := dealt.size - whole:
            stolen = np.resize(dealt[: shape.global_batch_size], shape.global_batch_size - left)
            last = np.concatenate([dealt[whole:], stolen])
            batches.append(_dealt(last, samples.words, shape, seed=number))
    shares = np.concatenate(batches).reshape(
        -1, shape.ranks, shape.accumulation, shape.micro_batch_size
    )
    by_step = shares.swapaxes(1, 2).reshape(-1, shape.global_batch_size)
    shuffled = by_step[np.random.default_rng(0).permutation(len(by_step))]
    return _plan(shuffled, shape.micro_batch_size)


def _dealt(ids: Ids, words: Ids, shape: Shape, seed: int) -> Ids:
    """A permutation of one modality, a rank's share of a step after the other.

    LLaVA deals its stretches in the same way, to micro-batches where prismatic deals to ranks.
    """
    share = shape.micro_batch_size * shape.accumulation
    return ids[llava_order(words[ids], batch_size=share, world_size=shape.ranks, global_seed=seed)]


def random(samples: Samples, shape: Shape) -> EpochPlan:
    """Our sampler `random`: modalities mixed, a global batch shared by length."""
    return plan_epoch(
        samples.tokens, samples.has_image, global_batch_size=shape.global_batch_size, seed=0,
        epoch=0, sampler="random",
    )  # fmt: skip


def grouped(samples: Samples, shape: Shape) -> EpochPlan:
    """Our sampler `grouped`, the default."""
    return plan_epoch(
        samples.tokens, samples.has_image, global_batch_size=shape.global_batch_size, seed=0,
        epoch=0, sampler="grouped",
    )  # fmt: skip


ORDERS: dict[str, Callable[[Samples, Shape], EpochPlan]] = {
    "ungrouped": plain,
    "modality": by_modality,
    "llava": llava,
    "prismatic": prismatic,
    "random": random,
    "grouped": grouped,
}


def _kinds(samples: Samples) -> list[Ids]:
    return [np.flatnonzero(samples.has_image), np.flatnonzero(~samples.has_image)]


def _fixed(orders: list[Ids], shape: Shape) -> EpochPlan:
    """Each order cut into global batches, its last filled with empty slots."""
    filled = [
        np.pad(order, (0, -order.size % shape.global_batch_size), constant_values=-1)
        for order in orders
    ]
    return _plan(
        np.concatenate(filled).reshape(-1, shape.global_batch_size), shape.micro_batch_size
    )


def _plan(batches: Ids, micro_batch_size: int) -> EpochPlan:
    steps, width = batches.shape
    offsets = np.arange(steps + 1, dtype=np.int64) * width
    return EpochPlan(batches.reshape(-1), offsets, micro_batch_size, width)
