"""Rows taken apart, by every template with tokenizers of each family."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Record, TextPart, Turn
from lapilli.data.text.encode import bind_template, encode_batch
from lapilli.data.text.questions import choice_tokens, find_frames, row_questions
from lapilli.data.text.templates import TEMPLATES, Template
from tests.made_tokenizers import FAMILIES, made_tokenizer

QUESTION = "Is 3 > 2, or # <|im_end|> not?"
ANSWER = "If 3 > 2, it is #1: red.\n## So\nYes."
CASES = [(family, has) for family in FAMILIES for has in (True, False)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    family, has_specials = request.param
    return made_tokenizer(family, has_specials=has_specials)


def record(question: str, answer: str, *, system: str = "", turns: int = 2) -> Record:
    said = [
        Turn("user", (ImagePart(0), TextPart(f"\n{question}"))),
        Turn("assistant", (TextPart(answer),)),
        Turn("user", (TextPart("And?"),)),
        Turn("assistant", (TextPart("No."),)),
    ][: 2 * turns]
    own = [Turn("system", (TextPart(system),))] if system else []
    return Record("", "", "", (*own, *said), ("a",))


def rows(tokenizer: Any, template: Template, made: Record) -> tuple[list[int], list[int]]:
    """A row by the template, and the ids of its prompt where only answers are trained."""
    row = encode_batch([made], tokenizer, template, warn=False)[0]
    masked = encode_batch([made], tokenizer, replace(template, trains="answers"), warn=False)[0]
    return row.input_ids, masked.input_ids[: masked.label_spans[0]]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "vicuna_v1"])
@pytest.mark.parametrize("system", ["", "Be kind: USER."])
def test_the_question_and_the_prompt_of_a_row(tokenizer: Any, name: str, system: str) -> None:
    template = bind_template(TEMPLATES[name], tokenizer)
    frames = find_frames(template, tokenizer)
    made = record(QUESTION, ANSWER, system=system, turns=2 if frames.next_question else 1)
    ids, prompt = rows(tokenizer, template, made)
    spans = encode_batch([made], tokenizer, template, warn=False)[0].label_spans
    found, *later = row_questions(
        ids, np.array(spans, np.int32).reshape(-1, 2), tokenizer, template, frames
    )
    assert found.prompt.tolist() == prompt
    said = tokenizer.decode(found.answer, skip_special_tokens=True)
    assert ANSWER in said
    assert "And?" not in said
    if name == "phi_hf_pretrain" and system:
        return  # nothing stands between its system text and the question
    assert found.question == ("" if template.drops_user_text else QUESTION)
    assert len(later) == bool(frames.next_question)
    for second in later:
        assert second.question == ("" if template.drops_user_text else "And?")
        assert "No." in tokenizer.decode(second.answer, skip_special_tokens=True)
        assert second.prompt.tolist()[: len(prompt)] == prompt
        assert [*second.prompt, *second.answer] == ids[: len(second.prompt) + len(second.answer)]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "vicuna_v1"])
def test_a_choices_token_is_the_one_of_an_answer(tokenizer: Any, name: str) -> None:
    """Y and N are one token of every tokenizer; what is written before them may be trained too."""
    template = bind_template(TEMPLATES[name], tokenizer)
    try:
        found = choice_tokens(["Y", "N"], tokenizer, template)
    except DataError as error:
        assert "tokens of this tokenizer" in str(error)  # noqa: PT017
        return
    for choice, token_id in found.ids.items():
        made = record("?", choice, turns=1)
        row = encode_batch([made], tokenizer, replace(template, trains="answers"), warn=False)[0]
        start, end = row.label_spans[-2:]
        answer = row.input_ids[start:end]
        assert answer[: len(found.prefix) + 1] == [*found.prefix, token_id]
        assert choice in tokenizer.decode([token_id])


def test_choices_that_cannot_be_told_apart_are_one_line(tokenizer: Any) -> None:
    template = TEMPLATES["v1"]
    with pytest.raises(DataError, match=r"choices: 'Incomprehensible' is [0-9]+ tokens"):
        choice_tokens(["Y", "Incomprehensible"], tokenizer, template)
    with pytest.raises(DataError, match=r"'Y' and 'Y' begin with the same token|is [0-9]+ tokens"):
        choice_tokens(["Y", "Y "], tokenizer, template)


def test_images_inside_a_question_are_shown_at_their_places(tokenizer: Any) -> None:
    template = replace(
        TEMPLATES["phi_hf"], name="framed", image_start="{<im_start>}", image_end="{<im_end>}"
    )
    frames = find_frames(template, tokenizer)
    parts = (ImagePart(0), TextPart("Is "), ImagePart(1), TextPart(" as red?"), ImagePart(2))
    made = Record("", "", "", (Turn("user", parts), Turn("assistant", (TextPart("No."),))))
    row = encode_batch([made], tokenizer, template, warn=False)[0]
    spans = np.array(row.label_spans, np.int32).reshape(-1, 2)
    (found,) = row_questions(row.input_ids, spans, tokenizer, template, frames)
    assert found.question == "Is <image> as red?"
    assert (found.prompt < 0).sum() == 3


def test_a_row_without_its_templates_frames_is_one_line(tokenizer: Any) -> None:
    template = TEMPLATES["phi_hf"]
    frames = find_frames(template, tokenizer)
    ids = tokenizer.encode("It is red.", add_special_tokens=False)
    spans = np.array([[0, len(ids)]], np.int32)
    with pytest.raises(DataError, match="template phi_hf: trains whole conversations") as said:
        row_questions(ids, spans, tokenizer, template, frames)
    assert "\n" not in str(said.value)


def test_frames_are_found_without_a_warning(tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for template in TEMPLATES.values():
            find_frames(template, tokenizer)


def test_ends_are_texts_or_special_tokens() -> None:
    tokenizer = made_tokenizer("bytes", has_specials=False)
    expected = {
        "v1": ("", 2), "llava_llama_2": (" ", 2), "v0": ("\n###", None), "plain": ("\n", None),
        "chatml": ("<|im_end|>", None), "phi_hf": ("<|im_end|>", None),
        "phi_hf_pretrain": ("", None), "tokenizer": ("", 2),
    }  # fmt: skip
    for name, end in expected.items():
        frames = find_frames(TEMPLATES[name], tokenizer)
        assert (frames.end_text, frames.end_id) == end, name
        assert frames.has_end == (name != "phi_hf_pretrain")
    special = made_tokenizer("bytes", has_specials=True)
    frames = find_frames(TEMPLATES["chatml"], special)
    assert (frames.end_text, frames.end_id) == ("", special.convert_tokens_to_ids("<|im_end|>"))
