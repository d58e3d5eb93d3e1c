"""What a cache fetches and removes, against brute force, and against removing what is oldest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.dataset import shard_plan
from lapilli.data.dataset.shard_plan import (
    NEVER,
    Fetch,
    largest_batch,
    next_uses,
    plan_fetches,
    removal_order,
    warm_order,
)
from lapilli.data.errors import DataError

Sets = Sequence[Sequence[int]]
README = Path(shard_plan.__file__).with_name("README.md")


def arrays(batches: Sets) -> list[np.ndarray]:
    return [np.array(sorted(batch), np.int64) for batch in batches]


def fewest_fetches(batches: Sets, capacity: int) -> int:
    """By trying every choice of what is removed; shards of one size."""

    @cache
    def best(number: int, resident: frozenset[int]) -> int:
        if number == len(batches):
            return 0
        batch = frozenset(batches[number])
        missing, others = batch - resident, sorted(resident - batch)
        room = capacity - len(batch)
        kept = [frozenset(some) for some in combinations(others, min(room, len(others)))]
        return len(missing) + min(best(number + 1, batch | some) for some in kept)

    return best(0, frozenset())


def oldest_first(sizes: Sequence[int], batches: Sets, limit: int) -> int:
    """Fetches of a cache that removes what was read longest ago."""
    resident, fetches = list[int](), 0
    for batch in batches:
        for shard in sorted(batch):
            if shard in resident:
                resident.remove(shard)
            else:
                fetches += 1
                while resident and sum(sizes[one] for one in (*resident, shard)) > limit:
                    resident.pop(0)
            resident.append(shard)
    return fetches


def replayed(
    sizes: Sequence[int], batches: Sets, limit: int, ahead: int, fetches: Sequence[Fetch]
) -> None:
    """Take the fetches again and check what a reader and a disk rely on."""
    resident, left = set[int](), list(fetches)
    for number, batch in enumerate(batches):
        window = {shard for later in batches[number : number + ahead + 1] for shard in later}
        fits = sum(sizes[shard] for shard in window) <= limit
        while left and left[0].batch == number:
            fetch = left.pop(0)
            assert fetch.shard not in resident
            assert set(fetch.removed) <= resident
            assert not set(fetch.removed) & set(batch)
            if fits:  # nothing that the window needs is removed
                assert not set(fetch.removed) & window
            resident = (resident - set(fetch.removed)) | {fetch.shard}
            assert sum(sizes[shard] for shard in resident) <= limit
        assert set(batch) <= resident
        if fits:
            assert window <= resident
    assert not left


SEQUENCES = st.lists(
    st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=9
)  # fmt: skip


@settings(derandomize=True, max_examples=300, deadline=None)
@given(SEQUENCES, st.integers(3, 6))
def test_shards_of_one_size_are_fetched_as_rarely_as_can_be(
    drawn: list[set[int]], capacity: int
) -> None:
    batches = [sorted(batch) for batch in drawn]
    found = plan_fetches([1] * 6, arrays(batches), capacity)
    assert len(found) == fewest_fetches(batches, capacity)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    SEQUENCES, st.lists(st.integers(1, 9), min_size=6, max_size=6), st.integers(0, 30),
    st.integers(0, 4),
)  # fmt: skip
def test_what_is_read_is_there_and_the_limit_holds(
    drawn: list[set[int]], sizes: list[int], more: int, ahead: int
) -> None:
    batches = [sorted(batch) for batch in drawn]
    number, most = largest_batch(sizes, arrays(batches))
    assert most == sum(sizes[shard] for shard in batches[number])
    found = plan_fetches(sizes, arrays(batches), most + more, ahead=ahead)
    replayed(sizes, batches, most + more, ahead, found)
    if most + more >= sum(sizes):
        assert sorted(one.shard for one in found) == sorted(
            {shard for batch in batches for shard in batch}
        )
    with pytest.raises(DataError, match=f"needs {most}; raise it"):
        plan_fetches(sizes, arrays(batches), most - 1)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(SEQUENCES)
def test_next_uses_are_distances(drawn: list[set[int]]) -> None:
    batches = [sorted(batch) for batch in drawn]
    expected = [
        next((at for at, batch in enumerate(batches) if shard in batch), NEVER)
        for shard in range(7)
    ]
    assert next_uses(arrays(batches), 7).tolist() == expected
    assert expected[6] == NEVER


def test_what_is_needed_last_goes_first() -> None:
    order = removal_order([3, NEVER, 0, NEVER, 3], [5.0, 9.0, 1.0, 2.0, 4.0])
    assert order.tolist() == [3, 1, 4, 0, 2]
    assert removal_order([3, NEVER, 0], [0, 0, 0], spared=1).tolist() == [1, 0]
    assert removal_order([3, NEVER, 0], [0, 0, 0], spared=4).tolist() == [1]


def test_a_warm_up_takes_what_is_needed_first() -> None:
    batches = arrays([[1], [3, 4], [1, 2]])
    sizes = [5, 1, 1, 2, 2]
    assert warm_order(sizes, batches, 0) == []
    assert warm_order(sizes, batches, 4) == [1, 3]
    assert warm_order(sizes, batches, 10) == [1, 3, 4, 2]
    assert warm_order(sizes, batches, 11) == [1, 3, 4, 2, 0]  # all


def shuffled(shards: int, each: int, batch: int, window: int, seed: int) -> list[list[int]]:
    """Shards of the batches of an epoch, its samples shuffled among `window` shards at a time."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(shards).reshape(-1, window)
    samples = [draw.permutation(np.repeat(group, each)) for group in order]
    batches = np.concatenate(samples).reshape(-1, batch)
    return [sorted({*row.tolist()}) for row in batches]


@pytest.mark.parametrize(
    ("window", "limit", "by_age", "by_next_use", "ahead_2"),
    [(256, 128, 4216, 1801, 1876), (256, 205, 1843, 675, 682), (32, 32, 256, 256, 256)],
)
def test_fetches_of_an_epoch_are_those_of_the_readme(
    window: int, limit: int, by_age: int, by_next_use: int, ahead_2: int
) -> None:
    """256 shards of 32 samples, batches of 8: a batch touches 3 % of the shards."""
    batches = shuffled(256, 32, 8, window, 0)
    sizes = [1] * 256
    assert oldest_first(sizes, batches, limit) == by_age
    assert len(plan_fetches(sizes, arrays(batches), limit)) == by_next_use
    assert len(plan_fetches(sizes, arrays(batches), limit, ahead=2)) == ahead_2
    said = README.read_text(encoding="utf-8")
    assert f"| {limit} | {by_age:,} | {by_next_use:,} | {ahead_2:,} |" in said
