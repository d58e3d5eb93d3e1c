"""Answers read token by token: whole ends, in every template, however the tokens are cut."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lapilli.train.inference.assistant
from lapilli.data.images.view import ImageSpec
from lapilli.data.record import Record, TextPart, Turn
from lapilli.data.text.encode import bind_template, encode_batch
from lapilli.data.text.questions import Frames, find_frames, row_questions
from lapilli.data.text.templates import TEMPLATES, Template
from lapilli.model.config import Decoding
from lapilli.model.generate import Watch
from lapilli.train.inference.assistant import Assistant, Question
from lapilli.train.validation.answer_text import AnswerReader, Decoder, expected_text
from tests.factories import image_bytes
from tests.made_tokenizers import FAMILIES, made_tokenizer

ANSWERS = [
    "It is red.",
    "It is #1: red.\n## Why\nI see C#.",
    "## Red\n#2 <|im_end and ### inside",
    "Käse 火山 \U0001f43b.",
]
tokenizers = lru_cache(lambda family, has: made_tokenizer(family, has_specials=has))
CASES = [(family, has) for family in FAMILIES for has in (True, False)]


class Watched:
    """What a reader shows, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def __call__(self, piece: str) -> None:
        assert piece
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def said_by(assistant: Assistant, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The assistant, whose model says these ids whatever it is asked, as far as it is let."""

    def generate(
        model: Any, prompts: list[Any], pixels: Any, decoding: Any, *, watch: Watch
    ) -> list[list[int]]:
        del model, pixels, decoding
        taken: list[list[int]] = [[] for _ in prompts]
        for row in range(len(prompts)):
            for newest in ids:
                taken[row].append(newest)
                if watch(row, newest):
                    break
        assert all(len(row) < len(ids) for row in taken), "it was not ended"
        return taken

    monkeypatch.setattr(lapilli.train.inference.assistant, "generate", generate)
    monkeypatch.setattr(Assistant, "check", lambda *_: None)
    return assistant


@pytest.mark.parametrize(("family", "has_specials"), CASES)
@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("vicuna_v1", "plain")])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_what_the_record_says_and_its_prompt_is_the_rows(
    family: str, has_specials: bool, name: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has learnt a row by heart goes on to the row's second question, if let."""
    tokenizer: Any = tokenizers(family, has_specials)
    template = bind_template(TEMPLATES[name], tokenizer)
    question = Question.of("Is it red?", image_bytes("png", 8, 8))
    turns = (
        *question.turns,
        Turn("assistant", (TextPart(answer),)),
        Turn("user", (TextPart("And this?"),)),
        Turn("assistant", (TextPart("No."),)),
    )
    made = Record("", "", "", turns, ("a",))
    row = encode_batch([made], tokenizer, replace(template, trains="answers"), warn=False)[0]
    start = row.label_spans[0]
    assistant = Assistant(Any, tokenizer, template, ImageSpec(8, (0, 0, 0)))  # type: ignore[arg-type]
    assert assistant.prompt(question.turns).tolist() == row.input_ids[:start]
    frames = find_frames(template, tokenizer)
    if not frames.has_end:
        assert name == "phi_hf_pretrain"
        return
    shown = Watched()
    said = said_by(assistant, [i for i in row.input_ids[start:] if i >= 0], monkeypatch)
    assert said.answer([question, question], Decoding(), on_text=shown) == [answer, answer]
    assert shown.text == answer
    spans = np.array(row.label_spans, np.int32).reshape(-1, 2)
    found = row_questions(
        row.input_ids, spans, tokenizer, replace(template, trains="answers"), frames
    )[0]
    assert expected_text(found.answer, Decoder(tokenizer), frames) == answer


@pytest.mark.parametrize(("family", "has_specials"), CASES)
def test_captions_end_with_their_line(family: str, has_specials: bool) -> None:
    tokenizer = tokenizers(family, has_specials)
    frames = find_frames(TEMPLATES["plain"], tokenizer)
    shown, reader = read(tokenizer, frames, "a red cat.\nand more\n", None)
    assert reader.finish() == shown.text == "a red cat."


def read(
    tokenizer: Any, frames: Frames, text: str, cuts: list[int] | None
) -> tuple[Watched, AnswerReader]:
    """Read a text as the tokenizer cuts it, or each piece between `cuts` by itself."""
    shown = Watched()
    reader = AnswerReader(Decoder(tokenizer), frames, shown)
    backend = tokenizer.backend_tokenizer
    edges = [0, *sorted({cut for cut in cuts or [] if 0 < cut < len(text)}), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    for piece in pieces:
        for token_id in backend.encode(piece, add_special_tokens=False).ids:
            if reader.take(token_id):
                return shown, reader
    return shown, reader


TEXT_ENDS = ["v0", "phi_hf", "chatml"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["bytes", "joined"]),
    st.sampled_from(TEXT_ENDS),
    st.text(alphabet="C#\n <|im_end>é火", max_size=20),
    st.lists(st.integers(0, 60), max_size=30),
    st.booleans(),
)
def test_an_end_is_found_however_it_is_cut_and_none_of_it_is_shown(
    family: str, name: str, words: str, cuts: list[int], ends: bool
) -> None:
    """Bytes that any cut leaves as they are; where the end is, plain `str.find` tells."""
    tokenizer = tokenizers(family, False)
    frames = find_frames(TEMPLATES[name], tokenizer)
    end = frames.end_text
    text = words + (f"{end} and no more" if ends else "")
    at = text.find(end)
    shown, reader = read(tokenizer, frames, text, cuts)
    answer = reader.finish()
    if at >= 0:
        assert answer == text[:at].strip()
    else:  # cut off, perhaps in the middle of an end
        held = next((n for n in range(len(end), 0, -1) if text.endswith(end[:n])), 0)
        assert answer == text[: len(text) - held].strip()
    assert shown.text == answer
    steps = ["".join(shown.pieces[:n]) for n in range(len(shown.pieces) + 1)]
    assert all(answer.startswith(step) for step in steps)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.integers(0, 300), max_size=40))
def test_text_read_in_steps_is_what_the_tokenizer_makes_of_all(
    case: tuple[str, bool], ids: list[int]
) -> None:
    """Any ids, with halves of letters, single spaces and special tokens among them."""
    tokenizer = tokenizers(*case)
    frames = replace(find_frames(TEMPLATES["phi_hf_pretrain"], tokenizer))
    shown = Watched()
    reader = AnswerReader(Decoder(tokenizer), frames, shown)
    assert not any(reader.take(token_id) for token_id in ids)
    expected = tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert reader.finish() == shown.text
    # a byte that is no letter's takes back what whole bytes before it had said
    assert shown.text == expected or "\ufffd" in expected


def test_each_step_decodes_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers("bytes", False)
    sizes: list[int] = []
    decode = Decoder.__call__

    def counting(self: Decoder, ids: list[int]) -> str:
        sizes.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Decoder, "__call__", counting)
    read(tokenizer, find_frames(TEMPLATES["v0"], tokenizer), "It is red. " * 200, None)
    assert len(sizes) > 1000
    assert max(sizes) < 8


@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        # an end with text before its special token, and one whose answers begin with what ends them
        (Template("a", answer_end=" END{eos}"), "It is red. END", "It is red."),
        (Template("b", answer_start="\n", answer_end="\n"), "\nIt is red.\nAnd", "It is red."),
        (Template("c", answer_start="Answer: ", answer_end="---"), "Answer: red---x", "red"),
    ],
)
def test_ends_and_starts_of_other_templates(template: Template, text: str, answer: str) -> None:
    tokenizer = tokenizers("bytes", False)
    frames = find_frames(template, tokenizer)
    shown, reader = read(tokenizer, frames, text, None)
    if frames.end_id is not None:
        assert reader.take(frames.end_id)
    assert reader.finish() == shown.text == answer
