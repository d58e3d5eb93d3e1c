"""How shards are shared among Ray's tasks."""

from __future__ import annotations

import importlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.data.building.runners import MOST_SHARDS, group_sizes
from lapilli.data.ray_internals import INTERVAL, RESOURCE_MANAGER, SOON, fill_slots_at_once


@given(st.integers(0, 4000), st.integers(1, 1024))
def test_every_shard_is_in_one_task_and_tasks_only_become_smaller(shards: int, slots: int) -> None:
    sizes = list(group_sizes(shards, slots))
    assert sum(sizes) == shards
    assert all(1 <= size <= MOST_SHARDS for size in sizes)
    assert all(first >= second for first, second in pairwise(sizes))


def test_a_build_ends_with_single_shards_for_every_slot() -> None:
    assert list(group_sizes(31, 2)) == [7, 6, 4, 3, 2, 2, *[1] * 7]


def test_ray_data_looks_often_until_a_build_has_begun_and_not_after_it() -> None:
    manager = importlib.import_module(RESOURCE_MANAGER).ResourceManager
    usual = getattr(manager, INTERVAL)
    with fill_slots_at_once() as begun:
        assert getattr(manager, INTERVAL) == SOON
        begun()
        assert getattr(manager, INTERVAL) == usual
    with pytest.raises(KeyboardInterrupt), fill_slots_at_once():
        raise KeyboardInterrupt
    assert getattr(manager, INTERVAL) == usual
