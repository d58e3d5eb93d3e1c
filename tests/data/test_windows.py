"""Orders made window by window: every sample once, whatever is asked for first, on any ranks."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lapilli.data.batches.sampler import assign, plan_epoch
from lapilli.data.batches.windows import WindowedPlan, plan_windows, window_size
from lapilli.data.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Case:
    """What a plan is made of, but for sampler, seed, epoch and remainder."""

    lengths: Ints
    num_images: Ints
    blocks: Ints
    order_window: int
    global_batch_size: int

    def plan(self, sampler: Any = "grouped", **changed: Any) -> WindowedPlan:
        """Its plan."""
        given: dict[str, Any] = {"seed": 3, "epoch": 1, "sampler": sampler, **changed}
        return plan_windows(
            self.lengths, self.num_images, self.blocks, order_window=self.order_window,
            global_batch_size=self.global_batch_size, **given,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Blocks of 1 to 40 samples, of which some have images; a batch that the samples can fill."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=20))
    count = sum(sizes)
    bits = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return Case(
        lengths=bits.integers(1, 60, count),
        num_images=(bits.random(count) < share) * bits.integers(1, 4, count),
        blocks=np.concatenate([[0], np.cumsum(sizes)]),
        order_window=draw(st.integers(1, 2 * count)),
        global_batch_size=draw(st.integers(1, min(count, 24))),
    )


def batches(plan: WindowedPlan) -> list[list[int]]:
    return [plan.global_batch(step).tolist() for step in range(plan.num_steps)]


def samples_of(plan: WindowedPlan) -> list[int]:
    return [one for batch in batches(plan) for one in batch if one >= 0]


drawn = settings(deadline=None, max_examples=60, derandomize=True)
SAMPLERS = st.sampled_from(["grouped", "random"])


@drawn
@given(case=cases(), sampler=SAMPLERS, remainder=st.sampled_from(["pad", "short", "drop"]))
def test_every_sample_once_in_as_many_steps_as_without_windows(
    case: Case, sampler: Any, remainder: Any
) -> None:
    whole: dict[str, Any] = {
        "global_batch_size": case.global_batch_size, "seed": 3, "epoch": 1, "sampler": sampler,
        "remainder": remainder,
    }  # fmt: skip
    try:
        reference = plan_epoch(case.lengths, case.num_images > 0, **whole)
    except DataError:
        with pytest.raises(DataError, match="leaves nothing"):
            case.plan(sampler, remainder=remainder)
        return
    plan = case.plan(sampler, remainder=remainder)
    assert plan.num_steps == reference.num_steps
    found = samples_of(plan)
    assert len(found) == len(set(found)) == (reference.order >= 0).sum()
    sizes = [len(plan.global_batch(step)) for step in range(plan.num_steps)]
    assert sorted(sizes) == sorted(np.diff(reference.offsets).tolist())
    if sampler == "grouped":
        for batch in batches(plan):
            assert len({bool(case.num_images[one]) for one in batch if one >= 0}) == 1


@drawn
@given(case=cases(), sampler=SAMPLERS, data=st.data())
def test_a_step_does_not_hang_on_what_was_asked_before(
    case: Case, sampler: Any, data: st.DataObject
) -> None:
    expected = batches(case.plan(sampler))
    start = data.draw(st.integers(0, len(expected) - 1))
    resumed = case.plan(sampler)
    tail = [resumed.global_batch(step).tolist() for step in range(start, resumed.num_steps)]
    assert tail == expected[start:]
    assert batches(pickle.loads(pickle.dumps(resumed))) == expected
    for step in data.draw(st.permutations(range(len(expected)))):
        assert resumed.global_batch(step).tolist() == expected[step]


@drawn
@given(case=cases(), sampler=SAMPLERS, ranks=st.sampled_from([1, 2, 3, 4]))
def test_ranks_share_the_same_global_batches(case: Case, sampler: Any, ranks: int) -> None:
    size = ranks * max(1, case.global_batch_size // ranks)
    if size > len(case.lengths):
        return
    case = Case(case.lengths, case.num_images, case.blocks, case.order_window, size)
    plan = case.plan(sampler)
    for step in range(plan.num_steps):
        shared = assign(plan, step, case.lengths, world_size=ranks, micro_batch_size=size // ranks)
        seen = sorted(one for rank in shared for ids in rank for one in ids.tolist() if one >= 0)
        assert seen == sorted(one for one in plan.global_batch(step).tolist() if one >= 0)


@drawn
@given(case=cases(), sampler=SAMPLERS)
def test_a_window_holds_whole_blocks_and_less_than_a_batch_of_earlier_ones(
    case: Case, sampler: Any
) -> None:
    plan = case.plan(sampler)
    sizes = np.diff(case.blocks)
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    left_over = (1 if sampler == "random" else 2) * (case.global_batch_size - 1)
    seen = set[int]()
    for number in range(plan.num_windows):
        order = plan.window(number).order
        blocks = block_of[order[order >= 0]].tolist()
        assert sum(block in seen for block in blocks) <= left_over
        assert len(blocks) <= case.order_window + sizes.max() + left_over
        seen |= set(blocks)


def long_epoch(count: int = 40_000, block: int = 100, window: int = 8_000) -> Case:
    bits = np.random.default_rng(0)
    return Case(
        lengths=bits.integers(20, 2048, count),
        num_images=(bits.random(count) < 0.9).astype(np.int64),
        blocks=np.arange(0, count + 1, block),
        order_window=window,
        global_batch_size=32,
    )


def test_the_longest_sample_is_in_the_first_window_and_leads_it() -> None:
    case = long_epoch()
    for epoch in range(3):
        plan = case.plan(epoch=epoch)
        assert case.lengths[plan.global_batch(0)].max() == case.lengths.max()


def test_windows_and_their_blocks_differ_by_seed_and_epoch() -> None:
    case = long_epoch()
    firsts = [
        frozenset((case.plan(seed=seed, epoch=epoch).window(1).order // 100).tolist())
        for seed, epoch in [(3, 1), (3, 2), (4, 1)]
    ]
    assert len({*firsts}) == 3
    # a window is no run of neighbours: a fifth of 400 blocks from all over
    assert max(firsts[0]) - min(firsts[0]) > 300


def test_plans_do_not_change_between_versions() -> None:
    plan = long_epoch().plan()
    order = np.concatenate([plan.window(number).order for number in range(plan.num_windows)])
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16]
    assert digest == "375cf2846a0bbc28"


def test_lengths_are_as_alike_in_a_windows_batches_as_in_an_epochs() -> None:
    case = long_epoch()

    def padding(orders: list[Ints]) -> float:
        longest = sum(int(case.lengths[ids[ids >= 0]].max()) * len(ids) for ids in orders)
        return 1 - int(case.lengths.sum()) / longest

    plan = case.plan()
    whole = plan_epoch(
        case.lengths, case.num_images > 0,
        global_batch_size=32, seed=3, epoch=1, sampler="grouped",
    )  # fmt: skip
    windowed, one = (
        padding([of.global_batch(step) for step in range(of.num_steps)]) for of in (plan, whole)
    )
    assert windowed < one + 0.02


def test_memory_is_a_windows_and_not_an_epochs() -> None:
    def peak(count: int) -> int:
        case = long_epoch(count)
        tracemalloc.start()
        plan = case.plan()
        for step in (0, plan.num_steps - 1, plan.num_steps // 2):
            plan.global_batch(step)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(40_000), peak(400_000)
    assert large < small + 400_000  # a byte a sample; an order alone has 8


# ---- settings ------------------------------------------------------------------------------------


def test_auto_is_one_order_up_to_ten_million_samples() -> None:
    assert window_size("auto", 10_000_000) == 0
    assert window_size("auto", 10_000_001) == 4_000_000
    assert window_size(0, 10**9) == 0
    assert window_size(1000, 1000) == 0  # one window is one order
    assert window_size(1000, 1001) == 1000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler": "llava"}, "order_window: 8000 with sampler llava, .*; set order_window 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"remainder": "llava"}, "remainder is 'llava'; sampler 'llava' takes"),
    ],
)
def test_errors_name_value_and_remedy(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        long_epoch().plan(**changed)


@pytest.mark.parametrize("blocks", [[0], [0, 5], [1, 40_000], [0, 7, 7, 40_000]])
def test_blocks_that_do_not_hold_every_sample_once_are_refused(blocks: list[int]) -> None:
    case = long_epoch()
    wrong = Case(case.lengths, case.num_images, np.array(blocks), 8_000, 32)
    with pytest.raises(DataError, match=r"blocks: .* places for 40000 samples"):
        wrong.plan()


def test_negative_windows_and_steps_that_are_not_there_are_refused() -> None:
    with pytest.raises(DataError, match="order_window is -5; it must be at least 0"):
        window_size(-5, 100)
    plan = long_epoch().plan()
    for step in (-1, plan.num_steps):
        with pytest.raises(IndexError, match=f"step {step} of an epoch plan"):
            plan.global_batch(step)
