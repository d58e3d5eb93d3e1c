"""JSON files: every element as `json` itself reads it, or one line that says what is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Reason, TextPart, Turn, Verdict
from lapilli.data.sources import SOURCES, Source, get_source, llava
from lapilli.data.sources.reading import json_scanner, json_stream
from lapilli.data.sources.turns import split_markers

OURS = Source(json_stream.read, llava.normalise)


def read(tmp_path: Path, content: bytes) -> list[Any]:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    return list(json_stream.read_json(path))


def refused(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert str(tmp_path / "file.json") in message
    assert "\n" not in message
    assert len(message) < 600
    return message


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["\ud800", "\0", "]", ",", "\\", '"', "\u2028", "火山", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    elements=st.lists(values, max_size=8),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    window=st.integers(1, 9),
)
def test_an_array_is_read_as_json_reads_it(
    tmp_path: Path, elements: list[Any], indent: int | None, ascii_only: bool, window: int
) -> None:
    """Windows of a few characters cut numbers, escapes and names anywhere."""
    text = json.dumps(elements, indent=indent, ensure_ascii=ascii_only)
    try:
        content = text.encode()
    except UnicodeEncodeError:  # a lone surrogate can only be spelt as an escape
        content = json.dumps(elements, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scanner, "WINDOW", window)
        assert read(tmp_path, content) == json.loads(content)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    elements=st.lists(values, min_size=1, max_size=5),
    cut=st.floats(0, 1, exclude_max=True),
    window=st.integers(1, 9),
)
def test_a_truncated_array_is_refused(
    tmp_path: Path, elements: list[Any], cut: float, window: int
) -> None:
    content = json.dumps(elements).encode()
    content = content[: max(1, int(cut * len(content)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scanner, "WINDOW", window)
        assert "no valid JSON after" in refused(tmp_path, content)


RECORD = {"id": "a", "conversations": []}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([RECORD, RECORD]),
        json.dumps(RECORD) + "\n" + json.dumps(RECORD),
        json.dumps(RECORD) + "\r\n\r\n" + json.dumps(RECORD) + "\r\n",
        "\ufeff" + json.dumps([RECORD, RECORD]),
        "\ufeff" + json.dumps(RECORD) + "\n" + json.dumps(RECORD),
        " " * 5000 + "\n" + json.dumps([RECORD, RECORD], indent=2) + "\n ",
    ],
    ids=["array", "lines", "lines of Windows", "array with BOM", "lines with BOM", "white space"],
)
def test_what_is_read(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content.encode()) == [RECORD, RECORD]


def test_an_empty_array_has_no_element(tmp_path: Path) -> None:
    assert read(tmp_path, b" [ ] ") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download"),
        (b" \n\t ", "a file of white space: get it again"),
        (b"<!DOCTYPE html><html>", "web page: download the raw file (/resolve/ in its address"),
        (b" \n<html>", "web page: download the raw file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "with `git lfs pull`"),
        (b"id,image\n1,a.jpg", "starts with 'i'; expected a JSON array or JSON lines"),
        (b"PK\x03\x04", "starts with 'P'"),
        (b'{\n "data": []\n}', "an object over several lines: write one a line"),
        (b'{"a": 1}\n{"a": ', "line 2 is no valid JSON"),
        (b'{"a": "\xff"}', "line 1 is no valid JSON"),
        (b'[{"a": "\xff"}]', "no valid JSON after 0 records"),
        (b'[{"a": 1}] []', "after 1 records (more text after the end"),
        (b'[{"a": 1} {"a": 2}]', "after 1 records (expected , or ]"),
        (b"[1, 2, ]", "after 2 records"),
        (b'[1, "a\nb"]', "after 1 records (Invalid control character"),
        (json.dumps([RECORD]).encode("utf-16"), "expected a JSON array"),
        (b"[" * 100_000, "nested too deeply to be read, and its end is not found"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path, content)


def test_a_broken_first_record_does_not_draw_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_scanner, "WINDOW", 10)
    file = io.StringIO('["never closed' + "x" * 100_000)
    with pytest.raises(ValueError, match=r"more than 100 bytes.*its end is not found"):
        list(json_stream._array_elements(file, 100))  # pyright: ignore[reportPrivateUsage]
    assert file.tell() < 1000


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json: No such file .*check --root"):
        list(json_stream.read_json(tmp_path / "nowhere.json"))
    with pytest.raises(DataError, match=r"Is a directory; check --root"):
        list(json_stream.read_json(tmp_path))


# ---- one element -------------------------------------------------------------------------------


def said(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns], **fields}


def test_markers_are_places_in_questions_and_text_in_answers() -> None:
    element = said(
        ("system", "See <image>."),
        ("human", "<image>\nWhat? <image>"),
        ("gpt", "An <image> tag."),
        ("human", "And<image>"),
        image=["a.png", "b.png", "c.png"],
    )
    turns = (
        Turn("system", (TextPart("See <image>."),)),
        Turn("user", (ImagePart(0), TextPart("\nWhat? "), ImagePart(1))),
        Turn("assistant", (TextPart("An <image> tag."),)),
        Turn("user", (TextPart("And"), ImagePart(2))),
    )
    assert llava.normalise(element) == (turns, ("a.png", "b.png", "c.png"))


@given(st.lists(st.sampled_from(["<image>", "a", "\n", "<ima", "ge>"]), max_size=8).map("".join))
def test_the_parts_of_a_question_are_its_text(text: str) -> None:
    parts = split_markers(text, 5)
    spelt = "".join(part.text if isinstance(part, TextPart) else "<image>" for part in parts)
    assert spelt == text
    places = [part.index for part in parts if isinstance(part, ImagePart)]
    assert places == list(range(5, 5 + text.count("<image>")))


@pytest.mark.parametrize(
    ("image", "keys"),
    [("a.png", ("a.png",)), (["a", "a"], ("a", "a")), ([], ()), (None, ()), ("", ("",))],
)
def test_images_are_a_key_a_list_or_none(image: Any, keys: tuple[str, ...]) -> None:
    assert llava.normalise(said(("human", "?"), image=image)) == (
        (Turn("user", (TextPart("?"),)),),
        keys,
    )


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (None, Reason.SCHEMA),
        ([], Reason.SCHEMA),
        ({}, Reason.SCHEMA),
        ({"conversations": None}, Reason.SCHEMA),
        ({"conversations": ["Why?"]}, Reason.SCHEMA),
        ({"conversations": [{"from": "human"}]}, Reason.SCHEMA),
        ({"conversations": [{"from": 1, "value": "a"}]}, Reason.SCHEMA),
        (said(image={"key": "a"}), Reason.SCHEMA),
        (said(image=["a", None]), Reason.SCHEMA),
        (said(("user", "?")), Reason.UNKNOWN_ROLE),
        (said(("Human", "?")), Reason.UNKNOWN_ROLE),
    ],
)
def test_what_is_no_record_has_a_verdict(element: Any, reason: Reason) -> None:
    verdict = llava.normalise(element)
    assert isinstance(verdict, Verdict)
    assert verdict.reason == reason
    assert verdict.detail


# ---- readers by name ---------------------------------------------------------------------------


def test_readers_are_found_by_name() -> None:
    assert get_source("llava") is SOURCES["llava"]
    assert get_source(f"{__name__}:OURS") is OURS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lava", "format: 'lava' is unknown; expected one of ai_challenger, .*llava.*, or package"),
        ("", "is unknown"),
        ("json:", "is unknown"),
        (":loads", "is unknown"),
        ("..json:loads", "is unknown"),
        ("nowhere_at_all:read", "does not import"),
        ("json:nothing", "does not import"),
        ("json:loads", "is a function; expected a Source"),
    ],
)
def test_a_wrong_name_says_what_is_known(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        get_source(name)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-a"])
def test_a_source_has_a_name_that_sample_ids_can_start_with(name: str) -> None:
    with pytest.raises(DataError, match=r"sources.name: .*; expected letters"):
        SourceConfig(name, "a.json")
