"""Open a dataset for one view: memory-mapped shards, lengths, modality, random access."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lapilli.data.dataset.columns import Columns, check_columns, columns_of
from lapilli.data.dataset.shard_cache import Mirror, open_mirror
from lapilli.data.dataset.tokenizer_copy import TOKENIZER, check_copy_files, open_copy
from lapilli.data.errors import DataError
from lapilli.data.images.encodings import ORIGINAL, decode_pixels
from lapilli.data.io.access import cannot_read, is_denied
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.local_copy import cache_root
from lapilli.data.shards.checks import only_chunk, open_selection, open_tokens
from lapilli.data.shards.files import open_table
from lapilli.data.shards.manifest import Manifest, ViewFacts, read_manifest
from lapilli.data.shards.schemas import HELD_OUT, IMAGE_SCHEMA, TRAIN
from lapilli.data.text.templates import Template

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Column: TypeAlias = tuple[NDArray[Any], NDArray[Any]]  # offsets [rows + 1], values

__all__ = [
    "MOST_MAPS", "Dataset", "Sample", "binary_column", "check_sizes", "held_files", "open_dataset",
]  # fmt: skip

# Linux lets a process map 65,530 areas (vm.max_map_count); 665K images at 336 px are 4,300 shards
# of 64 MB. A map that is forgotten is made again in 0.2 ms.
MOST_MAPS = 30_000
AT_ONCE = 1 << 16  # rows of the selection that are worked on at once
COLUMNS = 1  # of the files that columns lie in: raised where they come to hold something else


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
    """The kept records of a dataset, opened for one view and one number of tokens per image.

    Attributes:
        path: The dataset's folder.
        manifest: Its facts.
        view: Name of the view.
        image_tokens: Tokens an image takes in the sequence.
        rows: Row of the selection for each sample, repeated as the mixture says; sample i is row
            `rows[i]`.
        lengths: int64 [len], tokens of a sample with its images' tokens.
        num_trained: int64 [len], tokens that the loss counts.
        num_images: int64 [len].
        too_long: Samples left out because they exceed the length asked for.
        cut_at: Most tokens of a sample, images' tokens included; the rest of its text is cut off.
            0 cuts nothing.
        num_cut: Samples that are cut.
        mirror: Cache of a remote dataset; None for a local one.
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
    cut_at: int = 0
    num_cut: int = 0
    mirror: Mirror | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: another process maps the shards itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, counted from the end where it is negative; as `sample`.

        Raises:
            IndexError: There is none, which ends a `for` loop over the dataset.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a dataset with {len(self)} samples")
        return self.sample(index % len(self))

    @property
    def has_images(self) -> NDArray[np.bool_]:
        """Bool [len]: the modality of each sample."""
        return self.num_images > 0

    @cached_property
    def llava_lengths(self) -> NDArray[np.int64]:
        """int64 [len], words as LLaVA's sampler counts them."""
        return _column(self._selected(("llava_length",)), "llava_length")[self.rows]

    @property
    def image_size(self) -> int:
        """Side of the view's squares, in pixels."""
        return int(self.facts.spec["size"])

    @property
    def facts(self) -> ViewFacts:
        """The view's facts."""
        return self.manifest.views[self.view]

    def _selected(self, columns: Sequence[str]) -> pa.Table:
        return _selection(self.path, self.manifest, self.view, self.mirror, columns)

    @cached_property
    def places(self) -> tuple[NDArray[np.int32], NDArray[np.int32], Column]:
        """Token shard, token row and image slots of each row of the selection."""
        table = self._selected(("token_shard", "token_row", "image_slots"))
        shard, row = (only_chunk(table, name).to_numpy() for name in ("token_shard", "token_row"))
        return shard, row, _lists(table, "image_slots")

    @cached_property
    def _token_tables(self) -> Callable[[int], pa.Table]:
        return lru_cache(MOST_MAPS)(self._open_tokens)

    @cached_property
    def token_columns(self) -> Callable[[int], tuple[Column, Column, Column]]:
        """Ids, token ids and trained spans of a token shard: offsets and values, in place."""
        return lru_cache(MOST_MAPS)(self._map_tokens)

    @cached_property
    def _pixel_columns(self) -> Callable[[int], Column]:
        return lru_cache(MOST_MAPS)(self._map_pixels)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer (transformers') that the ids were made with, from the dataset's own copy.

        Raises:
            DataError: The copy is gone, cannot be read, or is another tokenizer.
        """
        folder = self.path / TOKENIZER
        if self.mirror is not None:
            for facts in self.manifest.tokenizer_files:
                with self.mirror.held(facts):
                    pass
        return open_copy(folder, self.manifest.tokenizer)

    @cached_property
    def template(self) -> Template:
        """The template that the records were written with.

        Raises:
            DataError: The manifest does not hold it, or not as it was.
        """
        return self.manifest.bound_template(self.path)

    def _open_tokens(self, number: int) -> pa.Table:
        facts = self.manifest.tokens[number]
        vocab_size, image = self.manifest.tokenizer["vocab_size"], self.manifest.image_token
        with held_files(self.path, self.mirror, facts) as folder:
            return open_tokens(folder, facts, vocab_size, image)

    def _map_tokens(self, number: int) -> tuple[Column, Column, Column]:
        table = self._token_tables(number)
        return (
            binary_column(table, "sample_id"),
            _lists(table, "input_ids"),
            _lists(table, "label_spans"),
        )

    def _map_pixels(self, number: int) -> Column:
        """Offsets and bytes of a shard's pixels. Through a pyarrow scalar they would be copied."""
        facts = self.facts.shards[number]
        with held_files(self.path, self.mirror, facts) as folder:
            return binary_column(open_table(folder, facts, IMAGE_SCHEMA), "pixels")

    def sample_id(self, index: int) -> str:
        """The id of sample `index` alone: `source/record`."""
        shards, rows, _ = self.places
        selected = int(self.rows[index])
        names, _, _ = self.token_columns(int(shards[selected]))
        return _at(names, int(rows[selected])).tobytes().decode()

    def token_row(self, index: int) -> dict[str, Any]:
        """The token row of sample `index`, as Python values."""
        shards, rows, _ = self.places
        selected = self.rows[index]
        table = self._token_tables(int(shards[selected]))
        return table.slice(int(rows[selected]), 1).to_pylist()[0]

    def sample(self, index: int) -> Sample:
        """Read one sample; pages come from the disk as they are touched."""
        shards, rows, slots = self.places
        selected = int(self.rows[index])
        row = int(rows[selected])
        names, input_ids, label_spans = self.token_columns(int(shards[selected]))
        images = [self._pixels(slot) for slot in _at(slots, selected).tolist()]
        ids, spans = _at(input_ids, row), _at(label_spans, row).reshape(-1, 2)
        self._check_length(index, ids, len(images))
        if self.cut_at:
            kept = max(0, self.cut_at - len(images) * (self.image_tokens - 1))
            ids, spans = ids[:kept], _clipped(spans, kept)
        return Sample(
            _at(names, row).tobytes().decode(), ids, spans, _stack(images, self.image_size)
        )

    def token_shard(self, index: int) -> int:
        """The number of the token shard of sample `index`."""
        shards, _, _ = self.places
        return int(shards[self.rows[index]])

    def forget_maps(self) -> None:
        """Let go of shards mapped so far, whose room on the disk they hold; they are mapped again.

        Samples read before stay as they are.
        """
        for name in ("_token_tables", "token_columns", "_pixel_columns"):
            self.__dict__.pop(name, None)

    def image_slots(self, index: int) -> NDArray[np.int32]:
        """int32 [images], the slots of sample `index`'s images."""
        _, _, slots = self.places
        return _at(slots, int(self.rows[index]))

    def _check_length(self, index: int, ids: NDArray[np.int32], images: int) -> None:
        """The row is as long as the selection says: batches are shaped by that."""
        length = len(ids) + images * (self.image_tokens - 1)
        said = int(self.lengths[index])
        is_cut = self.cut_at and length > self.cut_at
        marks = int(np.count_nonzero(ids < 0))
        if said != (self.cut_at if is_cut else length) or marks != images:
            raise DataError(
                f"{self.path}: sample {index} has {len(ids)} ids with {marks} images' places, its "
                f"selection says {said} tokens with {images} images; preprocess again into "
                "another --output, or get the dataset again"
            )

    def cut(self, piece: Columns, most: int) -> Columns:
        """The samples of a piece, each of at most `most` tokens with its images' tokens.

        Text behind the limit is cut off, as LLaVA's model does it once an image's rows are in. A
        sample whose image would be cut is left out and counted in `too_long`.
        """
        shards, places, _ = self.places
        num_trained, fits = piece.num_trained.copy(), np.ones(len(piece.rows), np.bool_)
        long = np.flatnonzero(piece.lengths > most)
        for index in long:
            selected = int(piece.rows[index])
            _, input_ids, label_spans = self.token_columns(int(shards[selected]))
            ids = _at(input_ids, int(places[selected]))
            kept = len(ids) - int(piece.lengths[index]) + most
            fits[index] = kept > np.flatnonzero(ids < 0).max(initial=0)
            spans = _clipped(_at(label_spans, int(places[selected])).reshape(-1, 2), kept)
            num_trained[index] = (spans[:, 1] - spans[:, 0]).sum()
        lengths = np.minimum(piece.lengths, most)
        return replace(piece, lengths=lengths, num_trained=num_trained).only(fits, long)

    def _pixels(self, slot: int) -> NDArray[np.uint8]:
        """One image as a view into the memory map: uint8 [size, size, 3]."""
        number, row = divmod(slot, self.facts.images_per_shard)
        pixels, side = _at(self._pixel_columns(number), row), self.image_size
        if self.facts.encoding["kind"] != "raw":
            return decode_pixels(pixels, self.facts.encoding["kind"], side)
        if len(pixels) != side * side * 3:
            raise DataError(
                f"{self.path / self.facts.shards[number].path}: row {row} has {len(pixels)} bytes "
                f"and no image of {side} px; run preprocess again, it rebuilds it"
            )
        return pixels.reshape(side, side, 3)


def _at(column: Column, row: int) -> NDArray[Any]:
    offsets, values = column
    return values[offsets[row] : offsets[row + 1]]


def _clipped(spans: NDArray[np.int32], end: int) -> NDArray[np.int32]:
    """Trained spans [m, 2] before `end`."""
    return np.minimum(spans, np.int32(end))[spans[:, 0] < end]


def _lists(table: pa.Table, name: str) -> Column:
    """A column of lists, in place."""
    column = only_chunk(table, name)
    return column.offsets.to_numpy(), column.values.to_numpy()


def binary_column(table: pa.Table, name: str) -> Column:
    """A column of strings or bytes, in place."""
    column = only_chunk(table, name)
    _, offsets, values = column.buffers()
    width = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    return np.frombuffer(offsets, width), np.frombuffer(values or b"", np.uint8)


def _stack(images: list[NDArray[np.uint8]], side: int) -> NDArray[np.uint8]:
    """uint8 [images, side, side, 3]; one image alone is not copied."""
    if len(images) == 1:
        return images[0][np.newaxis]
    return np.stack(images) if images else np.empty((0, side, side, 3), np.uint8)


def open_dataset(
    path: str | Path,
    *,
    view: str,
    image_tokens: int,
    max_length: int | None = None,
    truncate: bool = False,
    split: str = TRAIN,
    cache: str | Path | None = None,
    cache_limit: str | int | None = None,
) -> Dataset:
    """Open a dataset for a tower.

    Args:
        path: The dataset's folder, or its address: `s3://`, `gs://` or any that fsspec knows.
        view: Name of the view the tower reads.
        image_tokens: Tokens an image takes in the sequence, e.g. 576 for CLIP-L/14 at 336 px.
        max_length: Longest sequence, in tokens; a longer sample is left out and counted.
        truncate: Cut a longer sample's text instead; one whose image would be cut is left out.
        split: `train` or `held_out`.
        cache: Folder of this node that an address's shards are copied to when they are first
            read, shared by its processes; left out, `$LAPILLI_CACHE`, else `~/.cache/lapilli`.
        cache_limit: Most bytes of all datasets in it, a number or text like `500GB`; what was
            read longest ago makes room. Left out, `$LAPILLI_CACHE_LIMIT`, else none.

    Raises:
        DataError: No dataset, no such view or split, nothing short enough, or a file that is
            missing or cut.
    """
    mirror = open_mirror(str(path), cache, cache_limit) if is_remote(str(path)) else None
    path = mirror.folder if mirror else Path(path)
    manifest = read_manifest(path)
    _check_view(path, manifest, view)
    if image_tokens < 1:
        raise DataError(f"image_tokens: {image_tokens}; expected at least 1 token an image")
    _check_files(path, manifest, view, mirror)
    if split not in (TRAIN, HELD_OUT):
        raise DataError(f"split: {split!r}; expected {TRAIN} or {HELD_OUT}")
    none = np.zeros(0, np.int64)
    bare = Dataset(
        path=path, manifest=manifest, view=view, image_tokens=image_tokens,
        rows=none, lengths=none, num_trained=none, num_images=none, too_long=0,
        cut_at=max_length or 0 if truncate else 0,
        mirror=mirror,
    )  # fmt: skip
    folder = (mirror.folder if mirror else cache_root(cache)) / "columns"
    found = columns_of(
        lambda: _pieces(bare, split, max_length), manifest.selection.rows, folder,
        (COLUMNS, _version(bare), view, image_tokens, max_length, truncate, split),
    )  # fmt: skip
    check_columns(path, found, split, max_length, truncate=truncate)
    return replace(
        bare,
        rows=found.rows,
        lengths=found.lengths,
        num_trained=found.num_trained,
        num_images=found.num_images,
        too_long=found.too_long,
        num_cut=found.num_cut,
    )


def _version(dataset: Dataset) -> object:
    """What tells the selection, and what it points into, from another at the same place."""
    facts, view = dataset.manifest.selection, dataset.facts
    shards = (dataset.manifest.tokens, view.shards)
    sizes = [(len(of), sum(one.rows for one in of)) for of in shards]
    stamp = None
    if dataset.mirror is None:  # a copy is compared with its SHA-256 as it comes
        stat = (dataset.path / facts.path).stat()
        stamp = stat.st_size, stat.st_mtime_ns
    return facts.sha256, facts.rows, view.images_per_shard, sizes, stamp


def _pieces(dataset: Dataset, split: str, max_length: int | None) -> Iterator[Columns]:
    """The columns of an epoch of a split, in the order of the selection, a piece at a time."""
    table = _selection(dataset.path, dataset.manifest, dataset.view, dataset.mirror)
    offsets = _lists(table, "image_slots")[0]
    for first in range(0, len(table), AT_ONCE):
        piece = table.slice(first, AT_ONCE)
        chosen = pc.call_function("equal", [only_chunk(piece, "split"), pa.scalar(split)])
        times = chosen.cast(pa.int8()).to_numpy() * _column(piece, "repeats")
        images = np.diff(offsets[first : first + len(piece) + 1]).astype(np.int64)
        lengths = _column(piece, "text_length") + images * dataset.image_tokens
        columns = Columns(
            rows=np.repeat(np.arange(first, first + len(piece)), times),
            lengths=np.repeat(lengths, times),
            num_trained=np.repeat(_column(piece, "num_trained"), times),
            num_images=np.repeat(images, times),
        )
        if dataset.cut_at:
            yield dataset.cut(columns, dataset.cut_at)
        elif max_length is not None:
            yield columns.only(columns.lengths <= max_length)
        else:
            yield columns


def _check_files(path: Path, manifest: Manifest, view: str, mirror: Mirror | None) -> None:
    """Every file that is read is there and whole, by its size."""
    shards = [*manifest.tokens, *manifest.views[view].shards]
    if mirror:
        mirror.check_sizes([*shards, manifest.selection])
    else:
        check_copy_files(path, manifest.tokenizer_files)
        check_sizes(path, [*shards, manifest.selection])


@contextmanager
def held_files(path: Path, mirror: Mirror | None, facts: ShardFacts) -> Generator[Path]:
    """The folder that holds a file; a file of a remote dataset is copied there first."""
    with mirror.held(facts) if mirror else nullcontext(path) as folder:
        yield folder


def _selection(
    path: Path, manifest: Manifest, view: str, mirror: Mirror | None,
    columns: Sequence[str] | None = None,
) -> pa.Table:  # fmt: skip
    with held_files(path, mirror, manifest.selection) as folder:
        return open_selection(folder, manifest, view, columns)


def _check_view(path: Path, manifest: Manifest, view: str) -> None:
    """The view is there and holds pixels."""
    if view not in manifest.views:
        raise DataError(
            f"view: {view!r} is not in {path}; expected one of {', '.join(manifest.views)}, or "
            "preprocess with that view"
        )
    if manifest.views[view].encoding["kind"] == ORIGINAL:
        raise DataError(
            f"view: {view!r} of {path} holds the images' files and no pixels; open another view, "
            "or add one with preprocess --incremental"
        )


def _column(table: pa.Table, name: str) -> NDArray[np.int64]:
    return only_chunk(table, name).to_numpy().astype(np.int64)


def check_sizes(path: Path, shards: Iterable[ShardFacts]) -> None:
    """Notice a missing or cut shard now and not at step 9,000."""
    for shard in shards:
        file = path / shard.path
        try:
            is_whole = file.stat().st_size == shard.bytes
        except OSError as error:
            if is_denied(error):
                raise DataError(cannot_read(file, error)) from None
            is_whole = False
        if not is_whole:
            raise DataError(
                f"{file}: missing or cut short; run the same preprocess again, it rebuilds it"
            )
