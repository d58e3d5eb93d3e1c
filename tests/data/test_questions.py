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
from lapilli.data.text.questions import find_frames, first_question
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
    found = first_question(
        ids, np.array(spans, np.int32).reshape(-1, 2), tokenizer, template, frames
    )
    assert found.prompt.tolist() == prompt
    said = tokenizer.decode(found.answer, skip_special_tokens=True)
    assert ANSWER in said
    assert "And?" not in said
    if name == "phi_hf_pretrain" and system:
        return  # nothing stands between its system text and the question
    assert found.question == ("" if template.drops_user_text else QUESTION)


def test_images_inside_a_question_are_shown_at_their_places(tokenizer: Any) -> None:
    template = replace(
        TEMPLATES["phi_hf"], name="framed", image_start="{<im_start>}", image_end="{<im_end>}"
    )
    frames = find_frames(template, tokenizer)
    parts = (ImagePart(0), TextPart("Is "), ImagePart(1), TextPart(" as red?"), ImagePart(2))
    made = Record("", "", "", (Turn("user", parts), Turn("assistant", (TextPart("No."),))))
    row = encode_batch([made], tokenizer, template, warn=False)[0]
    spans = np.array(row.label_spans, np.int32).reshape(-1, 2)
    found = first_question(row.input_ids, spans, tokenizer, template, frames)
    assert found.question == "Is <image> as red?"
    assert (found.prompt < 0).sum() == 3


def test_a_row_without_its_templates_frames_is_one_line(tokenizer: Any) -> None:
    template = TEMPLATES["phi_hf"]
    frames = find_frames(template, tokenizer)
    ids = tokenizer.encode("It is red.", add_special_tokens=False)
    spans = np.array([[0, len(ids)]], np.int32)
    with pytest.raises(DataError, match="template phi_hf: trains whole conversations") as said:
        first_question(ids, spans, tokenizer, template, frames)
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
