"""A turn that is marked as not to be trained has no label, from the file to the shard."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.dataset.dataset import Sample, open_dataset
from lapilli.data.dataset.export_webdataset import _message_form  # pyright: ignore[reportPrivateUsage]
from lapilli.data.record import ImagePart, Record, TextPart, Turn, Verdict, pack, unpack
from lapilli.data.sources import messages
from lapilli.data.text.encode import encode_batch, load_tokenizer
from lapilli.data.text.llava_compat import check_as_llava
from lapilli.data.text.templates import get_template
from tests.data.source_files import write_lines
from tests.factories import Mixture, build_dataset, image_bytes, make_tokenizer

SAID = (
    ("user", "What colour is the goat?"),
    ("assistant", "The goat is grey."),
    ("user", "And the cloud?"),
    ("assistant", "The cloud is golden."),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def record(trains: tuple[bool, ...], image: bool = False) -> Record:
    turns = [
        Turn(role, (TextPart(text),), trained)  # type: ignore[arg-type]
        for (role, text), trained in zip(SAID, trains, strict=True)
    ]
    if image:
        turns[0] = turns[0]._replace(parts=(ImagePart(0), *turns[0].parts))
    return Record("r", "s/r", "s", tuple(turns), ("a.jpg",) if image else ())


def trained(tokenizer: Any, ids: Any, spans: Any) -> list[str]:
    """The text of each trained span."""
    pairs = np.reshape(spans, (-1, 2)).tolist()
    return [tokenizer.decode(list(ids)[start:end]) for start, end in pairs]


TEMPLATES = ("v1", "v0", "llava_llama_2", "mpt", "chatml", "llama_3", "phi_3", "qwen_vl", "phi_hf",
             "phi_hf_masked", "mistral_gaudi")  # fmt: skip


@pytest.mark.filterwarnings("ignore:template")
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("image", [False, True])
def test_an_untrained_answer_leaves_the_ids_and_loses_its_labels(
    tokenizer: Any, template: str, image: bool
) -> None:
    whole = encode_batch([record((True,) * 4, image)], tokenizer, template)[0]
    found = encode_batch([record((True, False, True, True), image)], tokenizer, template)[0]
    assert found.input_ids == whole.input_ids
    text, rest = ("".join(trained(tokenizer, e.input_ids, e.label_spans)) for e in (whole, found))
    assert ("goat is grey" in text, "goat is grey" in rest) == (True, False)
    assert "cloud is golden" in rest
    everything = get_template(template).trains == "all"
    assert ("What colour is the goat" in rest) is everything
    assert found.num_trained < whole.num_trained


@pytest.mark.filterwarnings("ignore:template")
def test_an_untrained_question_counts_where_everything_is_trained(tokenizer: Any) -> None:
    found = encode_batch([record((False, True, True, True))], tokenizer, "phi_hf")[0]
    text = "".join(trained(tokenizer, found.input_ids, found.label_spans))
    assert "What colour" not in text
    assert "And the cloud" in text


def test_a_chat_templates_answers_too(tokenizer: Any) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    template = replace(get_template("v1"), name="own", chat=source)
    found = encode_batch([record((True, False, True, True))], tokenizer, template)[0]
    (answer,) = trained(tokenizer, found.input_ids, found.label_spans)
    assert answer.strip() == "The cloud is golden.</s>"


def test_a_packed_turn_is_what_it_was_and_others_are_packed_as_before() -> None:
    plain = record((True,) * 4)
    marked = record((True, False, True, True))
    thinking = replace(plain, turns=(*plain.turns[:3], plain.turns[3]._replace(thinking="Hm.")))
    for one in (plain, marked, thinking):
        assert unpack(pack(one)) == one
    assert len(pack(plain)) < len(pack(marked))
    assert b"Hm." in pack(thinking)


@pytest.mark.parametrize("form", ["messages", "llava"])
def test_labels_of_a_dataset(tmp_path: Path, folder: Path, tokenizer: Any, form: str) -> None:
    """The case of fine-tuning data that marks its bad answers with weight 0."""
    speaker, content, names = (
        ("role", "content", {"user": "user", "assistant": "assistant"})
        if form == "messages"
        else ("from", "value", {"user": "human", "assistant": "gpt"})
    )

    def element(number: int, **fields: Any) -> dict[str, Any]:
        turns: list[dict[str, Any]] = [
            {speaker: names[role], content: f"<image>\n{text}" if number == place == 0 else text}
            for place, (role, text) in enumerate(SAID)
        ]
        turns[1].update(fields)
        image = {"image": "a.jpg"} if number == 0 else {}
        name = "messages" if form == "messages" else "conversations"
        return {"id": f"r{number}", name: turns, **image}

    (tmp_path / "a.jpg").write_bytes(image_bytes("jpeg"))
    marks: list[dict[str, Any]] = [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 1}]
    write_lines(tmp_path / "a.jsonl", [element(n, **mark) for n, mark in enumerate(marks)])
    mixture = Mixture(tmp_path, [SourceConfig("s", "a.jsonl", format=form)], {}, [])
    report = build_dataset(mixture, tmp_path / "out", folder)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["fields"] == {}
    assert report.manifest.counts["kept"] == 4
    dataset = open_dataset(tmp_path / "out", view="pad32", image_tokens=1)
    samples: dict[str, Sample] = {}
    for place in range(len(dataset)):
        sample = dataset.sample(place)
        samples[sample.sample_id] = sample
    both = ["The goat is grey.</s>", "The cloud is golden.</s>"]
    for number in range(4):
        sample = samples[f"s/r{number}"]
        found = [s.strip() for s in trained(tokenizer, sample.input_ids, sample.label_spans)]
        assert found == (both if number == 3 else both[1:])


def test_an_export_keeps_the_weights_and_the_thinking() -> None:
    """What is written into a tar is read again as the same turns."""
    turns = record((True, False, True, True)).turns
    given = replace(
        record((True,) * 4), turns=(*turns[:3], turns[3]._replace(thinking="Let me see."))
    )
    element = _message_form(given, [])
    normalised = messages.normalise(json.loads(json.dumps(element)))
    assert not isinstance(normalised, Verdict)
    assert normalised[0] == given.turns
    assert messages.inspect(element).unread == ()


def test_llavas_own_way_refuses_what_llava_does_not_know() -> None:
    template = get_template("v1")
    assert check_as_llava(record((True,) * 4), template)[1].kept
    _, verdict = check_as_llava(record((True, False, True, True)), template)
    assert verdict.reason == "unsupported_field"
