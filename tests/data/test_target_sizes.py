"""The numbers of trained positions that batches are padded to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.batches.collate import choose_target_sizes
from lapilli.data.batches.micro_batches import trained_counts
from lapilli.data.batches.sampler import assign, plan_epoch
from tests.data.test_sampler import datasets, filled, mixture


@pytest.mark.parametrize("micro", [1, 4, 16])
def test_665k_has_sixteen_numbers_of_trained_positions_and_little_padding(micro: int) -> None:
    """Answers of 3 % of a short text and half of a long one, about 160 trained tokens a sample."""
    lengths, has_image = mixture(665_298)
    text = np.where(has_image, lengths - 576, lengths).clip(4)
    share = np.random.default_rng(0).beta(4, 4, len(text)) * np.where(text < 60, 0.3, 1.0)
    trained = (text * share).astype(np.int64).clip(1)
    counts = [
        trained_counts(
            plan_epoch(
                lengths, has_image, global_batch_size=128, seed=0, epoch=epoch, sampler="grouped"
            ),
            lengths, trained, micro_batch_size=micro,
        )
        for epoch in (0, 1)
    ]  # fmt: skip
    sizes = np.array(choose_target_sizes(counts[0], count=16))
    assert len(sizes) == 16
    for of_epoch in counts:
        padded = sizes[np.searchsorted(sizes, of_epoch).clip(max=15)].sum()
        whole_chunks = (-(-of_epoch // 1024) * 1024).sum()
        assert of_epoch.sum() < padded < 1.15 * of_epoch.sum()  # 1.12 to 1.14 seen
        assert padded < 0.95 * whole_chunks  # 1.2, 1.9 and 6.4 times the real ones


@settings(deadline=None, max_examples=40)
@given(data=datasets(), seed=st.integers(0, 9))
def test_trained_counts_are_those_of_every_whole_assignment(data: Any, seed: int) -> None:
    lengths, kinds, size = data
    trained = np.random.default_rng(seed).integers(0, 9, len(lengths))
    plan = plan_epoch(lengths, kinds, global_batch_size=size, seed=0, epoch=0, sampler="random")
    found = trained_counts(plan, lengths, trained, micro_batch_size=1)
    real = [
        int(trained[filled(ids)].sum())
        for step in range(plan.num_steps)
        for ids in assign(plan, step, lengths, world_size=1, micro_batch_size=1)[0]
    ]
    assert sorted(found) == sorted(real)
