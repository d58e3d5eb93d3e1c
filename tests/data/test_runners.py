"""How shards are shared among Ray's tasks."""

from __future__ import annotations

import importlib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lapilli.data.runners import MOST_SHARDS, USUAL, group_sizes


@given(st.integers(0, 4000), st.integers(1, 1024))
def test_every_shard_is_in_one_task_and_tasks_only_become_smaller(shards: int, slots: int) -> None:
    sizes = list(group_sizes(shards, slots))
    assert sum(sizes) == shards
    assert all(1 <= size <= MOST_SHARDS for size in sizes)
    assert all(first >= second for first, second in pairwise(sizes))


def test_a_build_ends_with_single_shards_for_every_slot() -> None:
    assert list(group_sizes(31, 2)) == [7, 6, 4, 3, 2, 2, *[1] * 7]


def test_the_tested_ray_has_what_a_builds_first_second_depends_on() -> None:
    """A Ray that calls it otherwise would leave slots empty without a word."""
    module = importlib.import_module("ray.data._internal.execution.resource_manager")
    assert module.ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S == USUAL
