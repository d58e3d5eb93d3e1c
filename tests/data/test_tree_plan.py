"""Plans of rows that hold several samples, against what they promise and against exact packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.batches.tree_plan import TreeLimits, TreePlan, assign_rows, plan_trees
from lapilli.data.errors import DataError


@st.composite
def epochs(draw: st.DrawFn) -> dict[str, Any]:
    """Samples with groups, and what a row may hold."""
    count = draw(st.integers(4, 60))
    prefixes = draw(st.lists(st.sampled_from([0, 5]), min_size=count, max_size=count))
    rest = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    groups = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    shares, packs = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    return {
        "lengths": np.add(prefixes, rest), "modalities": np.array(prefixes) > 0,
        "groups": np.array(groups), "prefixes": np.array(prefixes),
        "limits": TreeLimits(shares, packs, 24, draw(st.integers(1, 4))),
        "global_batch_size": draw(st.integers(1, min(8, count))), "seed": draw(st.integers(0, 9)),
        "epoch": draw(st.integers(0, 3)),
    }  # fmt: skip


def rows_of(plan: TreePlan) -> list[list[list[int]]]:
    return [[tree.tolist() for tree in plan.row(row)] for row in range(len(plan.rows) - 1)]


@settings(deadline=None)
@given(epochs())
def test_every_sample_once_in_trees_and_rows_that_keep_the_limits(epoch: dict[str, Any]) -> None:
    plan = plan_trees(**epoch)
    limits, lengths, prefixes = epoch["limits"], epoch["lengths"], epoch["prefixes"]
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    rows = rows_of(plan)
    assert [one for row in rows for tree in row for one in tree] == plan.order.tolist()
    for row, length in zip(rows, plan.row_lengths.tolist(), strict=True):
        total = 0
        for tree in row:
            assert 1 <= len(tree) <= (limits.max_branches if limits.share_images else 1)
            if len(tree) > 1:
                assert len({epoch["groups"][one] for one in tree}) == 1
                assert all(prefixes[one] for one in tree)
            total += prefixes[tree[0]] + sum(lengths[one] - prefixes[one] for one in tree)
        assert length == total <= limits.row_length
        assert len(row) == 1 or limits.pack


@settings(deadline=None)
@given(epochs())
def test_a_global_batch_has_its_samples_and_only_the_last_of_a_kind_fewer(
    epoch: dict[str, Any],
) -> None:
    plan = plan_trees(**epoch)
    size = epoch["global_batch_size"]
    batches = [plan.global_batch(step) for step in range(plan.num_steps)]
    kinds = [{bool(epoch["modalities"][one]) for one in batch} for batch in batches]
    short = [kind for batch, kind in zip(batches, kinds, strict=True) if len(batch) < size]
    assert all(len(batch) <= size for batch in batches)
    if epoch["limits"].pack:
        assert len(short) <= 1
    else:
        assert all(len(kind) == 1 for kind in kinds)
        assert len(short) == len({next(iter(kind)) for kind in short})
    dropped = plan_trees(**epoch, drop_remainder=True) if len(short) < len(batches) else None
    if dropped is not None:
        assert dropped.num_steps == len(batches) - len(short)


@settings(deadline=None)
@given(epochs(), st.integers(1, 4), st.integers(1, 3))
def test_ranks_share_the_rows_of_a_batch(
    epoch: dict[str, Any], world_size: int, micro_batch_size: int
) -> None:
    plan = plan_trees(**epoch)
    for step in range(plan.num_steps):
        ranks = assign_rows(plan, step, world_size=world_size, micro_batch_size=micro_batch_size)
        assert len(ranks) == world_size
        assert len({len(micros) for micros in ranks}) == 1
        slots = np.concatenate([ids for micros in ranks for ids in micros])
        expected = list(range(int(plan.steps[step]), int(plan.steps[step + 1])))
        assert sorted(slots[slots >= 0].tolist()) == expected


@given(epochs())
@settings(deadline=None, max_examples=30)
def test_the_same_again_and_another_epoch_another_order(epoch: dict[str, Any]) -> None:
    first, again = plan_trees(**epoch), plan_trees(**epoch)
    for name in ("order", "trees", "rows", "steps", "row_lengths"):
        assert np.array_equal(getattr(first, name), getattr(again, name))


def test_epochs_differ() -> None:
    many: dict[str, Any] = {
        "lengths": np.full(200, 10), "modalities": np.ones(200), "groups": np.arange(200) // 3,
        "prefixes": np.full(200, 5), "limits": TreeLimits(True, False, 64),
        "global_batch_size": 8, "seed": 0,
    }  # fmt: skip
    orders = [plan_trees(**many, epoch=epoch).order.tolist() for epoch in range(2)]
    assert orders[0] != orders[1]
    trees = [frozenset(tree) for row in rows_of(plan_trees(**many, epoch=0)) for tree in row]
    whole = sum(len(tree) == 3 for tree in trees)
    assert whole >= 66 - 200 // 8  # a batch's end cuts at most one image's samples apart


def first_fit_decreasing(sizes: list[int], capacity: int) -> int:
    """Bins that the textbook's rule needs."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = next((place for place, room in enumerate(rooms) if room >= size), None)
        if fitting is None:
            rooms.append(capacity - size)
        else:
            rooms[fitting] -= size
    return len(rooms)


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_packed_rows_are_nearly_as_few_as_over_the_whole_epoch(capacity: int) -> None:
    """Lengths like those of LLaVA's instructions: an image's tokens with text, and text alone."""
    draw = np.random.default_rng(0)
    images = 600 + draw.integers(20, 500, 3_600)
    text = np.minimum(draw.lognormal(5.6, 0.9, 400).astype(np.int64) + 30, 2048)
    lengths = np.concatenate([images, text])
    plan = plan_trees(
        lengths, lengths > 600, np.arange(len(lengths)), np.zeros(len(lengths)),
        TreeLimits(False, True, capacity), global_batch_size=128, seed=0, epoch=0,
    )  # fmt: skip
    rows = len(plan.rows) - 1
    assert rows <= 1.03 * first_fit_decreasing(lengths.tolist(), capacity)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_batch_size": 9}, "8 samples are fewer than one global batch of 9"),
        ({"limits": TreeLimits(True, True, 9)}, "row_length is 9, but 8 samples are longer"),
        ({"limits": TreeLimits(True, True, 64, 0)}, "max_branches 0"),
        ({"global_batch_size": 5, "drop_remainder": True}, None),
    ],
)
def test_what_cannot_be_planned_is_named(changed: dict[str, Any], message: str | None) -> None:
    values: dict[str, Any] = {
        "lengths": np.full(8, 10), "modalities": np.ones(8), "groups": np.zeros(8),
        "prefixes": np.full(8, 5), "limits": TreeLimits(True, True, 64), "global_batch_size": 2,
        "seed": 0, "epoch": 0, **changed,
    }  # fmt: skip
    if message is None:
        assert plan_trees(**values).num_steps == 1
        return
    with pytest.raises(DataError, match=message):
        plan_trees(**values)
