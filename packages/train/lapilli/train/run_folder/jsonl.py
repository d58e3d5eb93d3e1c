"""Rewrite small JSON lines files atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.train.errors import TrainError

__all__ = ["parse_lines", "read_lines", "write_lines"]

T = TypeVar("T")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these rows."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """The rows of a file, each of a type; none where there is no file.

    Raises:
        TrainError: A line of another form; names it.
    """
    try:
        return parse_lines(read_whole(path, MOST_LINES), kind, path)
    except FileNotFoundError:
        return []


def parse_lines(data: bytes, kind: type[T], path: Path) -> list[T]:
    """The rows of whole lines, which end at a line feed and nowhere else.

    Raises:
        TrainError: A line of another form; names it by its number in `data`.
    """
    found: list[T] = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        try:
            found.append(from_json(line, kind))
        except JsonError as error:
            raise TrainError(
                f"{path}: damaged, line {number}: {error}; bring it back from a copy of the "
                "run, or remove the file"
            ) from None
    return found
