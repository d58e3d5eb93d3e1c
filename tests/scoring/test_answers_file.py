"""Answers files of both kinds, truth in the forms that benchmarks publish, and forms to upload."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.errors import DataError
from lapilli.train.errors import TrainError
from lapilli.train.scoring.answers_file import read_answers, with_truth
from lapilli.train.scoring.responses import Response
from lapilli.train.scoring.uploads import UPLOADS, upload

LINES = [
    {"question_id": 1, "prompt": "Is it?\nAnswer in a word.", "text": "Yes", "model_id": "m"},
    {"question_id": "b", "prompt": "Which?", "text": "Two dogs.", "model_id": "m"},
]


def written(path: Path, value: Any) -> Path:
    is_lines = isinstance(value, list) and path.suffix == ".jsonl"
    text = "".join(json.dumps(row) + "\n" for row in value) if is_lines else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path


def test_both_kinds_of_line_are_read(tmp_path: Path) -> None:
    own = {
        "sample_id": "s/1", "question": "Is it?", "expected": "No", "given": "Yes", "source": "s",
        "image_index": 4, "turn": 2, "image": "a.jpg", "logits": {"Yes": 2, "No": 1.5},
    }  # fmt: skip
    first, second, third = read_answers(written(tmp_path / "a.jsonl", [own, *LINES]))
    logits = {"Yes": 2, "No": 1.5}
    assert first == Response("s/1#2", "Is it?", "Yes", ("No",), "s", "a.jpg", 4, logits)
    assert (second.question_id, second.given, second.expected) == (1, "Yes", ())
    assert third.question_id == "b"


VQAV2 = {
    "annotations": [
        {"question_id": 1, "answers": [{"answer": "yes"}] * 10, "answer_type": "yes/no"},
        {"question_id": "b", "answers": [{"answer": "2"}] * 10, "answer_type": "number"},
    ]
}
TEXTVQA = {
    "data": [
        {"image_id": 1, "question": "is it?", "answers": ["yes"] * 10},
        {"image_id": 1, "question": "is it not?", "answers": ["no"] * 10},
        {"image_id": "b", "question": "which?", "answers": ["2"] * 10},
    ]
}
POPE = [
    {"question_id": 1, "text": "Is it?", "label": "yes", "category": "random"},
    {"question_id": "b", "text": "Which?", "label": "no", "category": "popular"},
]


@pytest.mark.parametrize(
    ("name", "truth", "expected", "categories"),
    [
        ("vqa.json", VQAV2, [("yes",) * 10, ("2",) * 10], ["yes/no", "number"]),
        ("text.json", TEXTVQA, [("yes",) * 10, ("2",) * 10], ["", ""]),
        ("pope.jsonl", POPE, [("yes",), ("no",)], ["random", "popular"]),
        ("list.json", POPE, [("yes",), ("no",)], ["random", "popular"]),
    ],
)
def test_truth_is_read_as_benchmarks_publish_it(
    tmp_path: Path, name: str, truth: Any, expected: Any, categories: list[str]
) -> None:
    responses = read_answers(written(tmp_path / "a.jsonl", LINES))
    found = with_truth(responses, written(tmp_path / name, truth))
    assert [one.expected for one in found] == expected
    assert [one.category for one in found] == categories


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.jsonl is empty"),
        ('{"id": 1}\n', "line 1 is no answer"),
        ('{"question_id": 1, "text": "a"}\n{"question_id"\n', "line 2 is no object"),
        ("[1, 2]", "damaged or of another form"),
        ("<!DOCTYPE html>\n<html>\n", "line 1 is no object"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as said:
        read_answers(path)
    assert "\n" not in str(said.value)


def test_truth_that_is_not_there_or_twice_is_one_line(tmp_path: Path) -> None:
    responses = read_answers(written(tmp_path / "a.jsonl", LINES))
    with pytest.raises(DataError, match=r"truth: .* says nothing of question b"):
        with_truth(responses, written(tmp_path / "t.jsonl", POPE[:1]))
    twice = [*POPE, {**POPE[0], "label": "no"}]
    with pytest.raises(DataError, match="has two truths for question 1"):
        with_truth(responses, written(tmp_path / "t.jsonl", twice))
    with pytest.raises(DataError, match=r"truth: .* is not there; expected a file"):
        with_truth(responses, tmp_path / "none.jsonl")


def responses() -> list[Response]:
    return [Response(1, "Is it?", "Yes."), Response(2, "Which?", "The two Dogs")]


SPLIT = [{"question_id": n, "image": f"{n}.jpg"} for n in (2, 1)]


@pytest.mark.parametrize(
    ("name", "questions", "expected"),
    # as LLaVA's scripts/convert_* write them
    [
        ("gqa", [], [{"questionId": 1, "prediction": "yes"},
                     {"questionId": 2, "prediction": "the two dogs"}]),
        ("mmvet", [], {"v1_1": "Yes.", "v1_2": "The two Dogs"}),
        ("vqav2", [*SPLIT, {"question_id": 3}],
         [{"question_id": 2, "answer": "2 dogs"}, {"question_id": 1, "answer": "yes"},
          {"question_id": 3, "answer": ""}]),
        ("vizwiz", SPLIT, [{"image": "2.jpg", "answer": "2 dogs"}, {"image": "1.jpg",
                                                                     "answer": "yes"}]),
    ],
)  # fmt: skip
def test_forms_to_upload(name: str, questions: list[dict[str, Any]], expected: object) -> None:
    assert json.loads(upload(name, responses(), questions)) == expected


def test_seed_is_a_line_a_question() -> None:
    lines = upload("seed", responses(), SPLIT).decode().splitlines()
    expected = [(2, "The two Dogs"), (1, "Yes.")]
    assert [json.loads(line) for line in lines] == [
        {"question_id": n, "prediction": text} for n, text in expected
    ]


def cells(data: bytes) -> list[list[str]]:
    """A sheet's texts, by a reader of XML."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            ET.fromstring(archive.read(name))
        sheet = ET.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    space = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    rows = sheet.findall("m:sheetData/m:row", space)
    return [[cell.text or "" for cell in row.findall("m:c/m:is/m:t", space)] for row in rows]


def test_mmbench_is_its_table_with_a_column_of_predictions() -> None:
    names = ["index", "question", "hint", "A", "B", "C", "D", "category", "image", "l2-category"]
    table = [dict.fromkeys(names, "") | {"index": str(n), "A": "<&>"} for n in (1, 2, 9)]
    found = cells(upload("mmbench", responses(), table))
    assert found[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert [(row[0], row[2], row[6]) for row in found[1:]] == [
        ("1", "<&>", "Yes."), ("2", "<&>", "The two Dogs"), ("9", "<&>", ""),
    ]  # fmt: skip
    assert upload("mmbench", responses(), table) == upload("mmbench", responses(), table)


def test_a_form_that_cannot_be_made_is_one_line() -> None:
    with pytest.raises(TrainError, match="upload: 'mme'; expected one of vqav2"):
        upload("mme", responses(), [])
    for name in UPLOADS:
        if name not in ("gqa", "mmvet"):
            with pytest.raises(TrainError, match=f"upload: {name} has a row for every question"):
                upload(name, responses(), [])
    with pytest.raises(TrainError, match="there is none to 3"):
        upload("seed", responses(), [{"question_id": 3}])
