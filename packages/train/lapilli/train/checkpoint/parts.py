"""The files of a checkpoint: each worker's fragments, and what reads any run of numbers of them.

A part is a safetensors file of flat fp32 tensors named `NAME/KIND@START`: consecutive numbers of a
parameter (`weight`) or of a moment of it, of which `START` is the first. All parts together have
every number once, however many workers wrote them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapilli.data.io.access import cannot_read
from lapilli.model.errors import ModelError
from lapilli.model.parts.weight_files import open_safetensors
from lapilli.train.checkpoint.find import Checkpoint
from lapilli.train.checkpoint.staging import StagedFragment
from lapilli.train.engine.fragments import WEIGHT
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointFile
from lapilli.train.run_folder.names import WEIGHTS

__all__ = [
    "Saved",
    "is_part",
    "open_saved",
    "part_name",
    "part_number",
    "write_part",
    "write_whole",
]

AT = "@"  # between the name of a flat tensor and the place of a fragment's first number
PART = "part-"
PART_NAME = re.compile(r"part-(\d{5,})-of-\d{5,}\.safetensors")
AT_ONCE = 2**23  # bytes that are hashed and written at once


def part_name(rank: int, workers: int) -> str:
    """The file of a worker's fragments."""
    return f"{PART}{rank:05d}-of-{workers:05d}.safetensors"


def is_part(name: str) -> bool:
    """Whether a file of a checkpoint holds fragments."""
    return name.startswith(PART)


def part_number(name: str) -> int | None:
    """The worker that wrote a file of a checkpoint; None for what is no part."""
    found = PART_NAME.fullmatch(name)
    return int(found[1]) if found else None


def write_part(path: Path, pieces: Sequence[StagedFragment]) -> CheckpointFile:
    """Write a worker's fragments; they are on the disk when this returns."""
    named = {f"{piece.key}{AT}{piece.start}": piece.numbers for piece in pieces}
    shapes = {name: (len(numbers),) for name, numbers in named.items()}
    return _write(path, shapes, named.__getitem__)


def write_whole(path: Path, saved: Saved) -> CheckpointFile:
    """Write all weights as one file of whole tensors, of which one at a time is in memory."""
    return _write(path, saved.shapes, saved.whole)


def _write(
    path: Path, shapes: Mapping[str, Collection[int]], value: Callable[[str], Tensor]
) -> CheckpointFile:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = hashlib.sha256()
    with path.open("wb") as file:

        def put(data: Any) -> None:
            found.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name in shapes:
            data = value(name).contiguous().view(-1).numpy().data.cast("B")
            for start in range(0, len(data), AT_ONCE):
                put(data[start : start + AT_ONCE])
        file.flush()
        os.fsync(file.fileno())
        return CheckpointFile(file.tell(), found.hexdigest())


@dataclass(frozen=True, order=True)
class _StoredNumbers:
    """Where consecutive numbers of a flat tensor are stored."""

    start: int
    length: int
    name: str = field(compare=False)
    file: Any = field(compare=False)

    def read(self, start: int, end: int) -> Tensor:
        """Some of the numbers, by their places in the flat tensor."""
        if AT in self.name:
            return self.file.get_slice(self.name)[start - self.start : end - self.start]
        return self.file.get_tensor(self.name).reshape(-1)[start:end]


@dataclass(frozen=True)
class Saved:
    """The tensors of a checkpoint or milestone; any run of their numbers is read by itself.

    Attributes:
        path: Its folder.
        shapes: Shape by parameter name.
        stored: What is stored of a flat tensor, by its key, first numbers first.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, Sequence[_StoredNumbers]]

    def read(self, name: str, kind: str, start: int, length: int) -> Tensor:
        """Consecutive numbers of a parameter or moment, fp32 [length]."""
        found = torch.empty(length)
        for one in self.stored[f"{name}/{kind}"]:
            first, end = max(start, one.start), min(start + length, one.start + one.length)
            if first < end:
                found[first - start : end - start].copy_(one.read(first, end))
        return found

    def whole(self, name: str) -> Tensor:
        """A parameter's fp32 weight in its shape."""
        shape = self.shapes[name]
        return self.read(name, WEIGHT, 0, math.prod(shape)).view(shape)


@contextmanager
def open_saved(checkpoint: Checkpoint, kinds: Collection[str] = (WEIGHT,)) -> Generator[Saved]:
    """Open a verified checkpoint's files, of the layout before too, to read `kinds` of tensors.

    Raises:
        TrainError: A file cannot be read, or not every number is there once.
    """
    state, path = checkpoint.state, checkpoint.path
    with ExitStack() as files:
        stored: dict[str, list[_StoredNumbers]] = {}
        with _told(path):
            for name in filter(is_part, state.files):
                _list_part(path / name, files, stored)
            shapes = {name: tuple(shape) for name, shape in sorted(state.shapes.items())}
            if not stored:
                shapes = _list_whole(path / WEIGHTS, files, stored)
        for name, shape in shapes.items():
            for kind in kinds:
                found = sorted(stored.get(f"{name}/{kind}", ()))
                _check_whole(path, f"{name}/{kind}", math.prod(shape), found)
                stored[f"{name}/{kind}"] = found
        yield Saved(path, shapes, stored)


def _list_part(path: Path, files: ExitStack, stored: dict[str, list[_StoredNumbers]]) -> None:
    file = files.enter_context(open_safetensors(path))
    for name in _names(file):
        key, at, start = name.rpartition(AT)
        held = file.get_slice(name)
        if not at or not start.isdecimal() or held.get_dtype() != "F32":
            raise ModelError(f"{path}: {name[:100]!r} is no fragment of fp32 numbers")
        length = math.prod(held.get_shape())
        stored.setdefault(key, []).append(_StoredNumbers(int(start), length, name, file))


def _list_whole(
    path: Path, files: ExitStack, stored: dict[str, list[_StoredNumbers]]
) -> dict[str, tuple[int, ...]]:
    file = files.enter_context(open_safetensors(path))
    shapes = dict[str, tuple[int, ...]]()
    for name in _names(file):
        held = file.get_slice(name)
        if not held.get_dtype().startswith(("F", "BF")):
            raise ModelError(f"{path}: {name[:100]!r} is {held.get_dtype()}; expected floats")
        shapes[name] = tuple(held.get_shape())
        stored[f"{name}/{WEIGHT}"] = [_StoredNumbers(0, math.prod(shapes[name]), name, file)]
    return shapes


def _names(file: Any) -> list[str]:
    return [*file.keys()]


def _check_whole(path: Path, key: str, numbers: int, stored: Iterable[_StoredNumbers]) -> None:
    end = 0
    for one in stored:
        if one.start != end:
            break
        end += one.length
    if end != numbers:
        raise TrainError(
            f"{path}: {key} has {end} of {numbers} numbers in order; remove this checkpoint, the "
            "run resumes from the previous one"
        )


@contextmanager
def _told(path: Path) -> Generator[None]:
    """What reading a file may come to, in one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise TrainError(
            f"{error.filename or path}: was replaced by a newer one while it was read; run the "
            "same again"
        ) from None
    except OSError as error:
        raise TrainError(cannot_read(error.filename or path, error)) from None
    except ModelError as error:
        raise TrainError(str(error)) from None
