"""What a dataset knows of each sample: small in memory, large in files that a node's processes map.

Files are made once a node, piece by piece, by the process that comes first; the others wait for it.
Their folder's name is a digest of all that decides them.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lapilli.data.errors import DataError
from lapilli.data.io.access import exists
from lapilli.data.io.atomic import write_json
from lapilli.data.io.file_lock import file_lock
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.shards.schemas import HELD_OUT

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Columns", "check_columns", "columns_of"]

IN_MEMORY = 1 << 18  # records up to which a process keeps 32 bytes a sample for itself: 8 MB
FACTS = "columns.json"
NAMES = ("rows", "lengths", "num_trained", "num_images")


@dataclass(frozen=True, eq=False)
class Columns:
    """Samples of a dataset, or of a piece of it.

    Attributes:
        rows: int64 [n], rows of the selection.
        lengths: int64 [n], tokens with the images'.
        num_trained: int64 [n].
        num_images: int64 [n].
        too_long: Samples left out.
        num_cut: Samples whose text is cut.
        shortest: Tokens of the shortest sample left out; 0 without any.
    """

    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    num_trained: NDArray[np.int64]
    num_images: NDArray[np.int64]
    too_long: int = 0
    num_cut: int = 0
    shortest: int = 0

    def only(self, fits: NDArray[np.bool_], long: Any = ()) -> Columns:
        """The samples that fit; of those in `long` that do, the text is cut."""
        left = self.lengths[~fits]
        return Columns(
            rows=self.rows[fits],
            lengths=self.lengths[fits],
            num_trained=self.num_trained[fits],
            num_images=self.num_images[fits],
            too_long=len(left),
            num_cut=int(fits[[*long]].sum()) if len(long) else 0,
            shortest=int(left.min()) if len(left) else 0,
        )


@dataclass(frozen=True)
class _Facts:
    """Of columns in files: their samples, and what `Columns` says beside them."""

    samples: int
    too_long: int
    num_cut: int
    shortest: int


def columns_of(
    pieces: Callable[[], Iterable[Columns]], records: int, folder: Path, identity: object
) -> Columns:
    """The columns that the pieces make together.

    Args:
        pieces: Makes them one after the other.
        records: Records of the dataset: from `IN_MEMORY` on the columns lie in files.
        folder: Of this node, for the files.
        identity: All that decides the columns, as its `repr`. Where the folder cannot be written
            they stay in memory, with a warning.

    Raises:
        DataError: What the pieces raise.
    """
    if records <= IN_MEMORY:
        return _joined(pieces())
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    target = folder / name
    if (found := _mapped(target)) is not None:
        return found
    try:
        with file_lock(folder / f".{name}.lock"):
            if _mapped(target) is None:
                _write(pieces(), target)
            found = _mapped(target)
    except _NotWritten as error:
        told = str(error)
    except DataError as error:
        if exists(folder):
            raise
        told = str(error)
    else:
        if found is not None:
            return found
        told = f"cache: {target} is gone again"
    warnings.warn(
        f"{told}; each process keeps the columns of {records:,} records for itself, about "
        f"{32 * records / 1e6:,.0f} MB: set LAPILLI_CACHE to a folder of this node",
        stacklevel=3,
    )
    return _joined(pieces())


def _joined(pieces: Iterable[Columns]) -> Columns:
    made = [*pieces]
    rows, lengths, num_trained, num_images = (
        np.concatenate([getattr(piece, name) for piece in made]) for name in NAMES
    )
    return Columns(
        rows=rows, lengths=lengths, num_trained=num_trained, num_images=num_images,
        too_long=sum(piece.too_long for piece in made),
        num_cut=sum(piece.num_cut for piece in made),
        shortest=min((piece.shortest for piece in made if piece.too_long), default=0),
    )  # fmt: skip


class _NotWritten(Exception):
    """The disk takes no files; its message says which and why."""


def _write(pieces: Iterable[Columns], target: Path) -> None:
    """Write the files under a temporary name and rename their folder when they are whole."""
    part = target.with_name(f".{target.name}.part")
    samples = too_long = num_cut = shortest = 0
    try:
        try:
            for gone in (part, target):
                shutil.rmtree(gone, ignore_errors=True)
            part.mkdir(parents=True)
            with contextlib.ExitStack() as stack:
                files = {name: stack.enter_context((part / name).open("wb")) for name in NAMES}
                for piece in pieces:
                    for name, file in files.items():
                        file.write(np.ascontiguousarray(getattr(piece, name), "<i8").data)
                    samples += len(piece.rows)
                    num_cut += piece.num_cut
                    if piece.too_long:
                        shortest = min(shortest, piece.shortest) if too_long else piece.shortest
                        too_long += piece.too_long
            facts = _Facts(samples, too_long, num_cut, shortest)
            write_json(part / FACTS, vars(facts))
            part.rename(target)
        except OSError as error:
            raise _NotWritten(
                f"cache: {target} cannot be written ({error.strerror or error})"
            ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _mapped(target: Path) -> Columns | None:
    """The columns of these files; None where they are not there, or not whole."""
    try:
        facts = from_json(read_whole(target / FACTS), _Facts)
        if any((target / name).stat().st_size != 8 * facts.samples for name in NAMES):
            return None
        rows, lengths, num_trained, num_images = (
            _map(target / name) if facts.samples else np.zeros(0, np.int64) for name in NAMES
        )
    except (OSError, JsonError):
        return None
    return Columns(
        rows=rows, lengths=lengths, num_trained=num_trained, num_images=num_images,
        too_long=facts.too_long, num_cut=facts.num_cut, shortest=facts.shortest,
    )  # fmt: skip


def _map(path: Path) -> NDArray[np.int64]:
    """A file's numbers in place, read-only; they stay if the file is removed."""
    with pa.memory_map(str(path), "r") as file:  # the map outlives the descriptor
        return np.frombuffer(file.read_buffer(), "<i8")


def check_columns(
    path: Path, found: Columns, split: str, max_length: int | None, *, truncate: bool
) -> None:
    """Check that there is a sample.

    Args:
        path: The dataset.
        found: Its columns.
        split: Of which split.
        max_length: Longest sample that was asked for.
        truncate: Whether longer ones are cut.

    Raises:
        DataError: There is none.
    """
    if len(found.rows):
        return
    if not found.too_long:
        raise DataError(
            f"split: {path} holds nothing out; set `mixture.held_out` and preprocess again"
            if split == HELD_OUT
            else f"split: {path} holds no sample to train on; preprocess again"
        )
    if truncate:
        raise DataError(
            f"max_length: {max_length} tokens cut the image of every sample of {path}; raise it"
        )
    raise DataError(
        f"max_length: {max_length} tokens; the shortest of {found.too_long} samples in {path} "
        f"has {found.shortest}; raise it"
    )
