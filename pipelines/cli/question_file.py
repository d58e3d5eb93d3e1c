"""Read files of questions: LLaVA's JSON lines, and ICM-Assistant's lists.

Every key of a line is used, known to be of no use here and counted, or refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lapilli.data.config import MOST_RECORD
from lapilli.data.errors import DataError
from lapilli.data.io.access import is_file
from lapilli.data.mounts.keys import is_inside
from lapilli.data.record import element_json, excerpt, is_unicode
from lapilli.data.sources.reading.bounds import (
    Unreadable,
    bounded_lines,
    holds_too_much,
    why_unreadable,
)
from pipelines.cli.command import say

__all__ = ["Asked", "existing", "read_questions"]

USED = ("question_id", "text", "image", "images")
# What question files of LLaVA-Bench, POPE, MME, VizWiz, TextVQA and MM-Vet have for their scoring.
UNUSED = (
    "category",
    "label",
    "answer",
    "answers",
    "capability",
    "question_type",
    "source",
    "split",
)


@dataclass(frozen=True)
class Asked:
    """A question with where it comes from.

    Attributes:
        question_id: As the answers name it: text or a number.
        text: What is asked, as the file has it.
        images: The image files that are shown, in their order.
        name: What an error calls it.
        turn: How many questions of the same conversation come before it, in the same list.
    """

    question_id: str | int
    text: str
    images: tuple[Path, ...]
    name: str
    turn: int = 0


def existing(path: Path, what: str) -> Path:
    """The path of a file.

    Raises:
        DataError: It is not there.
    """
    if not is_file(path):
        raise DataError(f"{what}: {excerpt(str(path), 300)} is not there; expected a file")
    return path


def read_questions(path: Path, images: Path) -> list[Asked]:
    """Read a file of questions; says which keys play no part.

    Args:
        path: JSON lines; or a list (`.txt`) as ICM-Assistant's `list_file.txt`: a line with an
            image's path, then one with what is asked of it, turn after turn with tabs between.
        images: Folder that their images are in; links below it lead nowhere else.

    Raises:
        DataError: No such file, or a line that is no question or that names an image outside of
            the folder; says its number.
    """
    if path.suffix == ".txt":
        return _read_list(path, images)
    asked: list[Asked] = []
    unused: Counter[str] = Counter()
    for number, line in _lines(path):
        where = f"{path} line {number}"
        row = _object(line, where)
        unused.update(row.keys() & {*UNUSED})
        files = tuple(_image_file(images, key, where) for key in _image_keys(row, where))
        asked.append(
            Asked(
                question_id=_question_id(row, where),
                text=_text(row, where),
                images=files,
                name=where,
            )
        )
    if not asked:
        raise DataError(f"questions: {path} is empty; expected a question a line")
    if unused:
        counts = ", ".join(f"{name} ({count} lines)" for name, count in sorted(unused.items()))
        say(f"{path}: not used: {counts}")
    return asked


def _read_list(path: Path, images: Path) -> list[Asked]:
    lines = [*_lines(path)]
    if len(lines) % 2 or not lines:
        raise DataError(
            f"questions: {path} has {len(lines)} lines; expected pairs of lines, an image's path "
            "and what is asked of it, turns with tabs between"
        )
    asked: list[Asked] = []
    for (number, key), (below, text) in zip(lines[::2], lines[1::2], strict=True):
        file = _image_file(images, key, f"{path} line {number}")
        for turn, question in enumerate(text.split("\t")):
            asked.append(
                Asked(
                    question_id=key,
                    text=question,
                    images=(file,) if turn == 0 else (),
                    name=f"{path} line {below}",
                    turn=turn,
                )
            )
    return asked


def _image_file(images: Path, key: str, where: str) -> Path:
    """The file that a line names, which may be nowhere but below the folder."""
    path = images / key
    is_below = is_inside(key) or (path.is_absolute() and ".." not in path.parts)
    if is_below:
        is_below = existing(path, f"{where}: image").resolve().is_relative_to(images.resolve())
    if not is_below:
        raise DataError(
            f"{where}: image {excerpt(key)} leads out of {images}; expected a file below it; set "
            "--images to a folder above its images"
        )
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; other separators than newlines are text."""
    try:
        with existing(path, "questions").open("rb") as file:
            for number, line in enumerate(bounded_lines(file, MOST_RECORD), 1):
                if isinstance(line, Unreadable):
                    raise DataError(
                        f"{path} line {number}: more than {MOST_RECORD} bytes; expected a question"
                    )
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield number, text
    except UnicodeDecodeError:
        raise DataError(f"questions: {path} is not UTF-8 text; expected JSONL") from None
    except OSError as error:
        raise DataError(f"questions: {path} cannot be read ({error.strerror})") from None


def _object(line: str, where: str) -> dict[str, Any]:
    why: str | None = None
    try:
        row: object = None if holds_too_much(line) else json.loads(line)
    except (ValueError, RecursionError) as error:
        why, row = why_unreadable(error), None
    if not isinstance(row, dict):
        found = f"; found {why}" if why else ""
        raise DataError(
            f"{where}: expected an object with question_id, text and maybe image or images{found}"
        )
    fields = cast("dict[str, Any]", row)
    for name in fields:
        if name not in USED + UNUSED:
            raise DataError(
                f"{where}: unknown key '{excerpt(name)}'; the keys are {', '.join(USED)}, and "
                f"{', '.join(UNUSED)}, which are not used"
            )
    for name in ("question_id", "text"):
        if name not in fields:
            raise DataError(
                f"{where}: no {name}; expected an object with question_id, text and maybe image or "
                "images"
            )
    return fields


def _question_id(row: dict[str, Any], where: str) -> str | int:
    value: object = row["question_id"]
    if isinstance(value, str) and is_unicode(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(f"{where}: question_id is {_shown(value)}; expected text or a whole number")


def _text(row: dict[str, Any], where: str) -> str:
    value: object = row["text"]
    if isinstance(value, str) and is_unicode(value):
        return value
    raise DataError(f"{where}: text is {_shown(value)}; expected what is asked, as Unicode text")


def _image_keys(row: dict[str, Any], where: str) -> list[str]:
    """The keys under `image` or `images`, either of which may hold one or a list."""
    named = [name for name in ("image", "images") if name in row]
    if not named:
        return []
    if len(named) == 2:
        raise DataError(f"{where}: image and images are both there; expected one of them")
    value: object = row[named[0]]
    keys = cast("list[object]", value) if isinstance(value, list) else [value]
    for key in keys:
        if not isinstance(key, str) or not key or not is_unicode(key) or "\0" in key:
            raise DataError(
                f"{where}: {named[0]} holds {_shown(key)}; expected a file below --images, or a "
                f"list of such; leave {named[0]} out where there is none"
            )
    return cast("list[str]", keys)


def _shown(value: object) -> str:
    return excerpt(element_json(value), 60)
