"""Conversations, goldens and tokenizers that several tests of text share."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lapilli.data.record import ImagePart, Part, Record, TextPart, Turn, Verdict
from lapilli.data.sources.llava import normalise
from lapilli.data.text.encode import encode_batch, load_tokenizer
from lapilli.data.text.templates import Template

__all__ = [
    "FIXTURES",
    "any_text",
    "conversation",
    "decode",
    "goldens",
    "needs_fixtures",
    "records",
    "sentencepiece_tokenizer",
    "to_record",
    "trained_ids",
    "unpacked",
]

HERE = Path(__file__).parent
FIXTURES = HERE.parents[2] / "shared" / "fixtures"

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"{FIXTURES} is absent: other people's tokenizers and texts"
)


def to_record(element: dict[str, Any]) -> Record:
    """An element of LLaVA's JSON as its reader makes a record of it."""
    normalised = normalise(element)
    assert not isinstance(normalised, Verdict), normalised
    key = str(element["id"])
    return Record(key, f"own/{key}", "own", *normalised)


def conversation(*values: str) -> Record:
    """A record of alternating turns that starts with the user, with an image for each marker."""
    said = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    images = ["x.jpg"] * sum(value.count("<image>") for value in values[::2])
    return to_record({"id": "x", "conversations": said, "image": images})


def trained_ids(record: Record, tokenizer: Any, template: Template | str) -> list[list[int]]:
    """The ids of each trained span."""
    encoded = encode_batch([record], tokenizer, template)[0]
    spans = encoded.label_spans
    return [encoded.input_ids[a:b] for a, b in zip(spans[::2], spans[1::2], strict=True)]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def goldens(name: str) -> Iterator[dict[str, Any]]:
    """Conversations with what LLaVA's own code made of them, by template."""
    folder = HERE / "goldens" if name == "llava_text_mistral" else FIXTURES / "goldens"
    yield from json.loads((folder / f"{name}.json").read_text())


def unpacked(name: str, folder: Path) -> Path:
    """A tokenizer's folder of the fixtures, its compressed files unpacked, under `folder`."""
    target = folder / name
    if not target.exists():
        target.mkdir()
        for file in (FIXTURES / "tokenizers" / name).iterdir():
            if file.suffix == ".xz":
                (target / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
            else:
                shutil.copyfile(file, target / file.name)
    return target


def sentencepiece_tokenizer(model: Path, folder: Path, *, legacy: bool) -> Any:
    shutil.copy(model, folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


any_text = st.text(max_size=30) | st.lists(
    st.sampled_from(
        ["</s>", "<s>", "<image>", " ASSISTANT: ", "USER:", " ", "\n", "é", "👩‍🚀", "#"]
    )
).map("".join)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Well-formed records: rounds of questions, with images anywhere, and answers."""
    turns: list[Turn] = []
    if draw(st.booleans()):
        turns.append(Turn("system", (TextPart(draw(any_text)),)))
    images = 0
    for _ in range(draw(st.integers(1, 4))):
        parts: list[Part] = []
        for text in draw(st.lists(any_text | st.none(), max_size=3)):
            parts.append(ImagePart(images) if text is None else TextPart(text))
            images += text is None
        turns.append(Turn("user", tuple(parts)))
        turns.append(Turn("assistant", (TextPart(draw(any_text.filter(len))),)))
    return Record("x", "own/x", "own", tuple(turns), ("i.jpg",) * images)
