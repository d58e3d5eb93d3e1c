"""Templates without goldens: whole-text ids by the tokenizer itself, and what is trained decoded.

The expected conversations are spelt out here once more, so that a frame changed by mistake is seen.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from lapilli.data.record import ImagePart, Part, Record, TextPart, Turn
from lapilli.data.text.encode import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    encode,
    encode_batch,
    load_tokenizer,
    train_tokenizer,
)
from lapilli.data.text.templates import TEMPLATES
from tests.data.text_material import FIXTURES, needs_fixtures, unpacked

Rounds = list[tuple[str, str]]

CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
IM = ("<|im_start|>", "<|im_end|>")


def each(rounds: Rounds, question: str, answer: str) -> str:
    return "".join(question.replace("Q", q, 1) + answer.replace("A", a, 1) for q, a in rounds)


def framed(rounds: Rounds, before: str, between: str, end: str) -> str:
    return "".join(f"{before}{q}{between}{a}{end}" for q, a in rounds)


def chatml(system: str, rounds: Rounds, newline: str = "\n") -> str:
    start, end = IM
    return (
        "{bos}"
        + f"{start}system\n{system}{end}{newline}"
        + framed(
            rounds,
            f"{start}user\n",
            f"{end}{newline}{start}assistant\n",
            f"{end}{newline}",
        )
    )


def llama_3(system: str, rounds: Rounds) -> str:
    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return f"<|begin_of_text|>{head('system')}{system}<|eot_id|>" + framed(
        rounds, head("user"), f"<|eot_id|>{head('assistant')}", "<|eot_id|>"
    )


# Template: the text of a whole conversation, {eos} and {bos} for the tokenizer's own; what is
# trained before and after an answer.
WHOLE: dict[str, tuple[Callable[[str, Rounds], str], str, str]] = {
    "v1": (
        lambda s, r: "{bos}" + s + " " + framed(r, "USER: ", " ASSISTANT: ", "{eos}"), " ", "{eos}",
    ),
    "mistral_gaudi": (
        lambda s, r: "{bos}" + s + " " + framed(r, "User: ", " Assistant: ", "{eos}"), " ", "{eos}",
    ),
    "llava_llama_2": (
        lambda s, r: framed(
            [(f"<<SYS>>\n{s}\n<</SYS>>\n\n{r[0][0]}", r[0][1]), *r[1:]],
            "{bos}[INST] ", " [/INST] ", " {eos}",
        ), " ", " {eos}",
    ),
    "v0": (
        lambda s, r: "{bos}" + s + "\n\n"
        + framed(r, "### Human: ", "\n### Assistant: ", "\n") + "### ",
        " ", "\n###",
    ),
    "mpt": (lambda s, r: chatml(s, r, ""), "", IM[1]),
    "chatml": (chatml, "", IM[1]),
    "qwen_vl": (
        lambda s, r: "{bos}" + f"{IM[0]}system\n{s}{IM[1]}" + framed(
            r, f"\n{IM[0]}user\n", f"{IM[1]}\n{IM[0]}assistant\n", "<|endoftext|>"
        ), "", "<|endoftext|>",
    ),
    "llama_3": (llama_3, "", "<|eot_id|>"),
    "phi_3": (
        lambda s, r: "{bos}" + f"<|system|>\n{s}<|end|>"
        + framed(r, "\n<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
        "", "<|end|>",
    ),
    "phi_hf": (
        lambda s, r: (f"{IM[0]}system\n{s}{IM[1]}\n" if s else "") + framed(
            r, f"{IM[0]}human\n", f"{IM[1]}\n{IM[0]}gpt\n", f"{IM[1]}\n"
        ), "", IM[1],
    ),
    "phi_hf_pretrain": (lambda s, r: s + framed(r, "", "\n\nAnswer:", ""), "", ""),
}  # fmt: skip
WHOLE["llava_v1"] = WHOLE["v1"]
WHOLE["phi_hf_masked"] = WHOLE["phi_hf"]

SYSTEMS = {
    "v1": CURIOUS.format("user"),
    "llama_3": CURIOUS.format("user"),
    "v0": CURIOUS.format("human"),
    "llava_v1": CURIOUS.format("human"),
    "mistral_gaudi": CURIOUS.format("human"),
    "chatml": "You are a helpful assistant.",
    "phi_3": "You are a helpful AI assistant.",
    "qwen_vl": "你是一位图像理解助手。",
    "mpt": "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.",
    "llava_llama_2": "You are a helpful language and vision assistant. You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language.",
}

MADE = "made"  # a small tokenizer trained here, with every template's special tokens
PAIRS = [
    ("llama_3", "llama3"), ("v1", "llama3"), ("v0", "llama3"),
    ("chatml", "qwen3"), ("mpt", "qwen3"), ("qwen_vl", "qwen3"), ("llava_v1", "qwen3"),
    ("chatml", "qwen-7b-tiktoken"), ("qwen_vl", "qwen-7b-tiktoken"),
    ("phi_hf", "phi-1_5-codegen"), ("phi_hf_masked", "phi-1_5-codegen"),
    ("phi_hf_pretrain", "phi-1_5-codegen"), ("phi_3", "phi-1_5-codegen"),
    ("v1", "gpt2"), ("phi_hf_masked", "gpt2"), ("mistral_gaudi", "gpt2"), ("chatml", "gpt2"),
    ("mistral_gaudi", "mistral-v1-32k"), ("llava_v1", "mistral-v1-32k"),
    ("llava_llama_2", "mistral-v1-32k"), ("v0", "mistral-v1-32k"), ("phi_3", "mistral-v1-32k"),
    # phi_hf spells out as text what are special tokens of the one made here
    *((template, MADE) for template in WHOLE if template not in ("phi_hf", "phi_hf_masked")),
]  # fmt: skip

# phi's and GPT-2's vocabularies have no ChatML tokens, Mistral's no Phi-3 ones: so it is.
pytestmark = pytest.mark.filterwarnings("ignore:template .*its end marker")

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

words = st.text(max_size=24) | st.lists(
    st.sampled_from(
        [
            "ASSISTANT:",
            " USER: ",
            "###",
            "[INST]",
            " ",
            "\n",
            "é",
            "👩‍🚀",
            "12345",
            "the kite",
            "?!",
        ]
    ),
    max_size=6,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, list[tuple[list[str | None], str]]]:
    """A system text ("" for the template's own) and rounds of parts (None: an image) and answer."""
    system = draw(st.just("") | words.filter(str.strip))
    asked = st.lists(words.filter(bool) | st.none(), max_size=3)
    rounds = draw(st.lists(st.tuples(asked, words.filter(str.strip)), min_size=1, max_size=3))
    return system, rounds


def as_record(system: str, rounds: list[tuple[list[str | None], str]]) -> Record:
    turns = [Turn("system", (TextPart(system),))] if system else []
    images = 0
    for asked, answer in rounds:
        parts: list[Part] = []
        for part in asked:
            parts.append(ImagePart(images) if part is None else TextPart(part))
            images += part is None
        turns += [Turn("user", tuple(parts)), Turn("assistant", (TextPart(answer),))]
    return Record("x", "own/x", "own", tuple(turns), ("i.jpg",) * images)


def question(asked: list[str | None], *, first: bool) -> str:
    """A user's turn as text, \0 for an image; LLaVA's templates move images to the front."""
    images = sum(part is None for part in asked)
    if not (first and images):
        return "".join("\0" if part is None else part for part in asked)
    text = "".join(part for part in asked if part is not None).strip()
    return ("\0\n" * images + text).strip()


def whole_ids(text: str, tokenizer: Any, pieces: Any) -> list[int]:
    """The ids of a text with specials spelt out, \0 for an image; by transformers itself.

    For SentencePiece by its own library, special tokens cut out: transformers 5 drops the leading
    space of a text that begins with one.
    """
    found: list[int] = []
    for number, chunk in enumerate(text.split("\0")):
        if number:
            found.append(IMAGE_TOKEN_INDEX)
        if pieces is None:
            found += tokenizer(chunk, add_special_tokens=False).input_ids
            continue
        for place, piece in enumerate(re.split("(<s>|</s>)", chunk)):
            found += [1 if piece == "<s>" else 2] if place % 2 else pieces.encode(piece)
    return found


@pytest.fixture(scope="session")
def tokenizer_called(
    real_tokenizer: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """A tokenizer of the fixtures, or the one made here."""

    @cache
    def load(name: str) -> Any:
        if name != MADE:
            return real_tokenizer(name)
        folder = tmp_path_factory.mktemp("made")
        train_tokenizer([CURIOUS] * 4, folder, vocab_size=500)
        tokenizer: Any = load_tokenizer(folder)
        frames = " ".join(str(value) for t in TEMPLATES.values() for value in asdict(t).values())
        specials = sorted(set(re.findall(r"{(<.*?>)}", frames)))
        tokenizer.add_special_tokens({"additional_special_tokens": specials})
        return tokenizer

    return load


@pytest.fixture(scope="session")
def sentencepiece_of() -> Callable[[str], Any]:
    """Mistral's original for Mistral's tokenizer, None for any other."""

    @cache
    def load(name: str) -> Any:
        if not name.startswith("mistral"):
            return None
        sentencepiece = pytest.importorskip("sentencepiece")
        model = FIXTURES / "tokenizers" / name / "tokenizer.model"
        return sentencepiece.SentencePieceProcessor(model_file=str(model))

    return load


@pytest.mark.parametrize(("template", "name"), PAIRS)
@given(said=conversations())
@settings(max_examples=25, deadline=None, suppress_health_check=SLOW)
def test_ids_are_the_wholes_and_the_answers_are_trained(
    tokenizer_called: Callable[[str], Any],
    sentencepiece_of: Callable[[str], Any],
    template: str,
    name: str,
    said: tuple[str, list[tuple[list[str | None], str]]],
) -> None:
    tokenizer = tokenizer_called(name)
    pieces = sentencepiece_of(name)
    system, rounds = said
    specials = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    names = [token.content for token in specials if token.special]
    texts = [system, *(text for asked, a in rounds for text in (*asked, a) if text)]
    assume(not any(special in text or "\0" in text for text in texts for special in names))
    record = as_record(system, rounds)
    ids, labels = encode(record, tokenizer, template)

    write, start, end = WHOLE[template]
    roles = {"{bos}": "<s>" if pieces or name == MADE else "", "{eos}": tokenizer.eos_token}
    first = TEMPLATES[template].images_first
    asked = [(question(parts, first=first), answer) for parts, answer in rounds]
    text = write(system or SYSTEMS.get(template, ""), asked)
    for role, token in roles.items():
        text, end = text.replace(role, token), end.replace(role, token)
    assume(not any(role in said for role in roles for said in texts))
    assert ids == whole_ids(text, tokenizer, pieces)

    if TEMPLATES[template].trains == "all":
        assert labels == [IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else i for i in ids]
        return
    encoded = encode_batch([record], tokenizer, template)[0]
    spans = zip(encoded.label_spans[::2], encoded.label_spans[1::2], strict=True)
    trained = [tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False) for a, b in spans]
    expected = [f"{start}{answer}{end}" for _, answer in rounds]
    assert len(trained) == len(expected)
    for found, wanted, (_, answer) in zip(trained, expected, rounds, strict=True):
        assert_says(found, wanted, answer, is_sentencepiece=pieces is not None)


def assert_says(found: str, wanted: str, answer: str, *, is_sentencepiece: bool) -> None:
    """The answer and its end, and nothing else but white space that one token joins with it."""
    if is_sentencepiece:  # SentencePiece's decoder takes a leading space away
        found, wanted = found.replace(" </s>", "</s>"), wanted.replace(" </s>", "</s>")
        assert found.lstrip(" ") == wanted.lstrip(" ")
        return
    wanted = unicodedata.normalize("NFC", wanted)
    found = unicodedata.normalize("NFC", found)
    if answer[0].isspace():
        assert found.lstrip() == wanted.lstrip()
    else:
        assert found == wanted


# --- a tokenizer's own chat template ----------------------------------------------------------


@pytest.mark.parametrize(("name", "end"), [("llama3", "<|eot_id|>"), ("qwen3", "<|im_end|>")])
@given(said=conversations())
@settings(max_examples=25, deadline=None, suppress_health_check=SLOW)
def test_a_chat_template_gives_its_own_ids(
    real_tokenizer: Callable[[str], Any],
    name: str,
    end: str,
    said: tuple[str, list[tuple[list[str | None], str]]],
) -> None:
    tokenizer = real_tokenizer(name)
    system, rounds = said
    asked = [("".join(part or "\ue123" for part in parts), answer) for parts, answer in rounds]
    texts = [system, *(text for pair in asked for text in pair)]
    names = [t.content for t in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()]
    assume(not any(special in text for text in texts for special in [*names, "\ue123\ue123", "\0"]))
    messages = [{"role": "system", "content": system}] if system else []
    for question_text, answer in asked:
        messages.append({"role": "user", "content": question_text})
        messages.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = whole_ids(whole.replace("\ue123", "\0"), tokenizer, None)
    record = as_record(system, rounds)
    ids, _ = encode(record, tokenizer, "tokenizer")
    assert ids == expected
    encoded = encode_batch([record], tokenizer, "tokenizer")[0]
    spans = zip(encoded.label_spans[::2], encoded.label_spans[1::2], strict=True)
    trained = [tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False) for a, b in spans]
    for found, (_, answer) in zip(trained, asked, strict=True):
        wanted = unicodedata.normalize("NFC", f"{answer.strip()}{end}")
        stripped = unicodedata.normalize("NFC", found).replace(end, "").strip() + end
        assert stripped == wanted


# --- tokens that swallow white space ----------------------------------------------------------


@needs_fixtures
@given(said=conversations())
@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@pytest.mark.parametrize("name", ["gpt2", "llama2-32k"])
def test_tokens_that_strip_white_space_do_so(
    tmp_path_factory: pytest.TempPathFactory,
    said: tuple[str, list[tuple[list[str | None], str]]],
    name: str,
) -> None:
    tokenizer = phi_3_like(tmp_path_factory, name)
    system, rounds = said
    texts = [system, *(text for asked, a in rounds for text in (*asked, a) if text)]
    assume(not any("<|" in text or "\0" in text for text in texts))
    ids, _ = encode(as_record(system, rounds), tokenizer, "phi_3")
    asked = [(question(parts, first=True), answer) for parts, answer in rounds]
    text = WHOLE["phi_3"][0](system or SYSTEMS["phi_3"], asked)
    first = "<s>" if name == "llama2-32k" else ""  # GPT-2's adds none by itself
    assert ids == whole_ids(text.replace("{bos}", first, 1), tokenizer, None)


@needs_fixtures
def test_phi_3_trains_answers_and_their_end_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Its template in VisPer-LM, word by word, on Llama 2's tokenizer with Phi-3's tokens."""
    tokenizer = phi_3_like(tmp_path_factory, "llama2-32k")
    said: list[tuple[list[str | None], str]] = [
        ([None, "What is it?"], "A kite."), (["Where?"], "In the sky."),
    ]  # fmt: skip
    (encoded,) = encode_batch([as_record("", said)], tokenizer, "phi_3")
    parts = np.split(encoded.input_ids, np.array(encoded.label_spans))
    texts = [tokenizer.decode([i for i in ids if i >= 0]) for ids in parts]
    assert texts[1::2] == ["A kite.<|end|>", "In the sky.<|end|>"]
    roles = [name for name in "".join(texts).replace("<|", "\n<|").split() if name[:2] == "<|"]
    assert [name.partition(">")[0] + ">" for name in roles] == [
        "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>",
        "<|user|>", "<|end|>", "<|assistant|>", "<|end|>",
    ]  # fmt: skip


_made: dict[str, Any] = {}


def phi_3_like(tmp_path_factory: pytest.TempPathFactory, name: str) -> Any:
    """A tokenizer with Phi-3's special tokens, which swallow the white space behind them.

    Phi-3's own is Llama 2's with them.
    """
    if name not in _made:
        tokenizer: Any = load_tokenizer(unpacked(name, tmp_path_factory.mktemp("phi")))
        added = [
            AddedToken(t, rstrip=True, normalized=False, special=True)
            for t in ("<|system|>", "<|user|>", "<|assistant|>")
        ]
        tokenizer.add_tokens(
            [*added, AddedToken("<|end|>", lstrip=True, normalized=False, special=True)],
            special_tokens=True,
        )
        _made[name] = tokenizer
    return _made[name]
