"""Records to verdicts, ids to sample ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.config import SourceConfig
from lapilli.data.record import Entry, ImagePart, Part, Reason, Record, TextPart, Turn, excerpt
from lapilli.data.sources.validation import check_record, read_entries
from tests.factories import conversation

LETTERS = {"s": "system", "u": "user", "a": "assistant"}


def record(roles: str, images: tuple[str, ...] = (), **texts: str) -> Record:
    """A record whose turns are the letters' roles; `u0="..."` is the text of turn 0."""
    turns = tuple(
        Turn(LETTERS[letter], (TextPart(texts.get(f"{letter}{place}", "text")),))  # type: ignore[arg-type]
        for place, letter in enumerate(roles)
    )
    return Record("r", "s/r", "s", turns, images)


@given(st.text("sua", max_size=7))
def test_turns_are_judged_as_a_grammar_would(roles: str) -> None:
    """s? a? (u a)+ is kept; nothing behind s? a? is `no_turns`; the rest is `turn_order`."""
    verdict = check_record(record(roles))
    if re.fullmatch("s?a?(ua)+", roles):
        assert verdict.kept
    elif re.fullmatch("s?a?", roles):
        assert verdict.reason == Reason.NO_TURNS
    else:
        assert verdict.reason == Reason.TURN_ORDER
    assert verdict.kept or verdict.detail


@pytest.mark.parametrize("answer", ["", " ", "\n\t", "\u3000", "\xa0"])
def test_a_blank_answer_is_empty(answer: str) -> None:
    verdict = check_record(record("uaua", a3=answer))
    assert verdict.reason == Reason.EMPTY_ANSWER
    assert "turn 3" in verdict.detail


def test_an_answer_nobody_asked_for_may_be_blank() -> None:
    assert check_record(record("aua", a0="")).kept


@pytest.mark.parametrize(
    ("marked", "images", "kept"),
    [
        ([], 0, True),
        ([0], 1, True),
        ([0, 1, 2], 3, True),
        ([], 1, False),
        ([0], 0, False),
        ([0, 0], 2, False),
        ([1, 0], 2, False),
        ([1, 2], 2, False),
    ],
)
def test_each_image_is_marked_once_and_in_order(marked: list[int], images: int, kept: bool) -> None:
    parts: tuple[Part, ...] = (*map(ImagePart, marked), TextPart("Why?"))
    turns = (Turn("user", parts), Turn("assistant", (TextPart("So."),)))
    verdict = check_record(Record("r", "s/r", "s", turns, ("a.png",) * images))
    assert verdict.reason == (None if kept else Reason.IMAGE_MARKER_COUNT)


def test_an_image_where_templates_look_for_none_is_not_marked() -> None:
    turns = (
        Turn("assistant", (ImagePart(0),)),
        Turn("user", (TextPart("Why?"),)),
        Turn("assistant", (TextPart("So."),)),
    )
    verdict = check_record(Record("r", "s/r", "s", turns, ("a.png",)))
    assert verdict.reason == Reason.IMAGE_MARKER_COUNT


@pytest.mark.parametrize(
    "broken", [record("ua", u0="a\ud800"), record("ua", a1="\udfff"), record("ua", ("\ud800",))]
)
def test_text_that_no_file_can_hold_is_a_matter_of_schema(broken: Record) -> None:
    assert check_record(broken).reason == Reason.SCHEMA


def test_nul_and_rare_letters_are_text() -> None:
    assert check_record(record("ua", u0="\0", a1="\U0001f30b\u2028\ufffe")).kept


# ---- entries -----------------------------------------------------------------------------------


def entries(tmp_path: Path, elements: list[Any]) -> list[Entry]:
    (tmp_path / "a.json").write_text(json.dumps(elements))
    return list(read_entries(SourceConfig("src", "a.json"), tmp_path))


def ids(tmp_path: Path, found: list[Any]) -> list[tuple[str, str]]:
    elements = [{"id": name, "conversations": []} for name in found]
    return [(entry.record_id, entry.sample_id) for entry in entries(tmp_path, elements)]


def test_ids_are_kept_as_text(tmp_path: Path) -> None:
    assert ids(tmp_path, ["a", 7, 1.5, "0007", "x/y", "é"]) == [
        ("a", "src/a"),
        ("7", "src/7"),
        ("1.5", "src/1.5"),
        ("0007", "src/0007"),
        ("x/y", "src/x/y"),
        ("é", "src/é"),
    ]


def test_what_has_no_id_is_called_by_its_place(tmp_path: Path) -> None:
    found = entries(tmp_path, ["text", None, {"id": ""}, {"id": None}, {"id": ["a"]}, {}, []])
    assert [entry.record_id for entry in found] == [f"@{place}" for place in range(7)]
    assert all(entry.verdict.reason == Reason.SCHEMA for entry in found)


def test_repeated_ids_get_a_number(tmp_path: Path) -> None:
    found = [sample_id for _, sample_id in ids(tmp_path, ["a", "a", "b", "a#2", "a", 1, "1"])]
    assert found == ["src/a", "src/a#2", "src/b", "src/a#2#2", "src/a#3", "src/1", "src/1#2"]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    found=st.lists(
        st.sampled_from(["a", "a#2", "a#3", "a#2#2", "@0", "@1", 1, "1", None, "\ud800", "\\ud800"])
        | st.text(max_size=3),
        max_size=12,
    )
)
def test_sample_ids_are_unique_and_can_be_written(tmp_path: Path, found: list[Any]) -> None:
    samples = [sample_id for _, sample_id in ids(tmp_path, found)]
    assert len(set(samples)) == len(found)
    assert all(sample.startswith("src/") and sample.encode() for sample in samples)


def test_a_very_long_id_is_kept_whole(tmp_path: Path) -> None:
    assert ids(tmp_path, ["x" * 100_000]) == [("x" * 100_000, "src/" + "x" * 100_000)]


def test_the_element_is_kept_for_the_quarantine(tmp_path: Path) -> None:
    elements: list[Any] = [{"id": "a", "more": [1, "\ud800"]}, "text"]
    assert [json.loads(entry.raw_json) for entry in entries(tmp_path, elements)] == elements


def test_an_element_too_deep_to_write_has_json_all_the_same() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    entry = Entry("s", "r", "s/r", deep, None)
    assert "nested too deeply" in json.loads(entry.raw_json)


@given(st.text())
def test_an_excerpt_is_one_printable_line(text: str) -> None:
    shown = excerpt(text, most=20)
    assert shown.isprintable()
    assert len(shown) <= 20 * len("\\U0001f30b") + 3
    shown.encode()  # raises for a lone surrogate
    if len(text) <= 20 and text.isprintable():
        assert shown == text


def test_the_folder_of_another_machine_is_taken_off(tmp_path: Path) -> None:
    keys = ["/home/u/data/coco/1.jpg", "/home/v/1.jpg", "coco/1.jpg"]
    elements = [conversation(n, key) for n, key in enumerate(keys)]
    (tmp_path / "a.json").write_text(json.dumps(elements))
    config = SourceConfig("src", "a.json", path_prefix="/home/u/data")
    found = [entry.record for entry in read_entries(config, tmp_path)]
    assert [record.images for record in found if record] == [
        ("coco/1.jpg",),
        ("/home/v/1.jpg",),
        ("coco/1.jpg",),
    ]


@settings(deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant"]),
            st.lists(st.text() | st.integers(0, 2**40) | st.just("\ud800"), max_size=4),
        ),
        max_size=5,
    ),
    images=st.lists(st.text(), max_size=3),
    names=st.tuples(st.text(), st.text(), st.text()),
)
def test_a_packed_entry_has_its_record(
    turns: list[tuple[Any, list[Any]]], images: list[str], names: tuple[str, str, str]
) -> None:
    made = tuple(
        Turn(role, tuple(TextPart(p) if isinstance(p, str) else ImagePart(p) for p in parts))
        for role, parts in turns
    )
    record = Record(*names, made, tuple(images))
    entry = Entry("s", "r", "s/r", {"a": 1}, record)
    packed = entry.pack()
    assert packed.record == record
    assert packed.raw_json is None  # it is kept: its element stays in its file
    assert packed.digest != Entry("s", "r", "s/r", {"a": 2}, record).pack().digest


def test_a_packed_entry_that_is_not_kept_has_its_element(tmp_path: Path) -> None:
    (entry,) = entries(tmp_path, [{"id": "a", "conversations": []}])
    packed = entry.pack()
    assert packed.raw_json == entry.raw_json
    assert packed.verdict == entry.verdict
