"""LLaVA's epochs against the torch and Accelerate parts that its trainer is made of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler

from lapilli.data.batches.llava_sampler import llava_steps

Ids = NDArray[np.int64]


class ByModality(Sampler[int]):
    """LLaVA's sampler for stretches of one sample, in which nothing is sorted."""

    def __init__(self, signed: Ids) -> None:
        self.parts = [np.flatnonzero(signed > 0), np.flatnonzero(signed < 0)]
        self.generator: torch.Generator | None = None

    def __iter__(self) -> Iterator[int]:
        drawn = [part[torch.randperm(len(part)).numpy()] for part in self.parts]
        leading = np.concatenate([part[:-1] for part in drawn])
        shuffled = leading[torch.randperm(len(leading), generator=self.generator).numpy()]
        return iter([*shuffled.tolist(), *sorted(int(part[-1]) for part in drawn)])

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def micro_steps(
    sampler: Sampler[int], count: int, micro: int, processes: int, epochs: int, seed: int
) -> list[list[int]]:
    """Each micro-step's samples of all processes, as their loaders yield them."""
    torch.manual_seed(seed)
    found: list[list[int]] = []
    if processes > 1:
        sampler.generator = torch.Generator()  # type: ignore[attr-defined]
    for _ in range(epochs):
        if processes == 1:
            loader = DataLoader(range(count), batch_size=micro, sampler=sampler)  # type: ignore[arg-type]
            found += [batch.tolist() for batch in loader]
            continue
        # one pass of the sampler: every process draws the same
        torch.empty((), dtype=torch.int64).random_()  # the loader's own seed
        order = list(iter(sampler))
        by_rank = [
            list(BatchSamplerShard(BatchSampler(order, micro, drop_last=False), processes, rank))
            for rank in range(processes)
        ]
        found += [[i for batch in step for i in batch or []] for step in zip(*by_rank, strict=True)]
    return found


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(13, 90),
    micro=st.integers(1, 4),
    processes=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    epochs=st.integers(1, 3),
    grouped=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_steps_are_those_of_torchs_and_accelerates_loaders(
    count: int, micro: int, processes: int, accumulation: int, epochs: int, grouped: bool, seed: int
) -> None:
    signed = np.where(np.arange(count) % 3, 5, -5)
    if grouped:  # stretches of one sample
        micro = processes = accumulation = 1
    if count < micro * processes * accumulation:
        return
    sampler: Sampler[int] = ByModality(signed) if grouped else RandomSampler(range(count))
    stream = micro_steps(sampler, count, micro, processes, epochs, seed)
    steps = len(stream) // epochs // accumulation  # transformers: whole groups of an epoch
    expected = [
        sorted(i for group in stream[k * accumulation : (k + 1) * accumulation] for i in group)
        for k in range(epochs * steps)
    ]
    found = [
        llava_steps(
            signed,
            micro_batch_size=micro,
            processes=processes,
            accumulation=accumulation,
            seed=seed,
            epoch=epoch,
            group_by_modality_length=grouped,
        )
        for epoch in range(epochs)
    ]
    assert all(part.shape == (steps, accumulation * processes * micro) for part in found)
    assert [sorted(row[row >= 0].tolist()) for part in found for row in part] == expected
    in_turn = [i for part in found for row in part for i in row.tolist() if i >= 0]
    assert in_turn == [i for group in stream for i in group][: len(in_turn)]


def test_the_shuffle_of_two_processes_has_a_generator_nobody_seeded() -> None:
    """With stretches of one sample on each of two processes: all but the pairs' order is known."""
    signed = np.where(np.arange(60) % 2, 5, -5)
    found = llava_steps(
        signed, micro_batch_size=1, processes=2, accumulation=1, seed=3, epoch=1
    ).reshape(-1)
    torch.manual_seed(3)
    own = torch.Generator()
    order: list[int] = []
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_()
        texts_last: list[Ids] = []
        for part in (np.flatnonzero(signed > 0), np.flatnonzero(signed < 0)):
            texts_last.append(part[torch.randperm(len(part)).numpy()])
        leading = np.concatenate([part[:-2].reshape(-1, 2) for part in texts_last])
        shuffled = leading[torch.randperm(len(leading), generator=own).numpy()].reshape(-1)
        order = [*shuffled.tolist(), *sorted(np.concatenate([p[-2:] for p in texts_last]).tolist())]
    assert found.tolist() == order


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_padded_epochs_hold_every_sample_once(epoch: int) -> None:
    signed = np.where(np.arange(47) % 4, 7, -3)
    found = llava_steps(
        signed, micro_batch_size=2, processes=2, accumulation=3, seed=1, epoch=epoch, pads=True
    )
    assert found.shape == (4, 12)
    assert sorted(found.reshape(-1)[:47].tolist()) == list(range(47))
    assert (found.reshape(-1)[47:] == -1).all()
