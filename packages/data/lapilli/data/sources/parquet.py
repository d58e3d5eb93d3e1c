"""Parquet files whose columns are a record's fields: `id`, `image` or `images`, a conversation.

The conversation is under `conversations` or `messages`: lists of objects, or the same as JSON
text. An image is a key, a list of keys, or the object `{bytes, path}` of Hugging Face's image
columns: `path` is the key then, and the bytes are not read. Other columns are not read either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data.access import is_denied
from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.record import excerpt
from lapilli.data.sources.files import annotation_files, file_error, what_it_is_instead
from lapilli.data.sources.messages import LISTS

__all__ = ["read"]

ROWS = 1024  # decoded at once; a row group may hold a million
IMAGES = ("image", "images")


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """Every row of the files as an object, a few at a time.

    Raises:
        DataError: A file is missing, no Parquet, damaged, or without a conversation's column.
    """
    for path in annotation_files(config, root):
        instead = what_it_is_instead(path)
        try:
            yield from _rows(path)
        except (pa.ArrowException, OSError) as error:
            if is_denied(error):
                raise file_error(path, error) from None
            raise DataError(
                f"annotations: {path} is no whole Parquet file ({excerpt(str(error))}); "
                + (instead or "download or write it again")
            ) from None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path, memory_map=True) as file:
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
        columns = _columns(path, leaves)
        for batch in file.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist():
                yield _element(row)


def _columns(path: Path, leaves: list[str]) -> list[str]:
    """The leaves worth reading, by their dotted paths; of an image with bytes its path alone."""
    names = {leaf.partition(".")[0] for leaf in leaves}
    if names.isdisjoint(LISTS):
        raise DataError(
            f"annotations: {path} has the columns {excerpt(', '.join(sorted(names)))}; "
            f"expected one of {', '.join(LISTS)}"
        )
    chosen = {leaf for leaf in leaves if leaf.partition(".")[0] in ("id", *LISTS)}
    for name in IMAGES:
        parts = [leaf for leaf in leaves if leaf.partition(".")[0] == name]
        holds_bytes = any(leaf.endswith(".bytes") for leaf in parts)
        keys = [leaf for leaf in parts if leaf.endswith(".path")] if holds_bytes else parts
        if parts and not keys:
            raise DataError(
                f"annotations: {path}: column {name} holds images without a path; write them to "
                "files, or to WebDataset tars, and name them"
            )
        chosen.update(keys)
    return [leaf for leaf in leaves if leaf in chosen]  # in the file's order: a digest sees it


def _element(row: dict[str, Any]) -> dict[str, Any]:
    for name in IMAGES:
        if name in row:
            row[name] = _key(row[name])
    for name in LISTS:
        if isinstance(row.get(name), str):
            try:
                row[name] = json.loads(row[name])
            except (ValueError, RecursionError):
                continue  # stays text, and the verdict is that it is no list
    return row


def _key(image: Any) -> Any:
    """A key for Hugging Face's object with a path; a list of them likewise."""
    if isinstance(image, list):
        return [_key(item) for item in cast("list[Any]", image)]
    return cast("dict[str, Any]", image).get("path") if isinstance(image, dict) else image
