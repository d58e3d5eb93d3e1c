"""Captions in a table: which columns hold image, question and answer, and rows of CSV files."""

from __future__ import annotations

import csv
import io
import lzma
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import Output
from lapilli.data.record import excerpt
from lapilli.data.sources.captions import draw_prompt, left_over
from lapilli.data.sources.reading.bounds import Bounds, too_large
from lapilli.data.sources.reading.files import annotation_places, open_annotations

__all__ = ["COLUMNS", "caption_columns", "caption_element", "read"]

# What people call the columns; the setting `columns` of a source names others.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": (
        "image", "image_path", "image_file", "image_name", "file_name", "filename", "file",
        "filepath", "file_path", "path", "img", "img_path",
    ),
    "answer": ("caption", "text", "answer", "description", "response", "alt_text"),
    "question": ("question", "prompt", "instruction", "query"),
    "id": ("id", "key", "image_id", "uid"),
}  # fmt: skip
NEEDED = ("image", "answer")
SEPARATORS = "\t;,"
LONGEST_LINE = 1 << 20  # of column names
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


def caption_columns(
    names: Sequence[str], config: SourceConfig, place: str, otherwise: str = ""
) -> dict[str, str]:
    """The column of a table for each of image, answer, question and id; the last two if any.

    Args:
        names: The table's columns.
        config: The source, which may name columns.
        place: The file, for errors.
        otherwise: What else the table could hold, for errors.

    Raises:
        DataError: A column is missing, or several may be meant.
    """
    found: dict[str, str] = {}
    for meaning, usual in COLUMNS.items():
        if chosen := config.columns.get(meaning):
            if chosen not in names:
                raise DataError(
                    f"sources.columns: {place} has no column {chosen!r} ({meaning}); expected one "
                    f"of {excerpt(', '.join(names))}"
                )
            found[meaning] = chosen
            continue
        able = [name for name in names if name.strip().lower() in usual]
        if meaning == "id":
            able = able[:1]
        if len(able) > 1:
            raise DataError(
                f"annotations: {place}: {meaning} may be any of the columns {', '.join(able)}; "
                f"name one, as in `columns: {{{meaning}: {able[0]}}}`"
            )
        if able:
            found[meaning] = able[0]
        elif meaning in NEEDED:
            raise DataError(
                f"annotations: {place} has the columns {excerpt(', '.join(names))}, none of which "
                f"is known to hold the {meaning}; name it, as in `columns: {{{meaning}: NAME}}`"
                f"{otherwise}"
            )
    return found


def caption_element(
    row: Mapping[str, Any], columns: Mapping[str, str], config: SourceConfig
) -> dict[str, Any]:
    """A row as a caption record; without a question it gets one of the recipe's prompts."""
    image = row.get(columns["image"])
    given = row.get(columns["question"]) if "question" in columns else None
    name = str(row.get(columns.get("id", columns["image"])))
    question = given if given is not None else draw_prompt(config, name)
    return {
        "id": row.get(columns.get("id", columns["image"])),
        "image": image,
        "question": question,
        "answer": row.get(columns["answer"]),
        **left_over(row, frozenset(columns.values())),
    }


def read(config: SourceConfig, root: Any) -> Iterator[Any]:
    """An element a row of CSV files, whose first line names the columns.

    Fields are separated by the tab, semicolon or comma that the first line has most of, and quoted
    as RFC 4180 says. A row of another number of fields is an element that says so.

    Raises:
        DataError: A file is missing, not UTF-8, without a column that is needed, or a quoted field
            does not end.
    """
    for place in annotation_places(config, root):
        yield from _rows(place, config)


def _rows(place: Output, config: SourceConfig) -> Iterator[Any]:
    bounds = Bounds.of(config)
    most = csv.field_size_limit(min(bounds.record, 2**31 - 1))
    try:
        with open_annotations(place, bounds.unpacked) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            first = text.readline(LONGEST_LINE)
            if not first.strip():
                raise DataError(f"annotations: {place}: line 1 is empty; expected column names")
            lines = csv.reader(chain([first], text), delimiter=_separator(first), strict=True)
            yield from _elements(lines, place, config)
    except csv.Error as error:
        raise DataError(
            f"annotations: {place} is no whole CSV ({error}); quote fields as RFC 4180 says, a "
            "quote inside of one doubled"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"annotations: {place}: not UTF-8 text ({error.reason}); write it again as UTF-8"
        ) from None
    except DAMAGED as error:
        raise DataError(
            f"annotations: {place}: cannot be read to its end ({excerpt(str(error))}); download or "
            "write it again"
        ) from None
    finally:
        csv.field_size_limit(most)


def _separator(line: str) -> str:
    return max(SEPARATORS, key=line.count)


def _elements(lines: Any, place: Output, config: SourceConfig) -> Iterator[Any]:
    names: list[str] = next(lines)
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"annotations: {place} names the column {min(repeated)!r} twice")
    columns = caption_columns(names, config, str(place))
    for fields in lines:
        if not fields:
            continue  # an empty line
        size = sum(map(len, fields))
        if len(fields) != len(names):
            detail = f"line {lines.line_num}: {len(fields)} fields; expected {len(names)}"
            yield {"id": None, "row": fields, "defect": detail}
        elif size > config.max_record_bytes:
            detail = too_large(f"{size} characters", config.max_record_bytes)
            yield {"id": None, "defect": detail}
        else:
            yield caption_element(dict(zip(names, fields, strict=True)), columns, config)
