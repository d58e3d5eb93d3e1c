from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Record, Role, TextPart, Turn
from lapilli.data.text.rendering import (
    ImageSlot,
    Segment,
    SpecialToken,
    TextSegment,
    mark_images,
    render,
)
from lapilli.data.text.templates import TEMPLATES, Template, get_template

SYSTEM = TEMPLATES["v1"].system


def turn(role: Role, *parts: str | int) -> Turn:
    """A turn of texts (str) and images (int)."""
    made: list[Part] = [TextPart(p) if isinstance(p, str) else ImagePart(p) for p in parts]
    return Turn(role, tuple(made))


def record(*turns: Turn) -> Record:
    images = sum(isinstance(p, ImagePart) for t in turns for p in t.parts)
    return Record("r", "s/r", "s", turns, tuple(f"{i}.jpg" for i in range(images)))


def trained_text(segments: list[Segment]) -> list[str]:
    """Trained text and trained special tokens (in braces), in order."""
    found: list[str] = []
    for segment in segments:
        if isinstance(segment, TextSegment):
            found += [segment.text[start:end] for start, end in segment.trained]
        elif isinstance(segment, SpecialToken) and segment.trained:
            found.append(f"{{{segment.name}}}")
    return found


def test_v1_of_two_rounds() -> None:
    segments = render(
        record(
            turn("user", 0, "\nWhat?"),
            turn("assistant", "A cat."),
            turn("user", "Sure?"),
            turn("assistant", "Yes."),
        ),
        TEMPLATES["v1"],
    )
    first, second = "\nWhat? ASSISTANT: A cat.", "USER: Sure? ASSISTANT: Yes."
    assert segments == [
        SpecialToken("bos"),
        TextSegment(f"{SYSTEM} USER: "),
        ImageSlot(0),
        TextSegment(first, ((first.index(" A cat"), len(first)),)),
        SpecialToken("eos", trained=True),
        TextSegment(second, ((second.index(" Yes"), len(second)),)),
        SpecialToken("eos", trained=True),
    ]


def test_plain_keeps_the_images_and_the_answer() -> None:
    segments = render(
        record(turn("user", "Describe this.\n", 0), turn("assistant", "a red kite")),
        TEMPLATES["plain"],
    )
    assert segments == [
        SpecialToken("bos"),
        ImageSlot(0),
        TextSegment("a red kite\n", ((0, 11),)),
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((0, "\nWhat?"), [0, "\nWhat?"]),
        (("What?\n", 0), [0, "\nWhat?"]),
        (("Look at ", 0, " and say.  "), [0, "\nLook at  and say."]),
        ((0,), [0]),
        ((" \n", 0, "\t"), [0]),
        ((0, "\n", 1, "\nCompare."), [0, "\n", 1, "\nCompare."]),
        (("one ", 0, " two ", 1), [0, "\n", 1, "\none  two"]),
        (("  no image  ",), ["  no image  "]),
    ],
)
def test_images_first(parts: tuple[str | int, ...], expected: list[str | int]) -> None:
    template = Template(name="bare", opening="", answer_end="", images_first=True)
    segments = render(record(turn("user", *parts)), template)
    assert [s.text if isinstance(s, TextSegment) else s.index for s in segments] == expected  # pyright: ignore[reportAttributeAccessIssue]


def test_images_stay_where_a_template_does_not_move_them() -> None:
    template = Template(name="bare", opening="", answer_end="")
    segments = render(record(turn("user", "Look at ", 0, " now ")), template)
    assert segments == [TextSegment("Look at "), ImageSlot(0), TextSegment(" now ")]


def test_a_system_turn_replaces_the_templates_text() -> None:
    segments = render(
        record(turn("system", "Be brief."), turn("user", "Q"), turn("assistant", "A")),
        TEMPLATES["v1"],
    )
    assert segments[1] == TextSegment("Be brief. USER: Q ASSISTANT: A", ((28, 30),))


def test_a_later_system_turn_is_refused() -> None:
    with pytest.raises(DataError, match="s/r: a system turn may only stand first"):
        render(record(turn("user", "Q"), turn("system", "S")), TEMPLATES["v1"])


@pytest.mark.parametrize("system", [(), (turn("system", "S"),)])
def test_an_answer_to_nothing_is_left_out(system: tuple[Turn, ...]) -> None:
    conversation = (turn("user", "Q"), turn("assistant", "A"))
    with_greeting = record(*system, turn("assistant", "Hello!"), *conversation)
    without = record(*system, *conversation)
    assert render(with_greeting, TEMPLATES["v1"]) == render(without, TEMPLATES["v1"])


@given(st.text(), st.text())
def test_braces_and_tokens_of_a_record_are_text(question: str, answer: str) -> None:
    question, answer = f"{question}{{eos}}", f"{{bos}}</s><image>{answer}"
    segments = render(
        record(turn("system", "{eos}"), turn("user", question), turn("assistant", answer)),
        TEMPLATES["v1"],
    )
    assert [type(s) for s in segments] == [SpecialToken, TextSegment, SpecialToken]
    assert trained_text(segments) == [f" {answer}", "{eos}"]


def test_trains_all() -> None:
    template = Template(name="all", before_user="U:", before_answer="A:", trains="all")
    segments = render(record(turn("user", 0, "q"), turn("assistant", "a")), template)
    assert trained_text(segments) == ["{bos}", "U:", "qA:a", "{eos}"]


CHATML = """
opening: ""
system: You are helpful.
before_system: "{<|im_start|>}system\\n"
after_system: "{<|im_end|>}\\n"
before_user: "{<|im_start|>}user\\n"
after_user: "{<|im_end|>}\\n"
before_answer: "{<|im_start|>}assistant\\n"
answer_end: "{<|im_end|>}"
after_answer: "\\n"
"""


def test_a_template_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "chatml.yaml"
    path.write_text(CHATML)
    template = get_template(path)
    assert template == get_template(str(path))
    assert template.name == "chatml"
    segments = render(record(turn("user", 0, "Q"), turn("assistant", "A")), template)
    start, end = SpecialToken("<|im_start|>"), SpecialToken("<|im_end|>")
    assert segments == [
        start,
        TextSegment("system\nYou are helpful."),
        end,
        TextSegment("\n"),
        start,
        TextSegment("user\n"),
        ImageSlot(0),
        TextSegment("Q"),
        end,
        TextSegment("\n"),
        start,
        TextSegment("assistant\nA", ((10, 11),)),
        SpecialToken("<|im_end|>", trained=True),
        TextSegment("\n"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sytem: x", "unknown key 'sytem'; the keys are name, opening"),
        ("5: x", "unknown key 5"),
        ("images_first: 1", "images_first is bool, found 1"),
        ("system: yes", "system is str, found True; quote a text"),
        ("name: 3", "name is str, found 3"),
        ("trains: questions", "trains is 'answers' or 'all', found 'questions'"),
        ("- a", "expected a mapping of fields, found list"),
        ("", "expected a mapping of fields, found NoneType"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_yaml_names_file_and_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        get_template(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'v2' is unknown: take one of chatml, llama_3, .*, v1"):
        get_template("v2")
    with pytest.raises(DataError, match=r"none\.yaml: No such file"):
        get_template(tmp_path / "none.yaml")


def test_a_template_is_passed_through() -> None:
    template: Any = Template(name="mine")
    assert get_template(template) is template
    assert get_template("vicuna_v1") is get_template("v1")


def test_a_yaml_with_a_base_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.yaml"
    path.write_text("base: v1\nimage_start: '{<im_start>}'\nimage_end: '{<im_end>}'\n")
    template = get_template(path)
    assert (template.name, template.system) == ("wrapped", SYSTEM)
    segments = render(record(turn("user", "What? ", 0, 1), turn("assistant", "A cat.")), template)
    start, end = SpecialToken("<im_start>"), SpecialToken("<im_end>")
    assert segments[2:9] == [
        start,
        ImageSlot(0),
        end,
        TextSegment("\n"),
        start,
        ImageSlot(1),
        end,
    ]
    path.write_text("base: v7\n")
    with pytest.raises(DataError, match="base 'v7' is unknown: take one of chatml"):
        get_template(path)


def test_llama_2s_system_text_stands_in_the_first_question() -> None:
    segments = render(
        record(
            turn("system", "S"),
            turn("user", 0, "\nQ"),
            turn("assistant", "A"),
            turn("user", "R"),
            turn("assistant", "B"),
        ),
        TEMPLATES["llava_llama_2"],
    )
    assert segments == [
        SpecialToken("bos"),
        TextSegment("[INST] <<SYS>>\nS\n<</SYS>>\n\n"),
        ImageSlot(0),
        TextSegment("\nQ [/INST] A ", ((10, 13),)),
        SpecialToken("eos", trained=True),
        SpecialToken("bos"),
        TextSegment("[INST] R [/INST] B ", ((16, 19),)),
        SpecialToken("eos", trained=True),
    ]


def test_a_templates_own_marker_places_images() -> None:
    qwen_vl = TEMPLATES["qwen_vl"]
    given_record = record(
        turn("user", "a<|extra_0|>"),
        turn("assistant", "b<|extra_0|>"),
        turn("user", "<|extra_0|>c"),
    )
    marked = mark_images(given_record, qwen_vl)
    assert [t.parts for t in marked.turns] == [
        (TextPart("a"), ImagePart(0)),
        (TextPart("b<|extra_0|>"),),
        (ImagePart(1), TextPart("c")),
    ]
    assert mark_images(given_record, TEMPLATES["v1"]) is given_record
    both = record(turn("user", 0, "<|extra_0|>"))
    assert mark_images(both, qwen_vl) is both, "the source's markers come first"


def test_every_template_names_itself() -> None:
    assert {name: template.name for name, template in TEMPLATES.items()} == {
        name: "v1" if name == "vicuna_v1" else name for name in TEMPLATES
    }
