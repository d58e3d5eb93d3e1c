"""A dataset opened for one tower: memory-mapped, with lengths, modality and random access."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lapilli.data.encoding import ORIGINAL, decode_pixels
from lapilli.data.errors import DataError
from lapilli.data.manifest import Manifest, ViewFacts, read_manifest
from lapilli.data.mixture import HELD_OUT, TRAIN
from lapilli.data.shards import ShardFacts, open_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Dataset", "Sample", "open_dataset"]


@dataclass(frozen=True)
class Sample:
    """One record ready for the collator.

    Attributes:
        sample_id: Unique name.
        input_ids: int32 [n], -200 at an image's place.
        label_spans: int32 [m, 2], start and end of the trained ids.
        pixels: uint8 [images, size, size, 3], read-only; where there is one image it lies in the
            memory map itself.
    """

    sample_id: str
    input_ids: NDArray[np.int32]
    label_spans: NDArray[np.int32]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Dataset:
    """The kept records of a dataset as one view and one number of tokens an image see them.

    Attributes:
        path: The dataset's folder.
        manifest: Its facts.
        view: Name of the view.
        image_tokens: Tokens an image takes in the sequence.
        rows: Rows of the selection that fit, as often as the mixture says; sample i is row
            `rows[i]`.
        lengths: int64 [len], tokens of a sample with its images' tokens.
        num_trained: int64 [len], tokens that the loss counts.
        num_images: int64 [len].
        too_long: Samples left out because they exceed the length asked for.
    """

    path: Path
    manifest: Manifest
    view: str
    image_tokens: int
    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_trained: NDArray[np.int64]
    num_images: NDArray[np.int64]
    too_long: int

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    @property
    def has_images(self) -> NDArray[np.bool_]:
        """Bool [len]: the modality of each sample."""
        return self.num_images > 0

    @property
    def image_size(self) -> int:
        """Side of the view's squares, in pixels."""
        return int(self.facts.spec["size"])

    @property
    def facts(self) -> ViewFacts:
        """The view's facts."""
        return self.manifest.views[self.view]

    @cached_property
    def _selection(self) -> pa.Table:
        return open_table(self.path, self.manifest.selection)

    @cached_property
    def _tables(self) -> dict[str, pa.Table]:
        return {}

    @cached_property
    def _binaries(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        return {}

    def _table(self, shard: ShardFacts) -> pa.Table:
        if shard.path not in self._tables:
            self._tables[shard.path] = open_table(self.path, shard)
        return self._tables[shard.path]

    def token_row(self, index: int) -> dict[str, Any]:
        """The token row of sample `index`, as Python values."""
        table, row = self._locate(index)
        return table.slice(row, 1).to_pylist()[0]

    def _locate(self, index: int) -> tuple[pa.Table, int]:
        """The token table of a sample and its row there."""
        selected = int(self.rows[index])
        shard = self._selection["token_shard"][selected].as_py()
        row = self._selection["token_row"][selected].as_py()
        return self._table(self.manifest.tokens[shard]), row

    def sample(self, index: int) -> Sample:
        """Read one sample; pages come from the disk as they are touched."""
        table, row = self._locate(index)
        slots = self._selection["image_slots"][int(self.rows[index])].as_py()
        images = [self._pixels(slot) for slot in slots]
        side = self.image_size
        return Sample(
            table["sample_id"][row].as_py(),
            _numbers(table["input_ids"], row),
            _numbers(table["label_spans"], row).reshape(-1, 2),
            _stack(images, side),
        )

    def _pixels(self, slot: int) -> NDArray[np.uint8]:
        """One image as a view into the memory map: uint8 [size, size, 3]."""
        number, row = divmod(slot, self.facts.images_per_shard)
        offsets, values = self._binary(self.facts.shards[number])
        pixels = values[offsets[row] : offsets[row + 1]]
        if self.facts.encoding["kind"] != "raw":
            return decode_pixels(pixels, self.facts.encoding["kind"])
        return pixels.reshape(self.image_size, self.image_size, 3)

    def _binary(self, shard: ShardFacts) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Offsets and bytes of a shard's pixels. Through a pyarrow scalar they would be copied."""
        if shard.path not in self._binaries:
            (column,) = self._table(shard)["pixels"].chunks
            _, offsets, values = column.buffers()
            self._binaries[shard.path] = (
                np.frombuffer(offsets, np.int64),
                np.frombuffer(values, np.uint8),
            )
        return self._binaries[shard.path]


def _stack(images: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
    """uint8 [images, side, side, 3]; one image alone is not copied."""
    if len(images) == 1:
        return images[0][np.newaxis]
    return np.stack(images) if images else np.empty((0, side, side, 3), np.uint8)


def _numbers(column: pa.ChunkedArray, row: int) -> NDArray[np.int32]:
    return column[row].values.to_numpy()


def open_dataset(
    path: str | Path,
    *,
    view: str,
    image_tokens: int,
    max_length: int | None = None,
    split: str = TRAIN,
) -> Dataset:
    """Open a dataset for a tower.

    Args:
        path: The dataset's folder.
        view: Name of the view the tower reads.
        image_tokens: Tokens an image takes in the sequence, e.g. 576 for CLIP-L/14 at 336 px.
        max_length: Longest sequence, in tokens; a longer sample is left out and counted.
        split: `train` or `held_out`.

    Raises:
        DataError: No dataset, no such view or split, nothing short enough, or a file that is
            missing or cut.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if view not in manifest.views:
        raise DataError(
            f"view: {view!r} is not in {path}; expected one of {', '.join(manifest.views)}, or "
            "preprocess with that view"
        )
    if manifest.views[view].encoding["kind"] == ORIGINAL:
        raise DataError(
            f"view: {view!r} of {path} holds the images' files and no pixels; open another view, "
            "or add one with preprocess --amend"
        )
    if image_tokens < 1:
        raise DataError(f"image_tokens: {image_tokens}; expected at least 1 token an image")
    _check_sizes(path, manifest, view)
    table = open_table(path, manifest.selection)
    slots = table["image_slots"].combine_chunks()
    images = np.diff(slots.offsets.to_numpy())
    lengths = _column(table, "text_length") + images * image_tokens
    rows = _rows_of(table, split, path)
    fits = lengths[rows] <= (np.iinfo(np.int64).max if max_length is None else max_length)
    if not fits.any():
        raise DataError(
            f"max_length: {max_length} tokens; the shortest of {len(rows)} samples in {path} "
            f"has {lengths[rows].min()}; raise it"
        )
    kept = rows[fits]
    return Dataset(
        path, manifest, view, image_tokens,
        rows=kept,
        lengths=lengths[kept],
        num_trained=_column(table, "num_trained")[kept],
        num_images=images[kept].astype(np.int64),
        too_long=int((~fits).sum()),
    )  # fmt: skip


def _rows_of(table: pa.Table, split: str, path: Path) -> NDArray[np.int64]:
    """The rows of an epoch of a split, in the order of the selection."""
    if split not in (TRAIN, HELD_OUT):
        raise DataError(f"split: {split!r}; expected {TRAIN} or {HELD_OUT}")
    chosen = table["split"].to_numpy() == split
    if not chosen.any():
        raise DataError(
            f"split: {path} holds nothing out; set `mixture.held_out` and preprocess again"
        )
    return np.repeat(np.arange(len(table)), np.where(chosen, _column(table, "repeats"), 0))


def _column(table: pa.Table, name: str) -> NDArray[np.int64]:
    return table[name].to_numpy().astype(np.int64)


def _check_sizes(path: Path, manifest: Manifest, view: str) -> None:
    """Notice a missing or cut shard now and not at step 9,000."""
    for shard in [*manifest.tokens, *manifest.views[view].shards]:
        file = path / shard.path
        if not file.exists() or file.stat().st_size != shard.bytes:
            raise DataError(
                f"{file}: missing or cut short; run the same preprocess again, it rebuilds it"
            )
