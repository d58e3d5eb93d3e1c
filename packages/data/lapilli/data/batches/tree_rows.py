"""Lay samples out in rows: trees of samples that share their beginning, one behind another.

A tree is its samples' common prefix, up to and including the last image, and a branch for what
follows in each. With one sample a tree it is a packed row, and with one tree a row too, the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lapilli.data.dataset.dataset import Sample
from lapilli.data.errors import DataError
from lapilli.data.text.encode import IMAGE_TOKEN_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Row", "RowTokens", "lay_out"]

Row = Sequence[Sequence[Sample]]  # trees of a row, each of the samples that share it


@dataclass(frozen=True)
class RowTokens:
    """The tokens of one row, n in all.

    Attributes:
        ids: int64 [n]; an image's placeholder at each of its tokens.
        positions: int64 [n], each sample's own; branches go on from their prefix.
        tree_ids: int32 [n], from 1.
        branch_ids: int32 [n]; 0 for a prefix, from 1 for what follows.
        feature_rank: int64 [n]; the feature row among the row's own, -1 for text.
        predict_positions: int64 [t], places in the row whose next token is trained; a prefix's last
            place once for each branch whose first token is.
        targets: int64 [t], that token.
        target_samples: int64 [t], the sample of the row that it belongs to.
        images: The samples whose images the row carries: the first of each tree.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    tree_ids: NDArray[np.int32]
    branch_ids: NDArray[np.int32]
    feature_rank: NDArray[np.int64]
    predict_positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    target_samples: NDArray[np.int64]
    images: tuple[Sample, ...]


@dataclass(frozen=True)
class _Expanded:
    """A sample with a token for each of its images' feature rows.

    Attributes:
        ids: int64 [n].
        is_image: bool [n].
        trained: int64 [t], places of trained ids. The first id has nothing before it that could
            predict it, so it is never among them.
        prefix: Tokens up to and including the last image; 0 for text alone.
    """

    ids: NDArray[np.int64]
    is_image: NDArray[np.bool_]
    trained: NDArray[np.int64]
    prefix: int


def lay_out(row: Row, image_tokens: int) -> RowTokens:
    """Join a row's trees.

    Args:
        row: Its trees, each of samples with the same images and the same ids up to the last.
        image_tokens: Tokens an image takes.

    Raises:
        DataError: Placeholders and images of a sample differ in number, or samples of one tree do
            not begin alike; names the sample.
    """
    parts: dict[str, list[NDArray[np.integer]]] = {name: [] for name in PARTS}
    size = number = features = 0
    for tree_id, tree in enumerate(row, start=1):
        expanded = [_expand(sample, image_tokens) for sample in tree]
        first = expanded[0]
        prefix = first.prefix
        _check_alike(tree, expanded)
        begins = size
        for branch_id, one in enumerate(expanded, start=1):
            kept = 0 if branch_id == 1 else prefix  # the prefix stands once
            shift = size - kept  # of the branch's tokens, from the sample to the row
            is_image = one.is_image[kept:]
            rank = np.cumsum(is_image) - 1 + features
            predicting = one.trained - 1
            parts["ids"].append(one.ids[kept:])
            parts["positions"].append(np.arange(kept, len(one.ids)))
            parts["tree_ids"].append(np.full(len(one.ids) - kept, tree_id))
            parts["branch_ids"].append(
                np.where(np.arange(kept, len(one.ids)) < prefix, 0, branch_id)
            )
            parts["feature_rank"].append(np.where(is_image, rank, -1))
            parts["predict_positions"].append(
                np.where(predicting < prefix, predicting + begins, predicting + shift)
            )
            parts["targets"].append(one.ids[one.trained])
            parts["target_samples"].append(np.full(len(one.trained), number))
            size += len(one.ids) - kept
            number += 1
        features += len(tree[0].pixels) * image_tokens
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return RowTokens(
        ids=joined["ids"].astype(np.int64),
        positions=joined["positions"].astype(np.int64),
        tree_ids=joined["tree_ids"].astype(np.int32),
        branch_ids=joined["branch_ids"].astype(np.int32),
        feature_rank=joined["feature_rank"].astype(np.int64),
        predict_positions=joined["predict_positions"].astype(np.int64),
        targets=joined["targets"].astype(np.int64),
        target_samples=joined["target_samples"].astype(np.int64),
        images=tuple(tree[0] for tree in row),
    )


PARTS = (
    "ids", "positions", "tree_ids", "branch_ids", "feature_rank", "predict_positions", "targets",
    "target_samples",
)  # fmt: skip


def _expand(sample: Sample, image_tokens: int) -> _Expanded:
    """Give every placeholder its image's tokens."""
    is_image = sample.input_ids == IMAGE_TOKEN_INDEX
    if int(is_image.sum()) != len(sample.pixels):
        raise DataError(
            f"{sample.sample_id}: {int(is_image.sum())} image places for {len(sample.pixels)} "
            "images; expected one each; preprocess again"
        )
    repeats = np.where(is_image, image_tokens, 1)
    slots = np.repeat(is_image, repeats)
    is_trained = np.zeros(len(sample.input_ids), np.bool_)
    for start, end in sample.label_spans:
        is_trained[start:end] = True
    trained = np.flatnonzero(np.repeat(is_trained, repeats) & ~slots)
    places = np.flatnonzero(slots)
    return _Expanded(
        ids=np.repeat(sample.input_ids.astype(np.int64), repeats),
        is_image=slots,
        trained=trained[trained > 0],
        prefix=int(places[-1]) + 1 if places.size else 0,
    )


def _check_alike(tree: Sequence[Sample], expanded: Sequence[_Expanded]) -> None:
    """Refuse a tree whose samples do not begin alike, or train what they share."""
    first = expanded[0]
    for sample, one in zip(tree[1:], expanded[1:], strict=True):
        is_alike = one.prefix == first.prefix and np.array_equal(
            one.ids[: one.prefix], first.ids[: first.prefix]
        )
        if not is_alike or not first.prefix:
            raise DataError(
                f"{sample.sample_id}: begins otherwise than {tree[0].sample_id}, with which it "
                "shares a row; expected the same ids up to the last image; plan the epoch anew"
            )
    if len(tree) > 1 and any((one.trained < first.prefix).any() for one in expanded):
        raise DataError(
            f"{tree[0].sample_id}: trains tokens before its last image, which it shares with "
            f"{tree[1].sample_id}; expected none; plan the epoch anew"
        )
