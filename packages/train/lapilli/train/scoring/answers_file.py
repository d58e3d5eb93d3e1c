"""Read answers files, and the truth beside them.

An answers file is JSON lines of one of three kinds: `evaluate`'s and lmms-eval's samples, which
have what is expected, and `generate`'s (LLaVA's form: `question_id`, `prompt`, `text`), for which
another file has it.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lapilli.data.errors import DataError
from lapilli.data.io.access import cannot_read
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.data.record import element_json, excerpt
from lapilli.train.scoring.responses import Response

__all__ = ["read_answers", "read_rows", "response_of", "with_truth"]

# Keys of the truth: of POPE, ScienceQA and SEED (`label`, `answer`), VQAv2, TextVQA, VizWiz and
# DocVQA (`answers`), GQA and our own.
EXPECTED = ("answers", "answer", "label", "expected", "gt_answer")
CATEGORIES = ("category", "question_type", "answer_type", "data_type")
NAMES = ("question_id", "questionId", "sample_id", "id", "index")
LISTS = ("annotations", "data", "questions")  # of a file that is an object


def read_answers(path: Path) -> list[Response]:
    """The responses of an answers file.

    Raises:
        DataError: It cannot be read, or a line is of no kind; says its number.
    """
    responses: list[Response] = []
    for number, row in enumerate(read_rows(path, "answers"), 1):
        found = response_of(row)
        if found is None:
            raise DataError(
                f"answers: {path} line {number} is no answer; expected sample_id, expected and "
                "given as evaluate writes them, question_id, prompt and text as generate does, or "
                "doc_id, target and filtered_resps as lmms-eval does"
            )
        responses.append(found)
    if not responses:
        raise DataError(f"answers: {path} is empty; expected an answer a line")
    return responses


def with_truth(responses: Sequence[Response], path: Path) -> list[Response]:
    """Responses with what a file expects, and its categories and images.

    The file is JSON lines, a JSON list, or an object with a list under `annotations`, `data` or
    `questions`. A row has `question_id` (or `sample_id`, `id`, `index`) or, as TextVQA's,
    `image_id` with `question`; an expected answer in `answer`, `label` or `answers`, the latter a
    list of texts or of objects with `answer`.

    Raises:
        DataError: It cannot be read, has two truths for a question, or none for one that is asked.
    """
    known: dict[str, Mapping[str, Any]] = {}
    doubtful: set[str] = set()
    for row in read_rows(path, "truth"):
        for key in _keys(row):
            if key in known and _truth(known[key]) != _truth(row):
                doubtful.add(key)
            known[key] = row
    found: list[Response] = []
    for response in responses:
        keys = [f"{response.question_id}\n{_first_line(response.question)}"]
        keys.append(str(response.question_id))
        key = next((key for key in keys if key in known), None)
        if key is None or key in doubtful:
            why = "says nothing of" if key is None else "has two truths for"
            raise DataError(
                f"truth: {path} {why} question {excerpt(str(response.question_id))}; expected one "
                "row a question, with its question_id"
            )
        row = known[key]
        category = next((str(row[name]) for name in CATEGORIES if name in row), response.category)
        image = str(row.get("image", response.image))
        found.append(replace(response, expected=_truth(row), category=category, image=image))
    return found


def read_rows(path: Path, setting: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, of a JSON list, or of a list in an object.

    Args:
        path: The file.
        setting: What an error begins with.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        data = read_whole(path, MOST_LINES)
    except FileNotFoundError:
        raise DataError(f"{setting}: {path} is not there; expected a file") from None
    except OSError as error:
        raise DataError(f"{setting}: {cannot_read(path, error)}") from None
    return [*_objects(data, path, setting)]


def _objects(data: bytes, path: Path, setting: str) -> Iterator[dict[str, Any]]:
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        if data.lstrip()[:1] == b"[":
            yield from from_json(data, list[dict[str, Any]])
            return
        if len(lines) == 1 or (lines and lines[0].strip() == b"{"):  # one object, maybe indented
            whole = from_json(data, dict[str, Any])
            inner = next((whole[name] for name in LISTS if isinstance(whole.get(name), list)), None)
            yield from from_json(json.dumps(inner), list[dict[str, Any]]) if inner else [whole]
            return
    except JsonError as error:
        raise DataError(
            f"{setting}: {path} is damaged or of another form ({error}); expected JSON lines, or "
            "a list of objects"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            yield from_json(line, dict[str, Any])
        except JsonError as error:
            raise DataError(
                f"{setting}: {path} line {number} is no object ({error}); expected JSON lines, or "
                "a list of objects"
            ) from None


def response_of(row: Mapping[str, Any]) -> Response | None:
    """The response of a row of an answers file; None for a row of no kind."""
    if {"sample_id", "expected", "given"} <= row.keys():
        logits = row.get("logits")
        turn = row.get("turn", 0)
        return Response(
            question_id=str(row["sample_id"]) + (f"#{turn}" if turn else ""),
            question=str(row.get("question", "")),
            given=str(row["given"]),
            expected=(str(row["expected"]),),
            category=str(row.get("source", "")),
            image=str(row.get("image", "")),
            index=row["image_index"] if isinstance(row.get("image_index"), int) else -1,
            logits=cast("dict[str, float]", logits) if _are_logits(logits) else {},
        )
    if {"question_id", "text"} <= row.keys():
        found = row["question_id"]
        return Response(
            question_id=found if isinstance(found, (str, int)) else element_json(found),
            question=str(row.get("prompt", "")),
            given=str(row["text"]),
            image=str(row.get("image", "")),
        )
    if {"doc_id", "target", "filtered_resps"} <= row.keys():
        return _of_sample(row)
    return None


def _of_sample(row: Mapping[str, Any]) -> Response | None:
    """The response of a line of lmms-eval's samples; None where it holds likelihoods."""
    given, media = row["filtered_resps"], row.get("input_media")
    if not isinstance(given, str):
        return None
    images = cast("list[object]", media) if isinstance(media, list) else []
    return Response(
        question_id=str(row.get("question_id", row["doc_id"])),
        question=str(row.get("input", "")),
        given=given,
        expected=_listed(str(row["target"])),
        image=images[0] if images and isinstance(images[0], str) else "",
    )


def _listed(target: str) -> tuple[str, ...]:
    """What is expected: lmms-eval writes a list of answers as Python shows it."""
    if target.startswith("[") and target.endswith("]"):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found: object = ast.literal_eval(target)
            if isinstance(found, list) and found:
                return tuple(_text(one) for one in cast("list[object]", found))
    return (target,)


def _are_logits(value: object) -> bool:
    values = cast("dict[object, object]", value) if isinstance(value, dict) else {}
    return bool(values) and all(isinstance(one, (int, float)) for one in values.values())


def _keys(row: Mapping[str, Any]) -> Iterator[str]:
    if "image_id" in row and "question" in row:
        yield f"{row['image_id']}\n{_first_line(str(row['question']))}"
    name = next((name for name in NAMES if name in row), None)
    if name is not None:
        yield str(row[name])


def _first_line(question: str) -> str:
    """What TextVQA's questions are told apart by: LLaVA adds lines behind the question."""
    return question.partition("\n")[0].strip().lower()


def _truth(row: Mapping[str, Any]) -> tuple[str, ...]:
    value: object = next((row[name] for name in EXPECTED if name in row), None)
    if value is None:
        return ()
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    return tuple(_text(one) for one in values)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return str(cast("dict[str, object]", value).get("answer", ""))
    return str(value)
