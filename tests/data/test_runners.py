"""How shards are shared among Ray's tasks."""

from __future__ import annotations

import importlib
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.data.building.runners import LOOKS, MOST_SHARDS, SOON, full_at_once, group_sizes

MODULE = "ray.data._internal.execution.resource_manager"


@given(st.integers(0, 4000), st.integers(1, 1024))
def test_every_shard_is_in_one_task_and_tasks_only_become_smaller(shards: int, slots: int) -> None:
    sizes = list(group_sizes(shards, slots))
    assert sum(sizes) == shards
    assert all(1 <= size <= MOST_SHARDS for size in sizes)
    assert all(first >= second for first, second in pairwise(sizes))


def test_a_build_ends_with_single_shards_for_every_slot() -> None:
    assert list(group_sizes(31, 2)) == [7, 6, 4, 3, 2, 2, *[1] * 7]


def test_the_tested_ray_has_what_a_builds_first_second_depends_on() -> None:
    """Asked in a fresh process, where nobody has set it."""
    ask = f"from {MODULE} import ResourceManager; print(ResourceManager.{LOOKS})"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert float(done.stdout) > SOON


def test_ray_data_looks_often_until_a_build_has_begun_and_not_after_it() -> None:
    manager = importlib.import_module(MODULE).ResourceManager
    usual = getattr(manager, LOOKS)
    with full_at_once() as begun:
        assert getattr(manager, LOOKS) == SOON
        begun()
        assert getattr(manager, LOOKS) == usual
    with pytest.raises(KeyboardInterrupt), full_at_once():
        raise KeyboardInterrupt
    assert getattr(manager, LOOKS) == usual
