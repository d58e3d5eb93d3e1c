"""A template as Jinja: transformers renders it to what `encode` would make ids of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.record import ImagePart, Record, TextPart, Turn
from lapilli.data.text.encode import encode, load_tokenizer
from lapilli.data.text.export_chat_template import chat_template
from lapilli.data.text.export_template import export_obstacle
from lapilli.data.text.templates import TEMPLATES
from tests.factories import make_tokenizer

NAMES = sorted(
    name
    for name, template in TEMPLATES.items()
    if not template.drops_user_text and not template.chat
)
SPECIALS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
CONVERSATIONS = (
    (Turn("user", (TextPart(" What is it? \n"),)), Turn("assistant", (TextPart("a ü 'cat'"),))),
    (
        Turn("system", (TextPart("Be brief."),)),
        Turn("user", (TextPart("Look "), ImagePart(0), TextPart(" here "), ImagePart(1))),
        Turn("assistant", (TextPart("Two."),)),
        Turn("user", (TextPart("And\n\nthis?"),)),
        Turn("assistant", (TextPart("One {{ x }}."),)),
    ),
    (Turn("user", (ImagePart(0),)), Turn("assistant", (TextPart("red"),))),
)


def messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


@pytest.mark.filterwarnings("ignore:template .* its end marker:UserWarning")  # spelt as text
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_transformers_makes_the_same_ids(
    name: str, turns: tuple[Turn, ...], tmp_path: Path
) -> None:
    record = Record("1", "s/1", "s", turns, ("a", "b"))
    other = load_tokenizer(make_tokenizer(tmp_path))
    # phi_hf spells them as text, for a tokenizer that lacks them
    other.add_tokens([] if name.startswith("phi_hf") else SPECIALS, special_tokens=True)
    expected, labels = encode(record, other, name)
    other.add_tokens(["<image>"], special_tokens=True)
    source = chat_template(TEMPLATES[name], other)
    for chat, ids in (
        (turns, expected),
        (turns[:-1], expected[: _last_answer(labels)]),
    ):
        if ids is not expected and TEMPLATES[name].trains == "all":
            continue
        text: Any = other.apply_chat_template(
            messages(chat),
            chat_template=source,
            tokenize=False,
            add_generation_prompt=chat is not turns,
        )
        found = other(text, add_special_tokens=False)["input_ids"]
        image = other.convert_tokens_to_ids("<image>")
        assert [-200 if i == image else i for i in found] == ids


def _last_answer(labels: list[int]) -> int:
    """Where the last trained span begins."""
    trained = [place for place, label in enumerate(labels) if label >= 0]
    gaps = [b for a, b in pairwise(trained) if b > a + 1]
    return gaps[-1] if gaps else trained[0]


def test_a_template_that_drops_the_question_writes_the_images_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    source = chat_template(TEMPLATES["plain"], tokenizer)
    said: Any = tokenizer.apply_chat_template(
        messages(CONVERSATIONS[1][1:2]), chat_template=source, tokenize=False
    )
    assert said == "<s><image><image>"
    assert export_obstacle(TEMPLATES["plain"], tokenizer) == ""
