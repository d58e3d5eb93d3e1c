"""The epoch plan: LLaVA's order bit for bit, and what every plan and assignment must keep."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lapilli.data.batches.collate import choose_buckets
from lapilli.data.batches.llava_sampler import llava_order
from lapilli.data.batches.micro_batches import longest_rows
from lapilli.data.batches.sampler import EpochPlan, assign, plan_epoch
from lapilli.data.errors import DataError
from tests.tracing import lines_run

GOLDENS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "goldens" / "llava_sampler.json").read_text()
)
Ints = NDArray[np.int64]


def filled(ids: Ints) -> Ints:
    return ids[ids >= 0]


def mixture(count: int, seed: int = 0) -> tuple[Ints, NDArray[np.bool_]]:
    """Lengths like LLaVA-1.5's 665K: 576 image tokens plus text, or long text; cut at 2048."""
    draw = np.random.default_rng(seed)
    has_image = draw.random(count) >= 0.06
    with_image = 576 + draw.lognormal(5.4, 0.65, count)
    text_only = draw.lognormal(6.9, 0.7, count)
    lengths = np.clip(np.where(has_image, with_image, text_only), 20, 2048)
    return lengths.astype(np.int64), has_image


@st.composite
def datasets(draw: st.DrawFn) -> tuple[Ints, Ints, int]:
    """Lengths, modalities (up to three), and a global batch that the samples can fill."""
    count = draw(st.integers(1, 150))
    lengths = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    kinds = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return np.array(lengths), np.array(kinds), draw(st.integers(1, min(count, 24)))


# ---- LLaVA's order -----------------------------------------------------------------------------


def test_goldens_hold_both_kinds_and_both_modalities() -> None:
    assert len(GOLDENS) == 12
    assert {case["kind"] for case in GOLDENS} == {"modality", "length"}
    assert any(min(case["lengths"]) < 0 < max(case["lengths"]) for case in GOLDENS)


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: f"{case['kind']}-{case['global_seed']}")
def test_llava_order_equals_llava(case: dict[str, Any]) -> None:
    order = llava_order(
        case["lengths"],
        batch_size=case["batch_size"],
        world_size=case["world_size"],
        global_seed=case["global_seed"],
        generator_seed=case["generator_seed"],
    )
    assert order.tolist() == case["indices"]


@pytest.mark.parametrize(
    ("count", "seed"),
    [(1, 0), (2, 1), (624, 7), (625, 2**31), (999, 2**32 - 1), (999, 2**40 + 3), (10**6, 42)],
)
def test_permutation_is_torchs(count: int, seed: int) -> None:
    # With stretches of one sample nothing is left of LLaVA's order but its permutation.
    order = llava_order(np.ones(count), batch_size=1, world_size=1, global_seed=seed)
    torch.manual_seed(seed)
    assert np.array_equal(order, torch.randperm(count).numpy())


def test_without_generator_the_shuffle_continues_the_global_stream() -> None:
    lengths = np.array([5, -5] * 40)
    order = llava_order(lengths, batch_size=1, world_size=1, global_seed=3)
    torch.manual_seed(3)
    images, texts = torch.randperm(40).numpy() * 2, torch.randperm(40).numpy() * 2 + 1
    shuffled = np.concatenate([images[:-1], texts[:-1]])[torch.randperm(78).numpy()]
    assert order.tolist() == [*shuffled, *sorted([images[-1], texts[-1]])]


def test_llava_refuses_an_empty_conversation() -> None:
    with pytest.raises(DataError, match="sample 1 has length 0"):
        llava_order([4, 0, -2], batch_size=1, world_size=1, global_seed=0)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_llava_plan_keeps_order_and_micro_batches(ranks: int) -> None:
    lengths, has_image = mixture(205)
    plan = plan_epoch(
        lengths,
        has_image,
        global_batch_size=24,
        seed=5,
        epoch=2,
        sampler="llava",
        llava_micro_batch=3,
    )
    assert sorted(filled(plan.order)) == list(range(205))
    assert plan.order[205:].tolist() == [-1] * (9 * 24 - 205)
    for step in range(plan.num_steps):
        shares = assign(plan, step, lengths, world_size=ranks, micro_batch_size=3)
        in_turn = [shares[k % ranks][k // ranks] for k in range(8)]
        assert np.array_equal(np.concatenate(in_turn), plan.global_batch(step))


# ---- plans -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    data=datasets(), sampler=st.sampled_from(["grouped", "random", "llava"]), seed=st.integers(0)
)
def test_every_sample_once_in_batches_of_one_size(data: Any, sampler: Any, seed: int) -> None:
    lengths, kinds, size = data
    micro = 1 if sampler == "llava" else None
    plan = plan_epoch(
        lengths,
        kinds,
        global_batch_size=size,
        seed=seed,
        epoch=1,
        sampler=sampler,
        llava_micro_batch=micro,
    )
    assert sorted(filled(plan.order)) == list(range(lengths.size))
    assert (np.diff(plan.offsets) == size).all()
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == plan.order.size
    groups = np.unique(kinds).size if sampler == "grouped" else 1
    assert plan.num_steps <= -(-lengths.size // size) + groups - 1


@settings(deadline=None, max_examples=40)
@given(data=datasets(), window=st.integers(1, 5), epoch=st.integers(0, 3))
def test_grouped_has_one_modality_a_batch_and_the_longest_first(
    data: Any, window: int, epoch: int
) -> None:
    lengths, kinds, size = data
    plan = plan_epoch(
        lengths,
        kinds,
        global_batch_size=size,
        seed=0,
        epoch=epoch,
        sampler="grouped",
        window=window,
    )
    batches = [filled(plan.global_batch(step)) for step in range(plan.num_steps)]
    assert all(np.unique(kinds[batch]).size == 1 for batch in batches)
    assert lengths[batches[0]].max() == lengths.max()
    most = max(lengths[batch].sum() for batch in batches if lengths[batch].max() == lengths.max())
    assert lengths[batches[0]].sum() == most
    # Only a modality's last batch has empty slots.
    for kind in np.unique(kinds):
        sizes = sorted(batch.size for batch in batches if kinds[batch[0]] == kind)
        assert sizes[1:] == [size] * (len(sizes) - 1)


@settings(deadline=None, max_examples=40)
@given(data=datasets(), sampler=st.sampled_from(["grouped", "random"]), seed=st.integers(0, 9))
def test_the_remainder_is_padded_cut_short_or_dropped(data: Any, sampler: Any, seed: int) -> None:
    lengths, kinds, size = data

    def batches(remainder: Any) -> list[Ints]:
        plan = plan_epoch(
            lengths, kinds, global_batch_size=size, seed=seed, epoch=0, sampler=sampler,
            remainder=remainder,
        )  # fmt: skip
        return [plan.global_batch(step) for step in range(plan.num_steps)]

    padded, short = batches("pad"), batches("short")
    assert [filled(batch).tolist() for batch in padded] == [batch.tolist() for batch in short]
    assert all((batch >= 0).all() for batch in short)
    whole = [batch.tolist() for batch in padded if (batch >= 0).all()]
    if whole:
        assert [batch.tolist() for batch in batches("drop")] == whole
    else:
        with pytest.raises(DataError, match="leaves nothing"):
            batches("drop")


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(12, 100),
    geometry=st.sampled_from([(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]),
)
def test_a_short_batch_takes_fewer_micro_steps(count: int, geometry: tuple[int, int]) -> None:
    lengths, has_image = mixture(count)
    world, micro = geometry
    plan = plan_epoch(
        lengths, has_image, global_batch_size=12, seed=0, epoch=0, sampler="grouped",
        remainder="short",
    )  # fmt: skip
    for step in range(plan.num_steps):
        shares = assign(plan, step, lengths, world_size=world, micro_batch_size=micro)
        needed = -(-plan.global_batch(step).size // (world * micro))
        assert {len(rank) for rank in shares} == {needed}
        together = np.concatenate([ids for rank in shares for ids in rank])
        assert sorted(filled(together)) == sorted(plan.global_batch(step))


def test_a_window_holds_neighbours_of_the_length_order() -> None:
    lengths = np.random.default_rng(0).permutation(640) + 1
    one_window = plan_epoch(
        lengths, lengths * 0, global_batch_size=10, seed=0, epoch=0, sampler="grouped", window=64
    )
    spans = [np.ptp(lengths[one_window.global_batch(k)]) for k in range(64)]
    assert spans == [9] * 64
    assert one_window.global_batch(0)[0] == lengths.argmax()
    # The batches themselves are shuffled, only the first is chosen.
    means = [lengths[one_window.global_batch(k)].mean() for k in range(64)]
    assert abs(np.corrcoef(means[1:], range(63))[0, 1]) < 0.5


def test_a_small_dataset_is_batched_otherwise_every_epoch() -> None:
    lengths = np.random.default_rng(2).permutation(640) + 1

    def batches(epoch: int) -> set[frozenset[int]]:
        plan = plan_epoch(
            lengths, lengths * 0, global_batch_size=10, seed=0, epoch=epoch, sampler="grouped"
        )
        return {frozenset(plan.global_batch(k).tolist()) for k in range(64)}

    assert not batches(0) & batches(1)


def test_windows_are_equally_large() -> None:
    # 65 batches in windows of at most 64: 33 + 32, so even the last is sorted over 320 samples.
    lengths = np.random.default_rng(1).permutation(650) + 1
    plan = plan_epoch(
        lengths, lengths * 0, global_batch_size=10, seed=0, epoch=0, sampler="grouped", window=64
    )
    assert max(np.ptp(lengths[plan.global_batch(k)]) for k in range(65)) < 100


def test_random_is_not_sorted_and_fills_only_the_tail() -> None:
    lengths, has_image = mixture(1000)
    plan = plan_epoch(lengths, has_image, global_batch_size=64, seed=0, epoch=0, sampler="random")
    assert (plan.order[:1000] >= 0).all()
    assert (plan.order[1000:] == -1).all()
    assert abs(np.corrcoef(lengths[plan.order[:1000]], range(1000))[0, 1]) < 0.15


@pytest.mark.parametrize("sampler", ["grouped", "random", "llava"])
def test_seed_and_epoch_decide_the_plan(sampler: Any) -> None:
    lengths, has_image = mixture(300)
    micro = 4 if sampler == "llava" else None

    def order(seed: int, epoch: int) -> list[int]:
        plan = plan_epoch(
            lengths,
            has_image,
            global_batch_size=16,
            seed=seed,
            epoch=epoch,
            sampler=sampler,
            llava_micro_batch=micro,
        )
        return plan.order.tolist()

    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != order(4, 1)


@pytest.mark.parametrize(
    ("sampler", "digest"),
    [("grouped", "a5fb0a0ff4b0ed33"), ("random", "aec07bdda03f82d2")],
)
def test_plans_do_not_change_between_versions(sampler: Any, digest: str) -> None:
    # A checkpoint keeps seed and sampler, not the order: another order here would make every run
    # under way repeat and skip samples when it resumes.
    count = np.arange(1000)
    plan = plan_epoch(
        count * 7919 % 503 + 1, count % 5 == 0, global_batch_size=48, seed=11, epoch=3,
        sampler=sampler,
    )  # fmt: skip
    assert hashlib.sha256(plan.order.astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_plan_is_read_only_and_sliced_by_step() -> None:
    lengths, has_image = mixture(100)
    plan = plan_epoch(lengths, has_image, global_batch_size=8, seed=0, epoch=0, sampler="grouped")
    batches = [plan.global_batch(step) for step in range(plan.num_steps)]
    assert np.array_equal(np.concatenate(batches[5:]), plan.order[plan.offsets[5] :])
    with pytest.raises(ValueError, match="read-only"):
        plan.order[0] = 1
    for step in (-1, plan.num_steps):
        with pytest.raises(IndexError, match=f"step {step}"):
            plan.global_batch(step)


# ---- sharing a batch ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    data=datasets(),
    sampler=st.sampled_from(["grouped", "random"]),
    geometry=st.sampled_from([(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]),
)
def test_batches_do_not_depend_on_the_number_of_ranks(
    data: Any, sampler: Any, geometry: tuple[int, int]
) -> None:
    lengths, kinds, _ = data
    lengths, kinds = np.tile(lengths, 12), np.tile(kinds, 12)
    world, micro = geometry
    plan = plan_epoch(lengths, kinds, global_batch_size=12, seed=0, epoch=0, sampler=sampler)
    for step in range(plan.num_steps):
        shares = assign(plan, step, lengths, world_size=world, micro_batch_size=micro)
        assert len(shares) == world
        assert {len(rank) for rank in shares} == {12 // (world * micro)}
        assert {ids.shape for rank in shares for ids in rank} == {(micro,)}
        together = np.concatenate([ids for rank in shares for ids in rank])
        assert sorted(together) == sorted(plan.global_batch(step))


def whole_batch(lengths: Ints, size: int) -> EpochPlan:
    return EpochPlan(np.resize(np.arange(lengths.size), size), np.array([0, size]))


def test_micro_steps_are_alike_and_ranks_take_turns() -> None:
    lengths = np.array([30, 10, 80, 60, 20, 70, 40, 50])
    shares = assign(whole_batch(lengths, 8), 0, lengths, world_size=2, micro_batch_size=2)
    assert [[lengths[ids].tolist() for ids in rank] for rank in shares] == [
        [[80, 70], [20, 10]],
        [[60, 50], [40, 30]],
    ]


def test_rank_totals_are_balanced() -> None:
    # Evenly spaced lengths balance exactly over an even number of micro-steps.
    lengths = np.random.default_rng(0).permutation(128) + 500
    shares = assign(whole_batch(lengths, 128), 0, lengths, world_size=8, micro_batch_size=2)
    assert len({int(lengths[np.concatenate(rank)].sum()) for rank in shares}) == 1


def test_empty_slots_are_spread() -> None:
    lengths = np.array([9, 8, 7, 6, 5])
    plan = EpochPlan(np.array([0, 1, 2, 3, 4, *[-1] * 11]), np.array([0, 16]))
    shares = assign(plan, 0, lengths, world_size=2, micro_batch_size=4)
    assert [[ids.tolist() for ids in rank] for rank in shares] == [
        [[0, 1, -1, -1], [4, -1, -1, -1]],
        [[2, -1, -1, -1], [3, -1, -1, -1]],
    ]


@pytest.mark.parametrize("sampler", ["grouped", "random"])
def test_planning_takes_no_more_steps_of_python_for_more_samples(sampler: Any) -> None:
    def plan(count: int) -> None:
        plan_epoch(*mixture(count), global_batch_size=128, seed=0, epoch=0, sampler=sampler)

    plan(1000)  # what is imported or filled in once
    few, many = (lines_run(lambda count=count: plan(count)) for count in (66_530, 665_298))
    assert many == few


def test_665k_is_hardly_padded() -> None:
    lengths, has_image = mixture(665_298)
    plan = plan_epoch(lengths, has_image, global_batch_size=128, seed=0, epoch=0, sampler="grouped")
    tokens = padded = 0
    for step in range(0, plan.num_steps, 10):
        shares = np.array(assign(plan, step, lengths, world_size=8, micro_batch_size=16))
        in_slots = np.where(shares < 0, 0, lengths[shares])
        tokens += int(in_slots.sum())
        padded += int(in_slots.max(axis=2).sum()) * 16
    assert 0 < 1 - tokens / padded < 0.01


def test_665k_has_sixteen_shapes_and_little_padding() -> None:
    micro = 16
    lengths, has_image = mixture(665_298)
    plan = plan_epoch(lengths, has_image, global_batch_size=128, seed=0, epoch=0, sampler="grouped")
    images, text = longest_rows(plan, lengths, has_image, micro_batch_size=micro)
    buckets = choose_buckets(images, text, count=16)
    assert sum(map(len, buckets)) <= 16
    # another epoch's micro-batches in the first one's buckets
    other = plan_epoch(
        lengths, has_image, global_batch_size=128, seed=0, epoch=1, sampler="grouped"
    )
    pairs = zip(
        longest_rows(other, lengths, has_image, micro_batch_size=micro), buckets, strict=True
    )
    padded = sum(int(np.array(b)[np.searchsorted(b, rows)].sum()) for rows, b in pairs) * micro
    assert 0.01 < 1 - int(lengths.sum()) / padded < 0.06  # 5.0 % seen; evenly spaced 12 %


@settings(deadline=None, max_examples=40)
@given(data=datasets(), sampler=st.sampled_from(["grouped", "random", "llava"]))
def test_longest_rows_are_those_of_every_assignment(data: Any, sampler: Any) -> None:
    lengths, kinds, size = data
    micro, world = (1, size) if sampler == "llava" else (1, 1)
    plan = plan_epoch(
        lengths, kinds, global_batch_size=size, seed=0, epoch=0, sampler=sampler,
        llava_micro_batch=micro if sampler == "llava" else None,
    )  # fmt: skip
    found = longest_rows(plan, lengths, kinds > 0, micro_batch_size=micro)
    chunks = [
        filled(ids)
        for step in range(plan.num_steps)
        for rank in assign(plan, step, lengths, world_size=world, micro_batch_size=micro)
        for ids in rank
    ]
    chunks = [ids for ids in chunks if ids.size]
    for rows, wanted in zip(found, (True, False), strict=True):
        expected = [lengths[c].max() for c in chunks if (kinds[c] > 0).any() == wanted]
        assert sorted(rows) == sorted(expected)


# ---- errors ------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "lengths": [3, 4, 5, 6],
    "modalities": [True, False, True, True],
    "global_batch_size": 4,
    "seed": 0,
    "epoch": 0,
    "sampler": "grouped",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"global_batch_size": 5}, "4 samples are fewer than one global batch of 5.*at most 4"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"lengths": [3, 4, 5]}, "3 lengths and 4 modalities"),
        ({"lengths": [3, 0, 5, 6]}, "sample 1 has length 0"),
        ({"lengths": [3, 4, 5, -6]}, "sample 3 has length -6"),
        ({"lengths": [3.0, 4.0, 5.0, 6.0]}, "lengths is a float64 array"),
        ({"lengths": [[3, 4, 5, 6]]}, r"lengths is a int64 array of shape \(1, 4\)"),
        ({"modalities": list("abab")}, "modalities is a <U1 array"),
        ({"seed": -1}, "seed is -1"),
        ({"epoch": -2}, "epoch is -2"),
        ({"window": 0}, "window is 0"),
        ({"sampler": "sorted"}, "'sorted'; choose one of grouped, random, llava"),
        ({"sampler": "llava"}, "no llava_micro_batch"),
        ({"sampler": "llava", "llava_micro_batch": 0}, "llava_micro_batch is 0"),
        (
            {"sampler": "llava", "llava_micro_batch": 3},
            "not a multiple of llava_micro_batch 3.* 6 ",
        ),
        ({"llava_micro_batch": 2}, "only 'llava' has micro-batches"),
        ({"remainder": "keep"}, "'keep'; choose one of auto, pad, short, drop, llava"),
        ({"remainder": "llava"}, "'llava'; sampler 'llava' takes 'llava' or 'pad', the others"),
        ({"remainder": "drop"}, "leaves nothing.*global batch of 4"),
        (
            {"sampler": "llava", "llava_micro_batch": 2, "remainder": "drop"},
            "'llava' takes 'llava' or 'pad'",
        ),
        (
            {"sampler": "llava", "llava_micro_batch": 2, "llava_processes": 3},
            "of llava_micro_batch 2 x llava_processes 3; use a global_batch_size of 6",
        ),
    ],
)
def test_plan_errors_name_value_and_remedy(changed: dict[str, Any], message: str) -> None:
    plan_epoch(**GOOD)
    with pytest.raises(DataError, match=message) as caught:
        plan_epoch(**(GOOD | changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "message"),
    [
        (8, 5, "128 .* 8 x micro_batch_size 5 = 40; use a global_batch_size of 120 or 160, or"),
        (8, 5, "micro_batch_size of 1, 2, 4, 8, 16$"),
        (6, 4, "= 24; use a global_batch_size of 120 or 144$"),
        (64, 4, "= 256; use a global_batch_size of 256, or a micro_batch_size of 1, 2$"),
        (0, 4, "world_size is 0"),
        (4, 0, "micro_batch_size is 0"),
    ],
)
def test_assign_errors_name_numbers_that_fit(
    world_size: int, micro_batch_size: int, message: str
) -> None:
    lengths, _ = mixture(128)
    plan = whole_batch(lengths, 128)
    with pytest.raises(DataError, match=message):
        assign(plan, 0, lengths, world_size=world_size, micro_batch_size=micro_batch_size)


def test_llava_plan_refuses_another_micro_batch() -> None:
    settings: dict[str, Any] = {**GOOD, "sampler": "llava", "llava_micro_batch": 2}
    plan = plan_epoch(**settings)
    with pytest.raises(DataError, match=r"micro_batch_size is 1.*use 2 "):
        assign(plan, 0, GOOD["lengths"], world_size=2, micro_batch_size=1)
