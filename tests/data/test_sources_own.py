"""Captions as people keep them: tables of CSV and Parquet, and text files beside images."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.record import Reason
from tests.data.source_files import entries, records, refused, said

PROMPTS = ["What is here?"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1)


def write_csv(path: Path, rows: list[list[str]], **form: Any) -> None:
    text = io.StringIO()
    csv.writer(text, **form).writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("names", [("image", "caption"), ("file_name", "text"), ("Path", "Answer")])
def test_a_table_of_captions(tmp_path: Path, names: tuple[str, str], delimiter: str) -> None:
    rows = [[*names], ["a.jpg", 'One, "two"; three'], ["b/c.png", "Two\nlines\tand a tab"]]
    write_csv(tmp_path / "t.csv", rows, delimiter=delimiter)
    found = records(entries(tmp_path, annotations="t.csv", format="csv", prompts=PROMPTS))
    assert [record.images for record in found] == [("a.jpg",), ("b/c.png",)]
    assert all(said(record)[0][1] == "<image>\nWhat is here?" for record in found)
    assert [said(record)[1][1] for record in found] == [rows[1][1], rows[2][1]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_every_text_comes_back_as_it_was_written(tmp_path: Path, texts: list[str]) -> None:
    rows = [["image", "caption"], *([f"{n}.jpg", text] for n, text in enumerate(texts))]
    write_csv(tmp_path / "t.csv", rows, quoting=csv.QUOTE_ALL)
    found = entries(tmp_path, annotations="t.csv", format="csv")
    answers = [entry.raw["answer"] for entry in found]
    assert answers == texts


def test_questions_ids_and_other_columns(tmp_path: Path) -> None:
    rows = [["id", "image", "question", "answer", "mood"], ["7", "a.jpg", "Who?", "Me", "glad"]]
    write_csv(tmp_path / "t.csv", rows)
    (entry,) = entries(tmp_path, annotations="t.csv", format="csv")
    assert entry.record is not None
    assert entry.sample_id == "src/7"
    assert "Who?" in entry.record.turns[0].text
    assert entry.raw["others"] == {"mood": "glad"}


def test_a_packed_table_with_a_mark_is_read(tmp_path: Path) -> None:
    data = "\ufeffimage,caption\na.jpg,Grüße\n".encode()
    (tmp_path / "t.csv").write_bytes(gzip.compress(data, mtime=0))
    (record,) = records(entries(tmp_path, annotations="t.csv", format="csv"))
    assert said(record)[1][1] == "Grüße"


def test_a_row_of_another_length_is_quarantined_alone(tmp_path: Path) -> None:
    text = "image,caption\na.jpg,one\nb.jpg\nc.jpg,three,more\nd.jpg,four\n"
    (tmp_path / "t.csv").write_text(text)
    found = entries(tmp_path, annotations="t.csv", format="csv")
    assert [entry.verdict.kept for entry in found] == [True, False, False, True]
    assert found[1].verdict.reason == found[2].verdict.reason == Reason.SCHEMA
    assert "line 3: 1 fields; expected 2" in found[1].verdict.detail


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"image,caption,text\na,b,c\n", "answer may be any of the columns caption, text"),
        (b"photo,caption\na,b\n", "none of which is known to hold the image"),
        (b"image\na\n", "none of which is known to hold the answer"),
        (b"image,image,caption\na,b,c\n", "names the column 'image' twice"),
        (b"\n", "line 1 is empty"),
        (b'image,caption\na,"b\n', "no whole CSV"),
        (b"image,caption\na,\xff\xfe\n", "not UTF-8"),
        (b"\xff\xfei\x00m\x00", "not UTF-8"),
    ],
)
def test_what_is_no_table_of_captions_is_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    assert words in refused(tmp_path, annotations="t.csv", format="csv")


def test_columns_are_named_where_their_names_do_not_say(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [["photo", "alt", "caption"], ["a.jpg", "one", "two"]])
    columns = {"image": "photo", "answer": "alt"}
    (record,) = records(entries(tmp_path, annotations="t.csv", format="csv", columns=columns))
    assert record.images == ("a.jpg",)
    assert said(record)[1][1] == "one"
    wrong = {"image": "picture"}
    line = refused(tmp_path, annotations="t.csv", format="csv", columns=wrong)
    assert "has no column 'picture' (image); expected one of photo, alt, caption" in line


def test_parquet_without_conversations_is_a_table(tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": b"x", "path": None}], "caption": ["One"]})
    pq.write_table(table, tmp_path / "t.parquet")
    (record,) = records(entries(tmp_path, annotations="t.parquet", format="parquet"))
    assert record.images == ("t.parquet/image/0",)
    assert said(record)[1][1] == "One"


def test_texts_beside_images(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "day 1"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "two.jpg", "two.png", "alone.webp"):
        (folder / name).touch()
    (folder / "a.txt").write_text("\ufeffA dog. \n")
    (folder / "b.txt").write_text("A cat.")
    (folder / "two.txt").write_text("Which?")
    (folder / "none.txt").write_text("Nothing.")
    (folder / "notes.md").write_text("not read")
    found = entries(tmp_path, annotations="photos/**/*.txt", format="text_files", prompts=PROMPTS)
    kept = {entry.record.images[0]: said(entry.record)[1][1] for entry in found if entry.record}
    assert kept == {"photos/day 1/a.jpg": "A dog.", "photos/day 1/b.PNG": "A cat."}
    details = [entry.verdict.detail for entry in found if not entry.verdict.kept]
    assert len(details) == 3
    assert any("2 images (photos/day 1/two.jpg, photos/day 1/two.png)" in one for one in details)
    assert any("no image beside none.txt" in one for one in details)
    assert any("no alone.txt beside it" in one for one in details)


def test_a_text_that_is_no_text_is_quarantined_alone(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    (tmp_path / "b.txt").write_text("good")
    found = entries(tmp_path, annotations="*.txt", format="text_files", prompts=PROMPTS)
    assert [entry.verdict.kept for entry in found] == [False, True]
    assert "a.txt is not UTF-8" in found[0].verdict.detail
