"""No field is ignored: read, known to be harmless, counted by name, or the record's verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.config import SourceConfig
from lapilli.data.record import Entry, ImagePart, Turn
from lapilli.data.sources.tally import MOST_NAMES, OTHER_NAMES, Tally
from lapilli.data.sources.validation import read_entries
from tests.data.source_files import image_url, message, pair, said, text, write_parquet, write_tar
from tests.factories import conversation


def read(root: Path, elements: list[Any], form: str, **config: Any) -> tuple[list[Entry], Tally]:
    """The entries of a file of these elements, and what was counted."""
    (root / "a.json").write_text(json.dumps(elements))
    tally = Tally()
    source = SourceConfig("s", "a.json", format=form, **config)
    return list(read_entries(source, root, tally=tally)), tally


def one(root: Path, element: Any, form: str = "messages", **config: Any) -> tuple[Entry, Tally]:
    (entry,), tally = read(root, [element], form, **config)
    return entry, tally


def turns_of(entry: Entry) -> list[Turn]:
    assert entry.record is not None, entry.verdict
    assert entry.verdict.kept, entry.verdict
    return list(entry.record.turns)


HI = message("Hi", "Hello")


def with_turn(form: str, **fields: Any) -> dict[str, Any]:
    """A record whose answer has these fields too, and a second one that has not."""
    names = {
        "messages": ("role", "content", "user", "assistant"),
        "llava": ("from", "value", "human", "gpt"),
    }[form]
    speaker, content, user, assistant = names
    turns = [{speaker: who, content: f"{who} {n}"} for n in (1, 2) for who in (user, assistant)]
    turns[1].update(fields)
    return {"messages" if form == "messages" else "conversations": turns}


# ---- read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["messages", "llava"])
@pytest.mark.parametrize(
    ("fields", "trains"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"train": False}, False),
        ({"weight": None}, True),
        ({"weight": 0, "loss": False}, False),
    ],
)
def test_a_turn_says_whether_it_is_trained(
    tmp_path: Path, form: str, fields: dict[str, Any], trains: bool
) -> None:
    entry, tally = one(tmp_path, with_turn(form, **fields), form)
    assert [turn.trains for turn in turns_of(entry)] == [True, trains, True, True]
    assert not tally.fields


@pytest.mark.parametrize("form", ["messages", "llava"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": 0.5}, "`weight` is 0.5; expected 0 or 1"),
        ({"weight": "0"}, "`weight` is '0'"),
        ({"train": -1}, "`train` is -1"),
        ({"weight": 1, "loss": False}, "`weight` and `loss` contradict each other"),
        ({"loss_mask": [0, 1]}, "`loss_mask` of turn 1"),
        ({"trainable": False}, "`trainable` of turn 1"),
        ({"tool_calls": [{"function": {"name": "w"}}]}, "`tool_calls` of turn 1"),
        ({"thinking": "So it is."}, "`thinking` of turn 1"),
        ({"reasoning_content": "So it is."}, "`reasoning_content`"),
        ({"sound_file": "a.wav"}, "`sound_file` of turn 1"),
    ],
)
def test_what_a_turn_says_that_cannot_be_followed(
    tmp_path: Path, form: str, fields: dict[str, Any], words: str
) -> None:
    entry, _ = one(tmp_path, with_turn(form, **fields), form)
    assert entry.verdict.reason == "unsupported_field"
    assert words in entry.verdict.detail


def test_a_question_is_never_trained_and_no_answer_is_a_verdict(tmp_path: Path) -> None:
    element = message("Hi", "Hello")
    element["messages"][0]["weight"] = 1
    assert "only answers are trained" in one(tmp_path, element)[0].verdict.detail
    element["messages"][0]["weight"] = 0
    assert one(tmp_path, element)[0].verdict.kept
    element["messages"][1]["weight"] = 0
    assert one(tmp_path, element)[0].verdict.reason == "no_trained_token"


@pytest.mark.parametrize("form", ["messages", "llava", "texts"])
def test_a_system_text_beside_the_turns_stands_first(tmp_path: Path, form: str) -> None:
    elements: dict[str, dict[str, Any]] = {
        "messages": message("Hi", "Hello"),
        "llava": conversation("a"),
        "texts": {"texts": [{"user": "Hi", "assistant": "Hello"}]},
    }
    element = elements[form]
    entry, tally = one(tmp_path, {**element, "system": "You are a pirate."}, form)
    assert said(entry.record)[0] == ("system", "You are a pirate.") if entry.record else False
    assert entry.verdict.kept
    assert not tally.fields
    without, _ = one(tmp_path, {**element, "system": " "}, form)
    assert turns_of(without)[0].role == "user"


def test_a_system_text_that_says_another_thing_than_the_turn_is_a_verdict(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *message("Hi", "Hello")["messages"]]
    for system, reason in (("Be brief.", None), ("Be long.", "schema"), ({"a": 1}, "schema")):
        entry, _ = one(tmp_path, {"messages": turns, "system": system})
        assert entry.verdict.reason == reason
        assert entry.verdict.kept is (reason is None)


@pytest.mark.parametrize("name", ["image", "images", "image_path", "image_paths"])
def test_an_image_may_be_under_each_of_its_names(tmp_path: Path, name: str) -> None:
    entry, tally = one(
        tmp_path, {**conversation("a", "x"), "image": None, name: "x/a.jpg"}, "llava"
    )
    assert entry.record is not None
    assert entry.record.images == ("x/a.jpg",)
    assert not tally.fields


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        ({"image": "a.jpg", "images": ["a.jpg"]}, ("a.jpg",)),
        ({"image": "a.jpg", "image_path": "/data/x/a.jpg"}, ("a.jpg",)),
        ({"image": "a.jpg", "images": ["b.jpg"]}, None),
        ({"images": ["a.jpg"], "image_path": "b.jpg"}, None),
        ({"image": {"bytes": None, "path": "a.jpg"}}, ("a.jpg",)),
        ({"image": {"bytes": "/9j/4AAQ", "path": "a.jpg"}}, None),
    ],
)
def test_names_of_images_that_differ_are_a_verdict(
    tmp_path: Path, fields: dict[str, Any], images: tuple[str, ...] | None
) -> None:
    entry, _ = one(tmp_path, {**conversation("a", "x"), **fields}, "llava")
    assert (None if entry.record is None else entry.record.images) == images
    assert entry.verdict.reason == (None if images else "schema")


@pytest.mark.parametrize(
    ("content", "own", "shown"),
    [
        ("what is it?", ["a.jpg"], "<image>\nwhat is it?"),
        ("<image>what?", "a.jpg", "<image>what?"),
        ("is <image> or <image>?", ["a.jpg", "b.jpg"], "is <image> or <image>?"),
        ([text("See "), {"type": "image"}], ["a.jpg"], "See <image>"),
        ("", ["a.jpg"], "<image>"),
    ],
)
def test_a_message_may_bring_its_images(tmp_path: Path, content: Any, own: Any, shown: str) -> None:
    element = message("Hi", "Hello", content, "Red.", [image_url("c.jpg")], "Blue.")
    element["messages"][2]["images"] = own
    entry, _ = one(tmp_path, element)
    assert entry.record is not None
    assert entry.record.images == (*([own] if isinstance(own, str) else own), "c.jpg")
    assert said(entry.record)[2] == ("user", shown)
    indices = [p.index for t in turns_of(entry) for p in t.parts if isinstance(p, ImagePart)]
    assert indices == list(range(len(entry.record.images)))


@pytest.mark.parametrize(
    ("place", "content", "reason"),
    [
        (0, "<image><image>?", "image_marker_count"),
        (0, [image_url("b.jpg")], "image_marker_count"),
        (1, "Hello", "image_marker_count"),
    ],
)
def test_a_messages_images_and_places_must_agree(
    tmp_path: Path, place: int, content: Any, reason: str
) -> None:
    element = message("Hi", "Hello")
    element["messages"][place].update(content=content, images=["a.jpg"])
    assert one(tmp_path, element)[0].verdict.reason == reason


def test_parts_of_trl_and_of_openais_responses(tmp_path: Path) -> None:
    """Every part of a Parquet file has every key, most of them null."""
    none = {"text": None, "index": None}
    parts = [{"type": "text", "text": "See ", "index": None}, {**none, "type": "image", "index": 0}]
    entry, tally = one(tmp_path, message(parts, "So.", images=["a.jpg"]))
    assert entry.record is not None
    assert (said(entry.record)[0][1], entry.record.images) == ("See <image>", ("a.jpg",))
    parts = [{"type": "input_text", "text": "See "}, {"type": "input_image", "image_url": "a.jpg"}]
    answer = [{"type": "output_text", "text": "So.", "annotations": []}]
    entry, other = one(tmp_path, message(parts, answer))
    assert entry.record is not None
    assert (said(entry.record)[1][1], entry.record.images) == ("So.", ("a.jpg",))
    assert not tally.fields
    assert not other.fields


# ---- roles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["llava", "messages", "parquet", "webdataset"])
def test_a_recipe_says_who_speaks(tmp_path: Path, form: str) -> None:
    """Qwen-VL's `from: user` in LLaVA's format, and names that nobody else has."""
    speaker, content = ("from", "value") if form != "messages" else ("role", "content")
    turns = [
        {speaker: who, content: what}
        for who, what in (("rules", "Be brief."), ("user", "Hi"), ("bot", "Hello"))
    ]
    element = {"id": "a", ("messages" if form == "messages" else "conversations"): turns}
    (tmp_path / "a.json").write_text(json.dumps([element]))
    write_parquet(tmp_path / "a.parquet", [element])
    write_tar(tmp_path / "a.tar", [{"__key__": "a", "json": json.dumps(element).encode()}])
    name = {"parquet": "a.parquet", "webdataset": "a.tar"}.get(form, "a.json")
    roles: Any = {"rules": "system", "user": "user", "bot": "assistant"}
    cases: list[tuple[Any, str | None]] = [
        (roles, None),
        ({}, "unknown_role"),
        ({"user": "user"}, "unknown_role"),
    ]
    for mapping, reason in cases:
        source = SourceConfig("s", name, format=form, roles=mapping)
        (entry,) = read_entries(source, tmp_path)
        assert entry.verdict.reason == reason
        if reason is None:
            assert [turn.role for turn in turns_of(entry)] == ["system", "user", "assistant"]
        else:
            assert "`roles`, e.g. {" in entry.verdict.detail
        assert json.loads(entry.raw_json) is not None


@pytest.mark.parametrize("role", ["tool", "function", "observation", "function_call"])
@pytest.mark.parametrize("form", ["messages", "llava"])
def test_a_tools_turn_is_unsupported(tmp_path: Path, role: str, form: str) -> None:
    element = with_turn(form)
    (turns,) = element.values()
    turns[1]["role" if form == "messages" else "from"] = role
    entry, _ = one(tmp_path, element, form)
    assert entry.verdict.reason == "unsupported_field"
    assert f"'{role}'" in entry.verdict.detail


# ---- counted, or a verdict ---------------------------------------------------------------------

MEANING: dict[str, Any] = {
    "tools": '[{"name": "weather"}]', "functions": [{"name": "w"}], "history": [["q", "a"]],
    "video": "a.mp4", "videos": ["a.mp4"], "audio": "a.wav", "audios": ["a.wav"], "speech": "a.wav",
    "objects": {"bbox": [[1, 2, 3, 4]]}, "bbox": [1, 2, 3, 4], "boxes": "[[1, 2, 3, 4]]",
    "rejected": "No.", "chosen": "Yes.", "rejected_response": "No.", "kto_tag": True,
    "non_preferred_output": [{}, {"role": "assistant", "content": "No."}], "label": False,
    "weight": 0, "loss": False, "loss_scale": 0.5, "reasoning": "So it is.",
    "Image": "a.jpg", "img": ["a.png"], "file_name": "x/a.webp", "image_id": "1.jpg",
    "picture": "data:image/png;base64,AAAA", "Tools": [{"name": "w"}], "BBox": [1, 2, 3, 4],
    "jpg": "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBD", "image_base64": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB",
    "pixel_file": {"bytes": "AAAA", "path": None},
}  # fmt: skip


# Counted when they are empty, or wishes that an empty value is none of.
NEVER_EMPTY = {"label", "kto_tag", "weight", "loss", "loss_scale", "Image", "img", "picture",
               "pixel_file", "Tools", "BBox", "jpg", "image_base64"}  # fmt: skip


@pytest.mark.parametrize("form", ["messages", "llava", "texts"])
@pytest.mark.parametrize("name", MEANING)
def test_what_changes_the_meaning_is_a_verdict_that_names_the_field(
    tmp_path: Path, name: str, form: str
) -> None:
    elements = {
        "messages": HI,
        "llava": conversation("a"),
        "texts": {"texts": [{"user": "Hi", "assistant": "Hello"}]},
    }
    entry, tally = one(tmp_path, {**elements[form], name: MEANING[name]}, form)
    assert entry.verdict.reason == "unsupported_field"
    assert f"`{name}`" in entry.verdict.detail
    assert not tally.fields
    for empty in (None, [], "", {}):
        if empty is None or name not in NEVER_EMPTY:
            entry, tally = one(tmp_path, {**elements[form], name: empty}, form)
            assert entry.verdict.kept
            assert not tally.fields


@pytest.mark.parametrize(
    "value",
    [
        "<video>\nWhat happens?",
        "Picture 1: <img>a.jpg</img>\nWhat?",
        "<audio>a.wav</audio>Who?",
        "What is in <video>?",
        "<|vision_start|><|image_pad|><|vision_end|>What?",
        "<|audio|>Who?",
        "<|image|>What?",
        "<|video_pad|>What happens?",
    ],
)
@pytest.mark.parametrize("form", ["messages", "llava", "texts"])
def test_tags_of_media_in_a_question_are_a_verdict(tmp_path: Path, value: str, form: str) -> None:
    elements = {
        "messages": message(value, "So."),
        "llava": {
            "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "So."}]
        },
        "texts": {"texts": [{"user": value, "assistant": "So."}]},
    }
    entry, _ = one(tmp_path, elements[form], form)
    assert entry.verdict.reason == "unsupported_field"
    assert "stands for a medium" in entry.verdict.detail


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does <video> do?", "It is closed by </video>."),
        ("Mend <video>\n<source src='a.mp4'></video>", "So."),
        ("Mend <img src='a.jpg'>", "<img>a.jpg</img>"),
        ("Explain <|im_end|> in <|images|>?", "<|image_pad|> is a token."),
        ("Where is <ref>the goat</ref><box>(1,2),(3,4)</box>? [0.1, 0.2]", "<video> is a tag."),
    ],
)
def test_html_and_boxes_in_a_text_are_text(tmp_path: Path, question: str, answer: str) -> None:
    entry, _ = one(tmp_path, message(question, answer))
    if question.startswith("What"):  # nothing tells it from a placeholder
        assert entry.verdict.reason == "unsupported_field"
    else:
        assert said(entry.record)[0] == ("user", question) if entry.record else False
        assert entry.verdict.kept


def test_published_sets_have_no_field_that_is_not_read(tmp_path: Path) -> None:
    """Fields as 665K, ShareGPT4V, InternVL, LLaVA-OneVision, OpenAI's chat and others have them."""
    one_turn = {"markdown": None, "text": None}
    shared = conversation("a")
    shared["conversations"][0] |= one_turn
    records = [
        {**conversation("a", "x.jpg"), "model": ""},
        {**shared, "model": "gpt-4"},
        {**conversation("b", "x.jpg"), "width": 1, "height": 2, "data_source": "x"},
        {**conversation("c", ["x.jpg", "y.jpg"]), "width_list": [1, 2], "height_list": [3, 4]},
        {**conversation("d", "x.jpg"), "image_id": "x.jpg", "question_id": 7, "category": "conv"},
        {**conversation("e"), "video": None, "type": "conv", "source": "sharegpt", "url": "a.com"},
    ]
    found, tally = read(tmp_path, records, "llava")
    assert [str(entry.verdict.reason) for entry in found] == ["None"] * len(records)
    assert not tally.fields
    openai = message("Hi", "Hello")
    openai["messages"][1] |= {"refusal": None, "annotations": [], "tool_calls": None, "name": "b"}
    found, tally = read(
        tmp_path, [{**openai, "tools": [], "parallel_tool_calls": True}], "messages"
    )
    assert found[0].verdict.kept
    assert not tally.fields


def test_other_fields_are_counted_by_name_where_they_are(tmp_path: Path) -> None:
    element = message([{"type": "text", "text": "Hi", "mood": 1}], "Hello", mood="calm")
    element["messages"][1]["mood"] = 2
    _, tally = read(tmp_path, [element, element, {**HI, "mood": ""}], "messages")
    assert tally.fields == {"mood": 3, "messages.mood": 2, "messages.content.mood": 2}
    _, tally = read(tmp_path, [{**HI, f"field {n}": 1} for n in range(1000)], "messages")
    assert len(tally.fields) == MOST_NAMES + 1
    assert tally.fields[OTHER_NAMES] == 1000 - MOST_NAMES


def test_fields_of_captions_are_counted(tmp_path: Path) -> None:
    captions: list[dict[str, Any]] = [
        {"image_id": "1.jpg", "caption": ["A", "B"], "mood": 1, "url": "a.com"}
    ]
    found, tally = read(tmp_path, captions, "ai_challenger")
    assert len(found) == 2
    assert tally.fields == {"mood": 2}
    captions[0]["tools"] = [{"name": "weather"}]
    found, _ = read(tmp_path, captions, "ai_challenger")
    assert {entry.verdict.reason for entry in found} == {"unsupported_field"}
    image_map = {"a": {"image_file": "1.jpg", "ID": 1, "bbox": [1, 2]}}
    (entry,) = pair(tmp_path, json.dumps(image_map), json.dumps({"1": {"q": "?", "a": ["A"]}}))
    assert entry.verdict.reason == "unsupported_field"
    sample = {"caption": "A goat.", "mood": 1, "url": "a.com", "key": "0", "status": "success"}
    write_tar(
        tmp_path / "0.tar", [{"__key__": "0", "jpg": b"", "json": json.dumps(sample).encode()}]
    )
    tally = Tally()
    list(read_entries(SourceConfig("s", "0.tar", format="webdataset"), tmp_path, tally=tally))
    assert tally.fields == {"mood": 1}


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["a.jpg", "[]", "data:image/png", "<video>"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["bytes", "path", "url", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)
known_names = sorted(set(MEANING) - {"file_name", "image_id"})
field_names = st.sampled_from(known_names) | st.text(max_size=6).map("~{}".format)


def says_nothing(value: Any) -> bool:
    """Null, or nothing but what is empty."""
    if isinstance(value, list):
        return all(map(says_nothing, value))
    if isinstance(value, dict):
        return all(map(says_nothing, value.values()))
    if isinstance(value, str):
        return value.strip() in ("", "[]")
    return value is None or value is False


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    form=st.sampled_from(["messages", "llava"]),
    level=st.sampled_from(["record", "turn"]),
    name=field_names,
    value=anything,
)
def test_any_field_is_counted_or_a_verdict_or_says_nothing(
    tmp_path: Path, form: str, level: str, name: str, value: Any
) -> None:
    element = with_turn(form)
    (turns,) = element.values()
    (element if level == "record" else turns[1])[name] = value
    entry, tally = one(tmp_path, element, form)
    counted = tally.fields.total() == 1
    assert counted or not tally.fields
    assert entry.verdict.detail.isprintable()
    if entry.verdict.kept and not counted:
        is_read = name in ("weight", "loss") and (value == 1 or level == "turn")
        assert value is None if name.startswith("~") else says_nothing(value) or is_read
    if entry.verdict.kept:
        assert [turn.parts for turn in turns_of(entry)] == [
            turn.parts for turn in turns_of(one(tmp_path, with_turn(form), form)[0])
        ]
