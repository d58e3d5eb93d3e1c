"""Collate samples into a `Batch` of numpy arrays whose shape comes from a small fixed set.

The collator computes every count on the host: no data-dependent shape and no synchronization with
the device until the end of backward.

Shape suffix legend: B rows, S tokens, N images, F feature rows in all (N x tokens an image),
P trained positions, padded to one of a few sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.data.batches.micro_batches import largest_sum
from lapilli.data.batches.tree_rows import Row, RowTokens, lay_out
from lapilli.data.dataset.dataset import Sample
from lapilli.data.errors import DataError
from lapilli.data.text.encode import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Batch",
    "BatchShape",
    "blank_batches",
    "choose_buckets",
    "choose_target_sizes",
    "collate",
    "collate_rows",
    "static_shape",
]

CANDIDATES = 512  # lengths that buckets are chosen from: 10 ms for 16 of them


@dataclass(frozen=True)
class BatchShape:
    """The shapes a batch may have.

    Attributes:
        rows: Rows B of a micro-batch; what is not filled is padding.
        buckets: Sequence lengths S, ascending; a batch takes the first that holds it.
        image_tokens: Tokens an image takes.
        predict_chunk: P is padded to a multiple of this if it exceeds all `target_sizes`.
        text_buckets: The same as `buckets` for batches without images; empty for `buckets`.
        target_sizes: Numbers P of trained positions, ascending; a batch takes the first that holds
            it.
        has_trees: Whether rows may hold several samples.
        image_slots: Images N of every batch, of those without any too; 0 for as many as it needs.
        tokens: Most tokens B x S of a micro-batch: longer rows are fewer (`rows_at`); 0 for `rows`
            at every length.
        image_sizes: Numbers N of image slots, ascending; a batch with images takes the first that
            holds them, or a multiple of its rows.
        sample_sizes: Numbers of `Batch.sample_slots`, likewise.
    """

    rows: int
    buckets: tuple[int, ...]
    image_tokens: int
    predict_chunk: int = 1024
    text_buckets: tuple[int, ...] = ()
    target_sizes: tuple[int, ...] = ()
    has_trees: bool = False
    image_slots: int = 0
    tokens: int = 0
    image_sizes: tuple[int, ...] = ()
    sample_sizes: tuple[int, ...] = ()

    def rows_at(self, length: int) -> int:
        """Rows B of a micro-batch of this sequence length S."""
        return max(1, min(self.rows, self.tokens // length)) if self.tokens else self.rows

    def length_of(self, longest: int, *, has_images: bool) -> int | None:
        """Sequence length S of a micro-batch with this longest row; None where none holds it."""
        of_kind = self.buckets if has_images else self.text_buckets or self.buckets
        return next((length for length in of_kind if length >= longest), None)

    def most_rows(self, longest: NDArray[np.int64], *, has_images: bool) -> NDArray[np.int64]:
        """Rows B, int64 [m], of micro-batches with these longest rows, int64 [m]."""
        of_kind = self.buckets if has_images else self.text_buckets or self.buckets
        rows = np.array([self.rows_at(length) for length in of_kind], np.int64)
        return rows[np.searchsorted(of_kind, longest).clip(max=len(rows) - 1)]

    def padded_images(self, count: int, rows: int, *, has_images: bool) -> int:
        """Padded N for so many images in so many rows B, where any rank has some."""
        if self.image_slots:
            return self.image_slots
        least = max(rows * has_images, -(-count // rows) * rows)
        return next((size for size in self.image_sizes if size >= least > 0), least)

    def padded_samples(self, count: int, rows: int) -> int:
        """Padded `Batch.sample_slots` for so many samples in so many rows B."""
        least = max(1, -(-count // rows)) * rows
        return next((size for size in self.sample_sizes if size >= least), least)

    def padded_targets(self, count: int) -> int:
        """Padded P for this many trained positions; at least one, so that the head always runs."""
        chunk = self.predict_chunk
        whole_chunks = max(chunk, -(-count // chunk) * chunk)
        return next((size for size in self.target_sizes if size >= count), whole_chunks)


@dataclass(frozen=True)
class Batch:
    """What one micro-step needs, on the host.

    Attributes:
        input_ids: int64 [B, S]; 0, a safe id, at image slots and padding.
        position_ids: int64 [B, S], each sample's own, 0 to S - 1 in a row of one: padding is on
            the right.
        segment_ids: int32 [B, S]; 1 for a row's own tokens, 0 for padding.
        tree_ids: int32 [B, S], from 1 in every row; 0 for padding. Tokens of other trees do not see
            each other.
        branch_ids: int32 [B, S]; 0 for what a tree's samples share, their images among it, from 1
            for what each has behind it. Other branches do not see each other.
        row_lengths: int64 [B], tokens of each row.
        merge_index: int32 [B, S]; the feature row that stands there, -1 for text.
        pixels: uint8 [N, H, W, 3].
        image_tokens: int64 [N], feature rows of each image; 0 for one that pads N.
        predict_positions: int64 [P], flattened positions in B x S whose next token is trained.
        targets: int64 [P], that next token; -100 where P is padded.
        target_samples: int64 [P], index in `sample_ids` of the sample each target belongs to.
        sample_ids: The samples, row by row.
        sample_slots: Their number padded: B, or with several samples a row a multiple of it.
        has_trees: Whether rows may hold several samples.
        num_images: Number of images without padding.
        num_targets: Number of targets without padding.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    segment_ids: NDArray[np.int32]
    tree_ids: NDArray[np.int32]
    branch_ids: NDArray[np.int32]
    row_lengths: NDArray[np.int64]
    merge_index: NDArray[np.int32]
    pixels: NDArray[np.uint8]
    image_tokens: NDArray[np.int64]
    predict_positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    target_samples: NDArray[np.int64]
    sample_ids: tuple[str, ...]
    sample_slots: int
    has_trees: bool
    num_images: int
    num_targets: int


def choose_buckets(
    with_images: NDArray[np.int64], text_only: NDArray[np.int64], *, count: int, multiple: int = 8
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sequence lengths for batches with and without images, under which least is padded.

    Exact: `_best_buckets` by dynamic programming for each of the two, and every way to share
    `count` between them.

    Args:
        with_images: int64 [m], the longest row of each micro-batch that has images.
        text_only: int64 [n], the same of those that have none.
        count: Shapes in all, at least one for each kind that there is.
        multiple: Every length is a multiple of this (tensor cores like 8), or of 2, 4, ... times
            it where there would be more than `CANDIDATES` to choose from.

    Returns:
        Lengths, ascending, for each of the two; none where there is no micro-batch.

    Raises:
        DataError: No micro-batch, or a number below 1.
    """
    for name, value in (("count", count), ("multiple", multiple)):
        if value < 1:
            raise DataError(f"choose_buckets: {name} is {value}; expected at least 1")
    curves = [_best_buckets(one, count, multiple) for one in (with_images, text_only)]
    images, text = curves
    if not images and not text:
        raise DataError("choose_buckets: no micro-batch; expected at least one length")
    if not images or not text:
        best = (images or text)[-1][1]
        return (best, ()) if images else ((), best)
    pairs = [
        (one[0] + other[0], one[1], other[1])
        for one in images
        for other in text
        if len(one[1]) + len(other[1]) <= max(2, count)
    ]
    _, best_images, best_text = min(pairs)
    return best_images, best_text


def _best_buckets(
    lengths: NDArray[np.int64], count: int, multiple: int
) -> list[tuple[int, tuple[int, ...]]]:
    """For 1, 2, ... buckets the least sum of padded lengths, and the buckets that have it."""
    if not lengths.size:
        return []
    while int(lengths.max()) > multiple * CANDIDATES:
        multiple *= 2
    ends, counts = np.unique(-(-lengths // multiple) * multiple, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: one bucket of length ends[j] for all lengths above ends[i - 1]
    cost = ends[np.newaxis] * (below[np.newaxis, 1:] - below[:-1, np.newaxis])
    cost = np.where(np.tri(len(ends), k=-1, dtype=np.bool_), np.iinfo(np.int64).max // 4, cost)
    best = cost[0]
    choices: list[NDArray[np.int64]] = []
    found: list[tuple[int, tuple[int, ...]]] = [(int(best[-1]), (int(ends[-1]),))]
    for _ in range(1, min(count, len(ends))):
        sums = best[:-1, np.newaxis] + cost[1:]
        choices.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
        place, chosen = len(ends) - 1, [int(ends[-1])]
        for choice in reversed(choices):
            place = int(choice[place])
            chosen.append(int(ends[place]))
        found.append((int(best[-1]), tuple(reversed(chosen))))
    return found


def choose_target_sizes(
    counts: NDArray[np.int64], *, count: int, multiple: int = 8
) -> tuple[int, ...]:
    """Numbers of trained positions under which least is padded; exact, as `choose_buckets`.

    Args:
        counts: int64 [m], trained positions of each micro-batch.
        count: Sizes in all.
        multiple: As for `choose_buckets`.

    Returns:
        Ascending; the last holds every micro-batch.

    Raises:
        DataError: No micro-batch, or a number below 1.
    """
    return choose_buckets(counts.clip(min=1), counts[:0], count=count, multiple=multiple)[0]


def static_shape(
    rows: int,
    length: int,
    image_tokens: int,
    num_images: NDArray[np.int64],
    num_trained: NDArray[np.int64],
) -> BatchShape:
    """The one shape that holds any micro-batch of some samples, one a row.

    Every batch has pixels, of text-only samples too, unless no sample has an image.

    Args:
        rows: Rows of a micro-batch.
        length: Tokens of every row; no sample is longer.
        image_tokens: Tokens an image takes.
        num_images: [n], images of each sample.
        num_trained: [n], trained tokens of each.
    """
    images, trained = (largest_sum(of, rows) for of in (num_images, num_trained))
    return BatchShape(
        rows=rows,
        buckets=(length,),
        image_tokens=image_tokens,
        target_sizes=(max(1, trained),),
        image_slots=-(-images // rows) * rows,
    )


def collate(
    samples: Sequence[Sample], shape: BatchShape, image_size: int, *, with_images: bool = False
) -> Batch:
    """Put samples into one batch, one a row; missing rows are padding.

    Args:
        samples: At most `shape.rows` samples.
        shape: The shapes allowed.
        image_size: Side of the images, for a batch without any.
        with_images: Carry blank images if there are none of its own: set where another rank has
            some in the same micro-step. All ranks run the tower or none does; ZeRO-3 gathers a
            module's weights on every rank at once and would wait for ever.

    Raises:
        DataError: Too many samples; a sample longer than the longest bucket, whose placeholders
            and images differ in number, or whose images are of another size; names it.
    """
    rows = [[[sample]] for sample in samples]
    return collate_rows(rows, shape, image_size, with_images=with_images)


def collate_rows(
    rows: Sequence[Row], shape: BatchShape, image_size: int, *, with_images: bool = False
) -> Batch:
    """Put rows of trees into one batch; missing rows are padding.

    Args:
        rows: At most `shape.rows`, each of trees, each of samples that begin alike.
        shape: The shapes allowed.
        image_size: As for `collate`.
        with_images: Likewise.

    Raises:
        DataError: As for `collate`; or samples of one tree that do not begin alike.
    """
    samples = [sample for row in rows for tree in row for sample in tree]
    laid_out = [lay_out(row, shape.image_tokens) for row in rows]
    carrying = [one for row in laid_out for one in row.images if len(one.pixels)]
    has_images = with_images or bool(carrying) or shape.image_slots > 0
    length = _length(rows, laid_out, shape, has_images)
    slots = shape.rows_at(length)
    _check_counts(rows, samples, shape, slots)
    images = sum(len(one.pixels) for one in carrying)
    count = shape.padded_images(images, slots, has_images=has_images)
    if images > count:
        raise DataError(
            f"batch: {images} images from {samples[0].sample_id} on; the shape has "
            f"{shape.image_slots} image_slots; expected no more"
        )
    pixels, image_tokens = _images(carrying, shape.image_tokens, image_size, count)
    arrays, targets = _join(rows, laid_out, slots, length)
    padded = shape.padded_targets(targets.count)
    return Batch(
        **arrays,
        pixels=pixels,
        image_tokens=image_tokens,
        predict_positions=targets.padded(targets.positions, padded, 0),
        targets=targets.padded(targets.ids, padded, IGNORE_INDEX),
        target_samples=targets.padded(targets.samples, padded, 0),
        sample_ids=tuple(sample.sample_id for sample in samples),
        sample_slots=shape.padded_samples(len(samples), slots),
        has_trees=shape.has_trees,
        num_images=int((image_tokens > 0).sum()),
        num_targets=targets.count,
    )


def _join(
    rows: Sequence[Row], laid_out: Sequence[RowTokens], count: int, length: int
) -> tuple[dict[str, Any], _Targets]:
    """The arrays [B, S] of a batch and its row lengths, by name, and its trained positions."""
    ids, trees, branches = (np.zeros((count, length), np.int64) for _ in range(3))
    positions = np.broadcast_to(np.arange(length, dtype=np.int64), ids.shape).copy()
    merge_index = np.full((count, length), -1, np.int32)
    row_lengths = np.zeros(count, np.int64)
    features = number = 0
    targets = _Targets()
    for place, (row, tokens) in enumerate(zip(rows, laid_out, strict=True)):
        size = len(tokens.ids)
        is_image = tokens.feature_rank >= 0
        ids[place, :size] = np.where(is_image, 0, tokens.ids)
        trees[place, :size] = tokens.tree_ids
        branches[place, :size] = tokens.branch_ids
        positions[place, :size] = tokens.positions
        merge_index[place, :size] = np.where(is_image, tokens.feature_rank + features, -1)
        row_lengths[place] = size
        targets.add(tokens, first=place * length, sample=number)
        features += int(is_image.sum())
        number += sum(map(len, row))
    arrays = {
        "input_ids": ids, "position_ids": positions, "segment_ids": (trees > 0).astype(np.int32),
        "tree_ids": trees.astype(np.int32), "branch_ids": branches.astype(np.int32),
        "row_lengths": row_lengths, "merge_index": merge_index,
    }  # fmt: skip
    return arrays, targets


def blank_batches(shape: BatchShape, image_size: int) -> Iterator[Batch]:
    """Batches without a sample, the longest first, in which nothing is trained.

    One of every length, with images and without, each with the most trained positions; then one of
    every smaller number of those, at the shortest length. The head works on positions alone, so
    that other pairs are no new shapes for any part of a model. Several images a row are shapes of
    their own and not among these.
    """
    if shape.image_slots:  # of static_shape: with and without images alike
        yield collate([], shape, image_size)
        return
    *fewer, most = shape.target_sizes or (shape.predict_chunk,)
    whole = replace(shape, target_sizes=(most,))
    for length in reversed(shape.buckets):
        one = replace(whole, buckets=(length,))
        yield collate([], one, image_size, with_images=True)
    for length in reversed(shape.text_buckets or shape.buckets):
        one = replace(whole, text_buckets=(length,))
        yield collate([], one, image_size)
    for size in reversed(fewer):
        yield collate([], replace(shape, target_sizes=(size,)), image_size, with_images=True)


def _check_counts(
    rows: Sequence[Row], samples: Sequence[Sample], shape: BatchShape, slots: int
) -> None:
    if len(rows) > slots:
        raise DataError(
            f"batch: {len(rows)} samples from {samples[0].sample_id} on for {slots} rows; "
            "expected no more than rows"
        )
    if len(samples) > len(rows) and not shape.has_trees:
        raise DataError(
            f"batch: {len(samples)} samples from {samples[0].sample_id} on in {len(rows)} rows; "
            "expected one a row, or a BatchShape that has_trees"
        )


def _length(
    rows: Sequence[Row], laid_out: Sequence[RowTokens], shape: BatchShape, has_images: bool
) -> int:
    lengths = [len(tokens.ids) for tokens in laid_out] or [0]
    longest = max(lengths)
    length = shape.length_of(longest, has_images=has_images)
    if length is None:
        most = (shape.buckets if has_images else shape.text_buckets or shape.buckets)[-1]
        name = rows[lengths.index(longest)][0][0].sample_id
        raise DataError(
            f"{name}: {longest} tokens; the longest bucket has {most}; lower max_length"
        )
    return length


class _Targets:
    """Trained positions of a batch, row after row."""

    def __init__(self) -> None:
        self.positions: list[NDArray[np.int64]] = []
        self.ids: list[NDArray[np.int64]] = []
        self.samples: list[NDArray[np.int64]] = []

    def add(self, tokens: RowTokens, *, first: int, sample: int) -> None:
        """Add a row's.

        Args:
            tokens: The row.
            first: Flattened position of its first token.
            sample: Place of its first sample.
        """
        self.positions.append(tokens.predict_positions + first)
        self.ids.append(tokens.targets)
        self.samples.append(tokens.target_samples + sample)

    @property
    def count(self) -> int:
        """Trained positions so far."""
        return sum(map(len, self.ids))

    @staticmethod
    def padded(arrays: list[NDArray[np.int64]], size: int, rest: int) -> NDArray[np.int64]:
        """One of the three lists joined, int64 [size]."""
        joined = np.concatenate([np.zeros(0, np.int64), *arrays])
        return np.concatenate([joined, np.full(size - len(joined), rest, np.int64)])


def _images(
    samples: Sequence[Sample], tokens: int, size: int, padded: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of samples that have some, of so many tokens each, then blank ones."""
    for sample in samples:
        if sample.pixels.shape[1:] != (size, size, 3):
            raise DataError(
                f"{sample.sample_id}: images of {sample.pixels.shape[1:]}; expected "
                f"{(size, size, 3)}; open the dataset with the tower's view"
            )
    count = sum(len(sample.pixels) for sample in samples)
    pixels = np.zeros((padded, size, size, 3), np.uint8)
    if count:
        np.concatenate([sample.pixels for sample in samples], out=pixels[:count])
    image_tokens = np.zeros(padded, np.int64)
    image_tokens[:count] = tokens
    return pixels, image_tokens
