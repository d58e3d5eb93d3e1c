"""Readers of annotation files, one format a module; `SOURCES` names them.

A reader is `read(path) -> Iterator[element]`; `normalise(element)` makes turns of one element. A
reader of one's own is named in a recipe as `package.module:name`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.data.extension import load_named
from lapilli.data.record import Turn, Verdict
from lapilli.data.sources import llava

__all__ = ["SOURCES", "Source", "Turns", "get_source"]


@dataclass(frozen=True)
class Source:
    """How one annotation format is read.

    Attributes:
        read: Path to the elements of the file, streamed, as parsed JSON.
        normalise: One element to its turns and image keys, or the verdict that it has none.
    """

    read: Callable[[Path], Iterator[Any]]
    normalise: Callable[[Any], tuple[tuple[Turn, ...], tuple[str, ...]] | Verdict]


Turns = tuple[tuple[Turn, ...], tuple[str, ...]]

SOURCES: dict[str, Source] = {"llava": Source(llava.read, llava.normalise)}


def get_source(name: str) -> Source:
    """The reader a recipe names.

    Raises:
        DataError: No such name; lists those there are.
    """
    return load_named(name, SOURCES, Source, what="format")
