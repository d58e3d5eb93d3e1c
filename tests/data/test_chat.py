"""A tokenizer's own chat template; made-up ones here, real ones in test_template_tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from lapilli.data.errors import DataError
from lapilli.data.text.encode import bind_template, encode, encode_batch, load_tokenizer
from lapilli.data.text.templates import Template, get_template
from tests.data.text_material import conversation, to_record
from tests.factories import make_tokenizer

INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
NO_SPECIALS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(make_tokenizer(tmp_path / "tokenizer", vocab_size=400))


def spans(tokenizer: Any, template: Template, *values: str) -> list[str]:
    row = encode_batch([conversation(*values)], tokenizer, template)[0]
    pairs = zip(row.label_spans[::2], row.label_spans[1::2], strict=True)
    return [tokenizer.decode(row.input_ids[start:end]) for start, end in pairs]


def chat(source: str) -> Template:
    return Template(name="own", chat=source)


def test_what_is_said_is_framed_and_the_answers_are_trained(tokenizer: Any) -> None:
    values = ["<image>\nWhy?", " So. ", "And?", "Yes </s>."]
    ids, _ = encode(conversation(*values), tokenizer, chat(INST))
    assert (ids.count(1), ids.count(2), ids.count(-200)) == (2, 2, 1)
    assert spans(tokenizer, chat(INST), *values) == ["So.</s>", "Yes </s>.</s>"]
    # byte-level BPE with a prefix space: the text behind an image is a text of its own
    text = tokenizer.decode([i for i in ids if i != -200])
    assert "[INST]" in text
    assert text.count("[/INST]") == 2


@pytest.mark.filterwarnings("ignore:template own")
def test_without_special_tokens_what_follows_every_answer_is_its_end(tokenizer: Any) -> None:
    assert spans(tokenizer, chat(NO_SPECIALS), "Why?", "So.", "And?", "Yes.") == [
        "So.\n\n",
        "Yes.\n\n",
    ]


def test_an_end_of_several_tokens_warns(tokenizer: Any) -> None:
    source = NO_SPECIALS.replace("'\\n\\n'", "'%%%'")
    with pytest.warns(UserWarning, match="template own: its end marker '%%%' is 3 tokens"):
        spans(tokenizer, chat(source), "Why?", "So.")


def test_all_may_be_trained(tokenizer: Any) -> None:
    template = Template(name="own", chat=INST, trains="all")
    ids, labels = encode(conversation("<image>Why?", "So."), tokenizer, template)
    assert labels == [-100 if i == -200 else i for i in ids]


def test_the_tokenizers_own_is_bound_by_its_text(tokenizer: Any, tmp_path: Path) -> None:
    own = get_template("tokenizer")
    with pytest.raises(DataError, match="the tokenizer brings no chat template"):
        encode(conversation("Why?", "So."), tokenizer, own)
    tokenizer.chat_template = INST
    assert bind_template(own, tokenizer).chat == INST
    assert encode(conversation("Why?", "So."), tokenizer, "tokenizer") == encode(
        conversation("Why?", "So."), tokenizer, chat(INST)
    )
    path = tmp_path / "mine.yaml"
    path.write_text(f"chat: {INST!r}\n".replace("\\\\n", "\\n"))
    assert get_template(path).chat


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (INST, r"refuses record own/x \(no system turn\)"),
        ("{{ messages[0].content }}", r"leaves out what turn 1 \(user\) says"),
        ("{{ messages[0].content ", "is not valid Jinja"),
        ("{{ strftime_now('%d') }}", "writes today's date"),
    ],
)
def test_what_a_chat_template_cannot_do_is_one_line(
    tokenizer: Any, source: str, message: str
) -> None:
    said = [("system", "S"), ("human", "Q"), ("gpt", "A")]
    record = to_record(
        {"id": "x", "conversations": [{"from": who, "value": what} for who, what in said]}
    )
    with pytest.raises(DataError, match=message) as caught:
        encode(record, tokenizer, chat(source))
    assert "\n" not in str(caught.value)


def test_a_bare_backend_cannot_run_one(tokenizer: Any) -> None:
    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    with pytest.raises(DataError, match="needs a transformers tokenizer"):
        encode(conversation("Why?", "So."), bare, chat(INST))
