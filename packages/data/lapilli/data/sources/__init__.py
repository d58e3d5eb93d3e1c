"""Readers of annotation files, one format a module; `SOURCES` names them.

A `Source` reads a recipe's source to elements and makes turns of an element. A reader of one's own
is named in a recipe as `package.module:name`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.data.config import SourceConfig
from lapilli.data.record import Verdict
from lapilli.data.registry import load_named
from lapilli.data.sources import (
    ai_challenger,
    basic_vlm,
    captions,
    llava,
    messages,
    parquet,
    rows,
    texts,
    webdataset,
)
from lapilli.data.sources.fields import NOTHING, Inspection
from lapilli.data.sources.reading import caption_tables, json_stream, text_files
from lapilli.data.sources.turns import Turns

__all__ = ["SOURCES", "Source", "Turns", "get_source", "reads_json"]


@dataclass(frozen=True)
class Source:
    """How one annotation format is read.

    Attributes:
        read: A source's settings and the root to its elements, streamed, as JSON would have them.
            A generator that returns `Members` says which members of its archives it made of use.
        normalise: One element to its turns and image keys, or the verdict that it has none.
        inspect: What the fields of one element come to that `normalise` does not read. A reader
            of one's own that leaves it out answers for its fields itself.
    """

    read: Callable[[SourceConfig, Path], Iterator[Any]]
    normalise: Callable[[Any], Turns | Verdict]
    inspect: Callable[[Any], Inspection] = lambda element: NOTHING


SOURCES: dict[str, Source] = {
    "llava": Source(json_stream.read, llava.normalise, llava.inspect),
    "messages": Source(json_stream.read, messages.normalise, messages.inspect),
    "texts": Source(json_stream.read, texts.normalise, texts.inspect),
    "ai_challenger": Source(ai_challenger.read, captions.normalise, captions.inspect),
    "basic_vlm": Source(basic_vlm.read, captions.normalise, captions.inspect),
    "csv": Source(caption_tables.read, captions.normalise, captions.inspect),
    "text_files": Source(text_files.read, captions.normalise, captions.inspect),
    "parquet": Source(parquet.read, rows.normalise, rows.inspect),
    "webdataset": Source(webdataset.read, webdataset.normalise, webdataset.inspect),
}


def reads_json(name: str) -> bool:
    """Whether a format is elements of JSON files that can be read by byte ranges."""
    return get_source(name).read is json_stream.read


def get_source(name: str) -> Source:
    """The reader a recipe names.

    Raises:
        DataError: No such name; lists those there are.
    """
    return load_named(name, SOURCES, Source, what="format")
