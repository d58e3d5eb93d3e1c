"""The forms in which benchmarks' servers take answers, from an answers file. Pure.

Each is what LLaVA's `scripts/convert_*` write, by the row: `vqav2`, `gqa`, `mmbench`, `seed`,
`vizwiz`, `mmvet`.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias
from xml.sax.saxutils import escape, quoteattr

from lapilli.data.record import excerpt
from lapilli.train.errors import TrainError
from lapilli.train.scoring.answer_forms import vqa_text
from lapilli.train.scoring.responses import Response

__all__ = ["UPLOADS", "needs_questions", "upload"]

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Answers: TypeAlias = Mapping[str, Response]
DATE = (2000, 1, 1, 0, 0, 0)  # the same answers make the same file
# What MMBench's own table has and its server does not want.
MMBENCH_LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")
MMBENCH_PLACE = 6  # the column of the prediction
_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def upload(name: str, responses: Sequence[Response], questions: Rows) -> bytes:
    """The file that a benchmark's server takes.

    Args:
        name: One of `UPLOADS`.
        responses: The answers.
        questions: All questions of the split, as the benchmark has them, for those that need them.

    Raises:
        TrainError: No such form, questions that are needed and not given, or without an answer
            where the form has no place for that.
    """
    if name not in UPLOADS:
        raise TrainError(f"upload: {name!r}; expected one of {', '.join(UPLOADS)}")
    if needs_questions(name) and not questions:
        raise TrainError(
            f"upload: {name} has a row for every question of its split; name their file with "
            "--questions"
        )
    answers = {str(response.question_id): response for response in responses}
    return UPLOADS[name](answers, questions)


def needs_questions(name: str) -> bool:
    """Whether a form has rows for questions that were not answered, or fields of their file."""
    return name in ("vqav2", "mmbench", "seed", "vizwiz")


def _vqav2(answers: Answers, questions: Rows) -> bytes:
    """A list with every question of the split; one that was not asked has an empty answer."""
    rows = [
        {
            "question_id": row["question_id"],
            "answer": vqa_text(found.given) if (found := _find(answers, row)) else "",
        }
        for row in questions
    ]
    return json.dumps(rows).encode()


def _gqa(answers: Answers, questions: Rows) -> bytes:
    del questions
    rows = [
        {"questionId": one.question_id, "prediction": one.given.rstrip(".").lower()}
        for one in answers.values()
    ]
    return json.dumps(rows).encode()


def _vizwiz(answers: Answers, questions: Rows) -> bytes:
    rows = [
        {"image": row["image"], "answer": vqa_text(_found("vizwiz", answers, row).given)}
        for row in questions
    ]
    return json.dumps(rows).encode()


def _seed(answers: Answers, questions: Rows) -> bytes:
    rows = (
        {"question_id": row["question_id"], "prediction": _found("seed", answers, row).given}
        for row in questions
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _mmvet(answers: Answers, questions: Rows) -> bytes:
    del questions
    rows = {f"v1_{one.question_id}": one.given for one in answers.values()}
    return json.dumps(rows, indent=2).encode()


def _mmbench(answers: Answers, questions: Rows) -> bytes:
    """A spreadsheet: MMBench's own table with a column of predictions."""
    columns = [name for name in questions[0] if name not in MMBENCH_LEFT_OUT]
    heads = [*columns[:MMBENCH_PLACE], "prediction", *columns[MMBENCH_PLACE:]]
    rows = [heads]
    for row in questions:
        found = _find(answers, row)
        values = {**row, "prediction": found.given if found else ""}
        rows.append([str(values.get(name) or "") for name in heads])
    return _spreadsheet(rows)


UPLOADS: dict[str, Callable[[Answers, Rows], bytes]] = {
    "vqav2": _vqav2,
    "gqa": _gqa,
    "mmbench": _mmbench,
    "seed": _seed,
    "vizwiz": _vizwiz,
    "mmvet": _mmvet,
}


def _find(answers: Answers, row: Mapping[str, Any]) -> Response | None:
    name = next((name for name in ("question_id", "index") if name in row), None)
    return None if name is None else answers.get(str(row[name]))


def _found(name: str, answers: Answers, row: Mapping[str, Any]) -> Response:
    found = _find(answers, row)
    if found is None:
        raise TrainError(
            f"upload: {name} wants an answer to every question, and there is none to "
            f"{excerpt(str(row.get('question_id')))}; ask it too"
        )
    return found


def _spreadsheet(rows: Sequence[Sequence[str]]) -> bytes:
    """An .xlsx file of texts (ECMA-376): one sheet, its cells as inline strings."""
    lines = (
        "".join(
            f'<c r="{_column(place)}{number}" t="inlineStr"><is><t xml:space="preserve">'
            f"{escape(_NOT_IN_XML.sub('', cell))}</t></is></c>"
            for place, cell in enumerate(row)
        )
        for number, row in enumerate(rows, 1)
    )
    sheet = "".join(f"<row r={quoteattr(str(n))}>{line}</row>" for n, line in enumerate(lines, 1))
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kind}.worksheet+xml"/>'
        "</Types>",
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="rId1" '
        f'Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets><sheet '
        'name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="rId1" Type="{office}/worksheet" Target="worksheets/sheet1.xml"/>'
        "</Relationships>",
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{sheet}</sheetData>'
        "</worksheet>",
    }
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            declared = f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{text}'
            archive.writestr(zipfile.ZipInfo(name, DATE), declared)
    return made.getvalue()


def _column(place: int) -> str:
    """A, B, ... Z, AA, ..."""
    name, place = "", place + 1
    while place:
        place, letter = divmod(place - 1, 26)
        name = chr(ord("A") + letter) + name
    return name
