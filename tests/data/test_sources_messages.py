"""Messages with role and content, and sources of several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, TextPart, Turn
from tests.data.source_files import (
    MIXED,
    entries,
    image_url,
    message,
    records,
    refused,
    said,
    text,
    write_lines,
)
from tests.factories import conversation

# ---- role and content --------------------------------------------------------------------------


def test_vlm_trainings_lines_say_what_llavas_records_say(tmp_path: Path) -> None:
    """Its preparation renames `from` and `value`, and pandas makes a missing image null."""
    write_lines(tmp_path / "llava.json", MIXED)
    write_lines(
        tmp_path / "vlm.json",
        [
            {
                "id": record["id"],
                "image": record.get("image"),
                "hf_format_conversations": [
                    {"role": turn["from"], "content": turn["value"]}
                    for turn in record["conversations"]
                ],
            }
            for record in MIXED
        ],
    )
    ours = records(entries(tmp_path, annotations="vlm.json", format="messages"))
    assert ours == records(entries(tmp_path, annotations="llava.json"))


@pytest.mark.parametrize(
    ("element", "images", "question"),
    [
        (
            message([text("See "), image_url({"url": "a.png"}), text("?")], "So."),
            ("a.png",),
            "See <image>?",
        ),
        (message([image_url("file://b/a.png")], "So."), ("b/a.png",), "<image>"),
        (message([{"type": "image", "image": "a.png"}], "So."), ("a.png",), "<image>"),
        (message([{"type": "image"}, text("?")], "So.", images=["a.png"]), ("a.png",), "<image>?"),
        (message("<image>?", "So.", images=["a.png"]), ("a.png",), "<image>?"),
        (message([image_url({"url": "a.png"})], "So.", images=["a.png"]), ("a.png",), "<image>"),
        (message("Why?", "An <image> tag."), (), "Why?"),
    ],
)
def test_where_messages_have_their_images(
    tmp_path: Path, element: Any, images: tuple[str, ...], question: str
) -> None:
    write_lines(tmp_path / "a.jsonl", [element])
    (record,) = records(entries(tmp_path, annotations="a.jsonl", format="messages"))
    assert record.images == images
    assert said(record)[0] == ("user", question)


def test_a_marker_inside_a_part_is_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [message([text("Write <image>.")], "So.")])
    (record,) = records(entries(tmp_path, annotations="a.jsonl", format="messages"))
    assert record.turns[0] == Turn("user", (TextPart("Write <image>."),))


def test_the_system_may_be_called_developer(tmp_path: Path) -> None:
    turns = [{"role": "developer", "content": "Be brief."}, *message("Why?", "So.")["messages"]]
    write_lines(tmp_path / "a.jsonl", [{"messages": turns}])
    (record,) = records(entries(tmp_path, annotations="a.jsonl", format="messages"))
    assert said(record)[0] == ("system", "Be brief.")


def test_an_image_part_keeps_its_place(tmp_path: Path) -> None:
    element = message([image_url("a"), text("x"), image_url("b")], "y", [image_url("c")], "z")
    write_lines(tmp_path / "a.jsonl", [element])
    (record,) = records(entries(tmp_path, annotations="a.jsonl", format="messages"))
    places = [p.index for t in record.turns for p in t.parts if isinstance(p, ImagePart)]
    assert (places, record.images) == ([0, 1, 2], ("a", "b", "c"))


@pytest.mark.parametrize(
    ("element", "reason", "detail"),
    [
        (
            message([image_url({"url": "data:image/png;base64,AAAA"})], "So."),
            "schema",
            "inside the record",
        ),
        (message([image_url("https://e.org/a.png")], "So."), "image_missing", "download it"),
        (message([image_url({"detail": "low"})], "So."), "schema", "without a path"),
        (message([image_url({"url": 7})], "So."), "schema", "without a path"),
        (message([{"type": "video", "video": "a.mp4"}], "So."), "unsupported_field", "`video`"),
        (message([{"type": "text"}], "So."), "schema", "'text'"),
        (message(["So"], "So."), "schema", "None"),
        (message("Why?", None), "schema", "turn 1: `content` is a NoneType"),
        (message([{"type": "image"}, image_url("a.png")], "So."), "schema", "one of the two"),
        (message([image_url("a.png")], "So.", images=["b.png"]), "schema", "one of the two"),
        (message("<image>?", "So."), "image_marker_count", "1 markers for 0"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "unsupported_field", "'tool'"),
        ({"messages": [{"from": "human", "value": "?"}]}, "schema", "`format: llava` reads from"),
        ({"messages": ["Why?"]}, "schema", "turn 0: expected an object"),
        ({"messages": None}, "schema", "expected a list"),
        ({}, "schema", "expected a list"),
        ("text", "schema", "expected an object, found str"),
    ],
)
def test_what_is_wrong_with_messages(
    tmp_path: Path, element: Any, reason: str, detail: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([element]))
    (entry,) = entries(tmp_path, annotations="a.json", format="messages")
    assert entry.verdict.reason == reason
    assert detail in entry.verdict.detail


# ---- several files -----------------------------------------------------------------------------


def test_a_source_may_be_several_files(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        write_lines(tmp_path / f"part-{number:02d}.jsonl", [conversation(f"r{number}")])
    everything = ["src/r1", "src/r2", "src/r10"]
    for several in (
        "part-*.jsonl",
        ["part-01.jsonl", "part-02.jsonl", "part-10.jsonl"],
        ["part-0*.jsonl", "part-1?.jsonl"],
        str(tmp_path / "part-*.jsonl"),
    ):
        found = entries(tmp_path, annotations=several)
        assert [entry.sample_id for entry in found] == everything


def test_a_name_with_a_globs_letters_is_a_name_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "a[1].jsonl", [conversation("b")])
    assert len(entries(tmp_path, annotations="a[1].jsonl")) == 1


def test_no_file_and_a_file_twice_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.json", MIXED)
    assert "no file matches '*.jsonl'" in refused(tmp_path, annotations="*.jsonl")
    assert "named twice" in refused(tmp_path, annotations=["a.json", "*.json"])
    assert "nowhere.json: No such file" in refused(tmp_path, annotations=["nowhere.json"])
    for nothing in ("", [], [""]):
        with pytest.raises(DataError, match=r"sources.annotations: .* expected a file, a glob"):
            SourceConfig("src", nothing)
