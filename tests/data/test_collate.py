"""The collator against a loop over positions that counts everything again."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lapilli.data.batches.collate import Batch, BatchShape, blank_batches, choose_buckets, collate
from lapilli.data.dataset.dataset import Sample, open_dataset
from lapilli.data.errors import DataError
from tests.factories import build_dataset, make_mixture, make_tokenizer

SIDE = 2
IMAGE, TEXT = -200, 5


def sample(name: str, ids: list[int], spans: list[tuple[int, int]], seed: int = 0) -> Sample:
    images = ids.count(IMAGE)
    pixels = np.random.default_rng(seed).integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)
    return Sample(name, np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2), pixels)


@st.composite
def samples(draw: st.DrawFn, name: str = "s") -> Sample:
    """Text and images anywhere, trained spans anywhere, the first id and images included."""
    ids = draw(st.lists(st.one_of(st.just(IMAGE), st.integers(0, 99)), min_size=1, max_size=12))
    edges = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=6)))
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    return sample(name, ids, spans, seed=len(ids))


def written_out(one: Sample, image_tokens: int) -> list[tuple[int, int, bool]]:
    """Each position of a row as (id, feature row or -1, trained), by a plain loop."""
    trained = {i for start, end in one.label_spans.tolist() for i in range(start, end)}
    row: list[tuple[int, int, bool]] = []
    features = 0
    for place, token in enumerate(one.input_ids.tolist()):
        if token == IMAGE:
            row += [(0, features + i, False) for i in range(image_tokens)]
            features += image_tokens
        else:
            row.append((token, -1, place in trained))
    return row


def check(batch: Batch, rows: list[Sample], shape: BatchShape) -> None:
    length = batch.input_ids.shape[1]
    features = 0
    predicted: dict[int, int] = {}
    for number in range(shape.rows):
        row = written_out(rows[number], shape.image_tokens) if number < len(rows) else []
        pad = length - len(row)
        assert batch.input_ids[number].tolist() == [i for i, _, _ in row] + [0] * pad
        expected = [-1 if f < 0 else f + features for _, f, _ in row] + [-1] * pad
        assert batch.merge_index[number].tolist() == expected
        assert batch.segment_ids[number].tolist() == [1] * len(row) + [0] * pad
        assert batch.position_ids[number].tolist() == list(range(length))
        assert batch.row_lengths[number] == len(row)
        features += sum(f >= 0 for _, f, _ in row)
        for place, (token, _, trained) in enumerate(row):
            if trained and place:
                predicted[number * length + place - 1] = token
    found = zip(batch.predict_positions.tolist(), batch.targets.tolist(), strict=True)
    assert list(found)[: batch.num_targets] == list(predicted.items())
    assert set(batch.targets[batch.num_targets :].tolist()) <= {-100}
    assert batch.num_targets == len(predicted)
    assert len(batch.targets) == expected_targets(len(predicted), shape)
    assert batch.image_tokens.sum() == features
    assert batch.num_images == sum(len(one.pixels) for one in rows)


def expected_targets(count: int, shape: BatchShape) -> int:
    """The least size that holds them, else the least number of whole chunks, at least one."""
    for size in range(max(1, count), max((*shape.target_sizes, 0)) + 1):
        if size in shape.target_sizes:
            return size
    chunks = 1
    while chunks * shape.predict_chunk < count:
        chunks += 1
    return chunks * shape.predict_chunk


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(samples(), max_size=4),
    spare=st.integers(0, 2),
    image_tokens=st.integers(1, 5),
    chunk=st.integers(1, 9),
    sizes=st.sets(st.integers(1, 20), max_size=3),
)
def test_every_position_is_where_a_loop_puts_it(
    rows: list[Sample], spare: int, image_tokens: int, chunk: int, sizes: set[int]
) -> None:
    shape = BatchShape(
        max(1, len(rows) + spare), (8, 64), image_tokens, chunk, target_sizes=tuple(sorted(sizes))
    )
    batch = collate(rows, shape, SIDE)
    check(batch, rows, shape)
    assert batch.sample_ids == tuple(one.sample_id for one in rows)
    assert len(batch.pixels) % shape.rows == 0
    given_pixels = [pixels for one in rows for pixels in one.pixels]
    assert len(batch.pixels) == len(batch.image_tokens)
    for got, expected in zip(batch.pixels, given_pixels, strict=False):
        np.testing.assert_array_equal(got, expected)
    assert not batch.pixels[len(given_pixels) :].any()
    assert batch.image_tokens.tolist() == [image_tokens] * len(given_pixels) + [0] * (
        len(batch.pixels) - len(given_pixels)
    )


def test_merged_by_a_loop_each_feature_row_is_used_once() -> None:
    rows = [sample("a", [1, IMAGE, 2, IMAGE], [(2, 3)]), sample("b", [IMAGE, 3], [(1, 2)])]
    batch = collate(rows, BatchShape(2, (16,), 3), SIDE)
    used = batch.merge_index[batch.merge_index >= 0]
    assert used.tolist() == list(range(9))
    assert batch.merge_index[0, :8].tolist() == [-1, 0, 1, 2, -1, 3, 4, 5]


def test_text_only_has_no_pixels_and_an_empty_batch_is_all_padding() -> None:
    shape = BatchShape(3, (8,), 4, 16)
    batch = collate([sample("a", [1, 2, 3], [(1, 3)])], shape, SIDE)
    assert batch.pixels.shape == (0, SIDE, SIDE, 3)
    assert batch.num_images == 0
    assert (batch.merge_index == -1).all()
    nothing = collate([], shape, SIDE)
    assert nothing.input_ids.shape == (3, 8)
    assert nothing.num_targets == 0
    assert nothing.targets.tolist() == [-100] * 16
    assert nothing.row_lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("length", "bucket"), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_a_batch_takes_the_first_bucket_that_holds_it(length: int, bucket: int) -> None:
    batch = collate([sample("a", [TEXT] * length, [])], BatchShape(1, (4, 8), 1), SIDE)
    assert batch.input_ids.shape == (1, bucket)


few_lengths = st.lists(st.integers(1, 40), max_size=8)


@settings(deadline=None, max_examples=150)
@given(images=few_lengths, text=few_lengths, count=st.integers(1, 5), multiple=st.integers(1, 8))
def test_no_other_choice_of_buckets_pads_less(
    images: list[int], text: list[int], count: int, multiple: int
) -> None:
    assume(images or text)
    found = choose_buckets(
        np.array(images, int), np.array(text, int), count=count, multiple=multiple
    )
    kinds = (images, text)
    assert sum(map(len, found)) <= max(count, sum(map(bool, kinds)))
    for lengths, buckets in zip(kinds, found, strict=True):
        assert bool(lengths) == bool(buckets)
        assert list(buckets) == sorted(buckets)
        assert all(bucket % multiple == 0 for bucket in buckets)

    def padded(lengths: list[int], buckets: tuple[int, ...]) -> int:
        return sum(min(b for b in buckets if b >= length) for length in lengths)

    def choices(lengths: list[int]) -> list[tuple[int, ...]]:
        ends = sorted({-(-n // multiple) * multiple for n in lengths})
        if not ends:
            return [()]
        sizes = range(min(count, len(ends)))
        return [(*some, ends[-1]) for k in sizes for some in combinations(ends[:-1], k)]

    least = min(
        padded(images, a) + padded(text, b)
        for a in choices(images)
        for b in choices(text)
        if len(a) + len(b) <= max(count, 2)
    )
    assert padded(images, found[0]) + padded(text, found[1]) == least


def test_long_sequences_have_coarser_candidates() -> None:
    lengths = np.arange(1, 100_000)
    images, text = choose_buckets(lengths, lengths[:0], count=4)
    assert text == ()
    assert images[-1] == 100_096
    assert np.abs(np.diff([0, *images]) - 25_000).max() <= 256


def test_every_number_of_trained_positions_has_a_blank_batch() -> None:
    shape = BatchShape(2, (16, 32), 3, text_buckets=(8,), target_sizes=(8, 24, 40))
    blank = [(b.input_ids.shape[1], len(b.targets)) for b in blank_batches(shape, SIDE)]
    assert blank == [(32, 40), (16, 40), (8, 40), (16, 24), (16, 8)]


def test_every_shape_has_a_blank_batch() -> None:
    shape = BatchShape(2, (16, 32), 3, 8, text_buckets=(8,))
    blank = list(blank_batches(shape, SIDE))
    assert [(b.input_ids.shape, len(b.pixels)) for b in blank] == [
        ((2, 32), 2),
        ((2, 16), 2),
        ((2, 8), 0),
    ]
    assert all(batch.num_targets == batch.num_images == 0 for batch in blank)
    assert [b.input_ids.shape for b in blank_batches(replace(shape, text_buckets=()), SIDE)] == [
        (2, 32),
        (2, 16),
        (2, 32),
        (2, 16),
    ]


def test_text_only_batches_have_lengths_of_their_own() -> None:
    shape = BatchShape(2, (16,), 3, 8, text_buckets=(4, 8))
    text = [sample("a", [TEXT] * 3, [])]
    assert collate(text, shape, SIDE).input_ids.shape == (2, 4)
    assert collate(text, shape, SIDE, with_images=True).input_ids.shape == (2, 16)
    assert collate([sample("b", [IMAGE], [])], shape, SIDE).input_ids.shape == (2, 16)


GOOD = sample("src/good", [1, IMAGE, 2], [(2, 3)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [replace(GOOD, sample_id="src/bad", pixels=GOOD.pixels[:0])],
            "src/bad: 1 image places for 0 images; expected one each",
        ),
        ([GOOD, sample("src/long", [1] * 9, [])], r"src/long: 9 tokens; the longest bucket has 8"),
        ([GOOD] * 3, "batch: 3 samples from src/good on for 2 rows"),
        (
            [replace(GOOD, sample_id="src/big", pixels=np.zeros((1, 4, 4, 3), np.uint8))],
            r"src/big: images of \(4, 4, 3\); expected \(2, 2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(rows: list[Sample], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collate(rows, BatchShape(2, (8,), 2), SIDE)


def test_no_buckets_can_be_chosen_of_nothing() -> None:
    none, some = np.array([], int), np.array([3])
    with pytest.raises(DataError, match="no micro-batch"):
        choose_buckets(none, none, count=4)
    for name in ("count", "multiple"):
        with pytest.raises(DataError, match=f"{name} is 0; expected at least 1"):
            choose_buckets(some, none, **{"count": 4, "multiple": 8, name: 0})


@pytest.mark.parametrize("opening", ["{bos}", "", "A chat. "])
def test_num_trained_is_the_number_of_targets(tmp_path: Path, opening: str) -> None:
    """Also where everything is trained, the first id included: nothing can predict that one."""
    template = tmp_path / "all.yaml"
    template.write_text(f'trains: all\nopening: "{opening}"\n')
    mixture = make_mixture(tmp_path / "root")
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    build_dataset(mixture, tmp_path / "out", tokenizer, template=str(template))
    dataset = open_dataset(tmp_path / "out", view="pad32", image_tokens=3)
    shape = BatchShape(1, (int(dataset.lengths.max()),), 3)
    for index in range(len(dataset)):
        batch = collate([dataset.sample(index)], shape, dataset.image_size)
        assert batch.num_targets == dataset.num_trained[index]
        assert batch.row_lengths[0] == dataset.lengths[index]
