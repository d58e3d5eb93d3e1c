"""Validate Arrow files from other machines once, when they are opened.

Arrow trusts the offsets of a file that it maps: wild ones end the process. Columns of the right
types, with offsets and numbers that stay inside what they point to, cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.record import excerpt
from lapilli.data.shards.files import open_table
from lapilli.data.shards.manifest import Manifest
from lapilli.data.shards.schemas import HELD_OUT, SELECTION_SCHEMA, TOKEN_SCHEMA, TRAIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["only_chunk", "open_selection", "open_tokens"]

AT_ONCE = 1 << 16  # rows
MOST_REPEATS = 1000  # of a record in an epoch, on average: what bounds an epoch's arrays


def only_chunk(table: pa.Table, name: str) -> Any:
    """A column of a file of one record batch, as one array."""
    return table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)


def open_selection(
    output: Output, manifest: Manifest, view: str = "", columns: Sequence[str] | None = None
) -> pa.Table:
    """A dataset's selection: every place in it is there.

    Args:
        output: The dataset, or the folder its files are copied to.
        manifest: Its facts.
        view: The view whose image slots are looked up; empty looks up none.
        columns: Those to open and to check; None opens all.

    Raises:
        DataError: As `open_table`, or a place out of range.
    """
    table = open_table(output, manifest.selection, SELECTION_SCHEMA, columns)
    if problem := _selection_problem(table, manifest, view):
        raise _damaged(output / manifest.selection.path, problem)
    return table


def open_tokens(output: Output, facts: ShardFacts, vocab_size: int, image_token: int) -> pa.Table:
    """A token shard: every id is one of the tokenizer's, every trained span lies in its row.

    Args:
        output: The dataset, or the folder its files are copied to.
        facts: The shard's.
        vocab_size: Ids of the tokenizer.
        image_token: The placeholder of images.

    Raises:
        DataError: As `open_table`, or ids and spans that cannot be.
    """
    table = open_table(output, facts, TOKEN_SCHEMA)
    if problem := _tokens_problem(table, vocab_size, image_token):
        raise _damaged(output / facts.path, problem)
    return table


def _damaged(path: object, problem: str) -> DataError:
    return DataError(
        f"{path}: damaged ({excerpt(problem)}); run preprocess again into another --output, or "
        "get the dataset again"
    )


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return only_chunk(table, name).to_numpy().astype(np.int64)


def _selection_problem(table: pa.Table, manifest: Manifest, view: str) -> str:
    """What is wrong with the columns that are there; empty for nothing."""
    tokens = _rows(manifest.tokens)
    images = _rows(manifest.views[view].shards) if view else tokens
    per_shard = manifest.views[view].images_per_shard if view else 0
    samples = 0
    for first in range(0, len(table), AT_ONCE):
        piece = table.slice(first, AT_ONCE)
        if problem := _piece_problem(piece, tokens, images, per_shard):
            return problem
        if "repeats" in table.column_names:
            samples += int(_numbers(piece, "repeats").sum())
    if samples > MOST_REPEATS * len(table):
        return f"an epoch of {samples:,} samples from {len(table):,} records"
    return ""


def _piece_problem(
    piece: pa.Table, tokens: NDArray[np.int64], images: NDArray[np.int64], per_shard: int
) -> str:
    """Of some rows; token and image shards by their rows, the latter with 0 `per_shard` unseen."""
    names = {*piece.column_names}
    if {"token_shard", "token_row"} <= names:
        shard, row = _numbers(piece, "token_shard"), _numbers(piece, "token_row")
        if problem := _outside("token_shard", "token_row", shard, row, tokens):
            return problem
    for name in ("text_length", "num_trained", "llava_length", "repeats"):
        if name in names and len(values := _numbers(piece, name)) and values.min() < 0:
            return f"{name} {values.min()}; expected 0 or more"
    if "split" in names:
        splits = {*pc.call_function("unique", [only_chunk(piece, "split")]).to_pylist()}
        if strange := sorted(splits - {TRAIN, HELD_OUT}):
            return f"split {strange[0]!r}; expected {TRAIN} or {HELD_OUT}"
    if not per_shard or "image_slots" not in names:
        return ""
    slots = only_chunk(piece, "image_slots").flatten().to_numpy().astype(np.int64)
    if len(slots) and slots.min() < 0:
        return f"image slot {slots.min()}"
    number, place = np.divmod(slots, per_shard)
    return _outside("image shard", "row", number, place, images)


def _rows(shards: Sequence[ShardFacts]) -> NDArray[np.int64]:
    return np.array([facts.rows for facts in shards], np.int64)


def _outside(
    shard_name: str, row_name: str, shard: NDArray[np.int64], row: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> str:  # fmt: skip
    """The first place that is not in any shard, of so many rows each; empty where all are."""
    there = (shard >= 0) & (shard < len(rows)) & (row >= 0)
    there[there] = row[there] < rows[shard[there]]
    if there.all():
        return ""
    first = int(np.argmin(there))
    return f"{shard_name} {shard[first]}, {row_name} {row[first]}: there is no such row"


def _tokens_problem(table: pa.Table, vocab_size: int, image_token: int) -> str:
    ids, spans = only_chunk(table, "input_ids"), only_chunk(table, "label_spans")
    values = ids.flatten().to_numpy()
    is_image = values == image_token
    wrong = ~is_image & ((values < 0) | (values >= vocab_size))
    if wrong.any():
        return f"token id {values[np.argmax(wrong)]} of a tokenizer with {vocab_size} ids"
    starts_of_rows = np.concatenate([[0], np.cumsum(ids.value_lengths().to_numpy())])
    counts = spans.value_lengths().to_numpy()
    if (counts % 2).any():
        return "a trained span without an end"
    rows = np.repeat(np.arange(len(table)), counts // 2)
    starts, ends = spans.flatten().to_numpy().astype(np.int64).reshape(-1, 2).T
    lengths = np.diff(starts_of_rows)[rows]
    follows = np.zeros(len(rows), np.int64)
    follows[1:] = np.where(rows[1:] == rows[:-1], ends[:-1], 0)
    bad = (starts < follows) | (ends <= starts) | (ends > lengths)
    if not bad.any():
        images = np.concatenate([[0], np.cumsum(is_image)])
        first = starts_of_rows[rows]
        bad = images[first + ends] != images[first + starts]
    if bad.any():
        at = int(np.argmax(bad))
        return f"row {rows[at]}: a trained span {starts[at]} to {ends[at]} of {lengths[at]} ids"
    trained = np.bincount(rows, ends - starts, len(table))
    if (trained != _numbers(table, "num_trained")).any():
        return "num_trained is not the trained spans' length"
    return ""
