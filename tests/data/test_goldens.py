"""LLaVA's own ids and labels, recorded from its code: in default mode and with `compat: llava`."""

from __future__ import annotations

from typing import Any

import pytest

from lapilli.data.errors import DataError
from lapilli.data.record import Reason, Record
from lapilli.data.sources.validation import check_record
from lapilli.data.text.encode import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    encode,
    encode_batch,
    labels_of,
    load_tokenizer,
)
from lapilli.data.text.llava_compat import LLAVA_TEMPLATES, check_as_llava, encode_as_llava
from lapilli.data.text.templates import TEMPLATES, Template, get_template
from tests.data.text_material import FIXTURES, goldens, needs_fixtures, to_record, trained_ids

MISTRAL, LLAMA2 = "llava_text_mistral", "llava_text_llama2"
ENDS = {"v1": "</s>", "llava_llama_2": "</s>", "plain": "\n", "v0": "\n###"}

# Well-formed records on which LLaVA differs, and how; the README's table says the same.
QUOTES_EOS = "a literal </s> became the special token: whole sample masked"
QUOTES_UNK = "a literal <unk> became the padding id: whole sample masked"
IS_LONG = "a sample without an image is cut to 2048 ids when it is tokenised"
DIFFERS: dict[str, dict[str, str]] = {
    "v1": {
        "adv_answer_contains_assistant": "the answer quotes ' ASSISTANT: ': whole sample masked",
        "adv_answer_contains_eos": QUOTES_EOS,
        "adv_literal_unk": QUOTES_UNK,
        "adv_long_text": IS_LONG,
    },
    "llava_llama_2": {
        "adv_answer_contains_eos": QUOTES_EOS,
        "adv_literal_unk": QUOTES_UNK,
        "adv_long_text": IS_LONG,
    },
    "plain": {"adv_literal_unk": "a literal <unk> became the padding id"},
}
# v0: the labels differ in every record (LLaVA's mask drifts), the ids in these.
V0_IDS_DIFFER = {
    "adv_answer_contains_eos": "a literal </s> became the special token",
    "adv_literal_unk": "a literal <unk> became the padding id",
    "adv_long_text": IS_LONG,
    "adv_leading_gpt": "v0 alone keeps an answer that nothing asked for",
}


def well_formed(template: str, name: str) -> list[tuple[dict[str, Any], Record]]:
    """What `checks` keeps, and for `plain` what LLaVA's assertion lets through."""
    found = [(element, to_record(element)) for element in goldens(name)]
    return [
        (element, record)
        for element, record in found
        if check_record(record).kept and "error" not in element["golden"][template]
    ]


def compare(template: str, name: str, tokenizer: Any) -> int:
    """Assert ids and labels of every well-formed record; how many were equal."""
    equal = 0
    for element, record in well_formed(template, name):
        if element["id"] not in DIFFERS[template]:
            expected = element["golden"][template]
            ids, labels = encode(record, tokenizer, template)
            assert ids == expected["input_ids"], element["id"]
            assert labels == expected["labels"], element["id"]
            equal += 1
    return equal


@pytest.mark.parametrize(("template", "count"), [("v1", 70), ("llava_llama_2", 71), ("plain", 30)])
def test_ids_and_labels_with_mistral(mistral: Any, template: str, count: int) -> None:
    assert compare(template, MISTRAL, mistral) == count


@needs_fixtures
@pytest.mark.parametrize(
    ("template", "count"), [("v1", 244), ("llava_llama_2", 245), ("plain", 130)]
)
def test_ids_and_labels_with_llama2(llama2: Any, template: str, count: int) -> None:
    assert compare(template, LLAMA2, llama2) == count


def compare_v0(name: str, tokenizer: Any) -> int:
    """Assert v0's ids, and that just the answers are trained; how many records' ids were equal."""
    equal = 0
    for element, record in well_formed("v0", name):
        ids, _ = encode(record, tokenizer, "v0")
        if element["id"] not in V0_IDS_DIFFER:
            assert ids == element["golden"]["v0"]["input_ids"], element["id"]
            equal += 1
        assert_answers_trained(record, tokenizer, "v0")
    return equal


def assert_answers_trained(record: Record, tokenizer: Any, template: str) -> None:
    turns = record.turns[1:] if record.turns[0].role == "assistant" else record.turns
    expected = [f"{turn.text}{ENDS[template]}" for turn in turns if turn.role == "assistant"]
    spans = trained_ids(record, tokenizer, template)
    assert [tokenizer.decode(span) for span in spans] == [
        text.replace("</s>", " </s>") if template == "llava_llama_2" else text for text in expected
    ]


def test_v0_with_mistral(mistral: Any) -> None:
    assert compare_v0(MISTRAL, mistral) == 70


@needs_fixtures
@pytest.mark.filterwarnings("ignore:template v0")  # "###" is two of Llama 2's tokens
def test_v0_with_llama2(llama2: Any) -> None:
    assert compare_v0(LLAMA2, llama2) == 244


@pytest.mark.parametrize(
    ("template", "key"), [(t, key) for t, keys in DIFFERS.items() for key in keys]
)
def test_where_llava_differs_ours_trains_the_answers(mistral: Any, template: str, key: str) -> None:
    [(element, record)] = [pair for pair in well_formed(template, MISTRAL) if pair[0]["id"] == key]
    theirs = element["golden"][template]
    ids, labels = encode(record, mistral, template)
    if "</s>" not in key and key != "adv_answer_contains_eos":
        assert_answers_trained(record, mistral, template)
    if key == "adv_long_text":
        assert len(theirs["input_ids"]) == 2048 < len(ids)
        assert (ids[:2048], labels[:2048]) == (theirs["input_ids"], theirs["labels"])
    elif template == "plain":
        assert 0 in theirs["labels"]
        assert 0 not in ids
    else:
        assert set(theirs["labels"]) == {IGNORE_INDEX}
        assert (ids == theirs["input_ids"]) == (key == "adv_answer_contains_assistant")


# --- compat: llava ----------------------------------------------------------------------------


def compare_compat(name: str, tokenizer: Any) -> tuple[int, int, int]:
    """Assert every conversation under every template: how many equal, masked of those, stopped."""
    equal = masked = stopped = 0
    for element in goldens(name):
        record = to_record(element)
        for template, theirs in element["golden"].items():
            if "error" in theirs:
                with pytest.raises(DataError, match=r"own/.*: LLaVA stops here"):
                    encode_as_llava([record], tokenizer, template)
                stopped += 1
                continue
            [ours] = encode_as_llava([record], tokenizer, template)
            assert ours.input_ids == theirs["input_ids"], (element["id"], template)
            assert labels_of(ours) == theirs["labels"], (element["id"], template)
            equal += 1
            masked += ours.num_trained == 0
    return equal, masked, stopped


def test_compat_with_mistral(mistral: Any) -> None:
    assert compare_compat(MISTRAL, mistral) == (274, 11, 50)


@needs_fixtures
def test_compat_with_llama2(llama2: Any) -> None:
    assert compare_compat(LLAMA2, llama2) == (896, 11, 124)


@pytest.mark.parametrize("template", sorted(LLAVA_TEMPLATES))
def test_on_most_records_both_modes_agree(mistral: Any, template: str) -> None:
    elements = [e for e in goldens(MISTRAL) if e["id"].startswith("own_") and "image" in e]
    records = [to_record(e) for e in elements if len(e["conversations"]) == 2]
    assert len(records) > 20
    ours = encode_batch(records, mistral, template)
    theirs = encode_as_llava(records, mistral, template)
    assert [row.input_ids for row in ours] == [row.input_ids for row in theirs]
    assert (ours == theirs) == (template != "v0")


EXPECTED_VERDICTS: dict[str, dict[str, Reason | None]] = {
    "v1": {
        "adv_two_human_in_a_row": Reason.TURN_ORDER,
        "adv_image_in_two_turns": Reason.IMAGE_MARKER_COUNT,
    },
    "v0": {"adv_image_in_two_turns": Reason.IMAGE_MARKER_COUNT},
}


@pytest.mark.parametrize("template", ["v1", "v0"])
def test_what_compat_keeps(mistral: Any, template: str) -> None:
    """All but what LLaVA stops at, or takes another sample's image for; with LLaVA's tokens."""
    for element in goldens(MISTRAL):
        placed, verdict = check_as_llava(to_record(element), get_template(template))
        assert verdict.reason == EXPECTED_VERDICTS[template].get(element["id"]), element["id"]
        if not verdict.kept:
            continue
        [row] = encode_as_llava([placed], mistral, template)
        assert row.input_ids == element["golden"][template]["input_ids"], element["id"]
        assert row.input_ids.count(IMAGE_TOKEN_INDEX) == len(placed.images)


def test_plain_in_compat_takes_what_llava_takes() -> None:
    for element in goldens(MISTRAL):
        _, verdict = check_as_llava(to_record(element), get_template("plain"))
        assert verdict.kept == ("error" not in element["golden"]["plain"]), element["id"]


def test_compat_refuses_what_it_does_not_know(mistral: Any, tmp_path: Any) -> None:
    with pytest.raises(DataError, match="knows the templates llava_llama_2, llava_v1, plain"):
        encode_as_llava([], mistral, "chatml")
    with pytest.raises(DataError, match="knows the templates"):
        encode_as_llava([], mistral, Template(name="v1"))
    assert LLAVA_TEMPLATES.keys() <= TEMPLATES.keys()


@needs_fixtures
def test_compat_refuses_a_tokenizer_of_another_kind() -> None:
    gpt2 = load_tokenizer(FIXTURES / "tokenizers" / "gpt2")
    with pytest.raises(DataError, match="begins a text with bos"):
        encode_as_llava([], gpt2, "v1")
