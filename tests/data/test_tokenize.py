from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Record, Role, TextPart, Turn
from lapilli.data.templates import Template
from lapilli.data.tokenize import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Encoded,
    encode,
    encode_batch,
    llava_length,
    load_tokenizer,
    tokenizer_facts,
    train_tokenizer,
)

HERE = Path(__file__).parent
FIXTURES = HERE.parents[2] / "shared" / "fixtures"
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason=f"{FIXTURES} is absent: other people's tokenizers and texts"
)


def to_record(element: dict[str, Any]) -> Record:
    """LLaVA's JSON as a record; the reader proper is tested elsewhere."""
    turns: list[Turn] = []
    images = 0
    for said in element["conversations"]:
        pieces = said["value"].split("<image>") if said["from"] == "human" else [said["value"]]
        parts: list[Part] = []
        for number, piece in enumerate(pieces):
            if number:
                parts.append(ImagePart(images))
                images += 1
            if piece:
                parts.append(TextPart(piece))
        turns.append(Turn(ROLES[said["from"]], tuple(parts)))
    key = str(element["id"])
    return Record(key, f"own/{key}", "own", tuple(turns), (element.get("image", ""),) * images)


def conversation(*values: str) -> Record:
    """A record of alternating turns that starts with the user."""
    said = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return to_record({"id": "x", "conversations": said, "image": "x.jpg"})


def trained_ids(record: Record, tokenizer: Any, template: Template | str) -> list[list[int]]:
    """The ids of each trained span."""
    encoded = encode_batch([record], tokenizer, template)[0]
    spans = encoded.label_spans
    return [encoded.input_ids[a:b] for a, b in zip(spans[::2], spans[1::2], strict=True)]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# --- goldens: what LLaVA itself made of the same conversations ------------------------------


def well_formed(element: dict[str, Any], template: str) -> bool:
    """What `checks` lets through, and for `plain` what LLaVA's own assertion lets through.

    Turns alternate from human to gpt (after at most one leading gpt turn, which both sides leave
    out), no answer is empty, and the markers of the human turns are as many as the images.
    """
    said = element["conversations"]
    if said and said[0]["from"] == "gpt":
        said = said[1:]
    alternates = [s["from"] for s in said] == ["human", "gpt"] * (len(said) // 2) and said
    answered = all(s["value"].strip() for s in said if s["from"] == "gpt")
    markers = sum(s["value"].count("<image>") for s in said if s["from"] == "human")
    in_answers = any("<image>" in s["value"] for s in said if s["from"] == "gpt")
    one_round = template != "plain" or (len(said) == 2 and markers == 1)
    images = int("image" in element)
    return bool(alternates and answered and markers == images and not in_answers and one_round)


# Well-formed records on which LLaVA differs, and how. Asserted below, one by one.
LLAVA_DIFFERS = {
    "v1": {
        "adv_answer_contains_assistant": "the answer quotes ' ASSISTANT: ': whole sample masked",
        "adv_answer_contains_eos": "a literal </s> became the special token: whole sample masked",
        "adv_literal_unk": "a literal <unk> became the padding id: whole sample masked",
        "adv_long_text": "a sample without an image is cut to 2048 ids when it is tokenised",
    },
    "plain": {
        "adv_literal_unk": "a literal <unk> became the padding id, a hole in the attention mask",
    },
}


def golden(name: str, template: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    folder = HERE / "goldens" if name == "llava_text_mistral" else FIXTURES / "goldens"
    for element in json.loads((folder / f"{name}.json").read_text()):
        if well_formed(element, template):
            yield element, element["golden"][template]


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Mistral's first tokenizer, from the package that ships it, set up as LLaVA does (legacy)."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.origin:
        pytest.skip("mistral-common (extra `dev`) is absent: it holds Mistral's tokenizer")
    return sentencepiece_tokenizer(
        Path(found.origin).parent / "data" / "tokenizer.model.v1",
        tmp_path_factory.mktemp("mistral"),
        legacy=True,
    )


@pytest.fixture(scope="session")
def llama2() -> Any:
    return load_tokenizer(FIXTURES / "tokenizers" / "llama2-32k")


def sentencepiece_tokenizer(model: Path, folder: Path, *, legacy: bool) -> Any:
    shutil.copy(model, folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def compare_with_golden(name: str, template: str, tokenizer: Any) -> int:
    """Assert ids and labels of every well-formed record; how many were equal."""
    equal = 0
    for element, expected in golden(name, template):
        ids, labels = encode(to_record(element), tokenizer, template)
        if element["id"] in LLAVA_DIFFERS[template]:
            continue
        assert ids == expected["input_ids"], element["id"]
        assert labels == expected["labels"], element["id"]
        equal += 1
    return equal


@pytest.mark.parametrize(("template", "count"), [("v1", 70), ("plain", 30)])
def test_llava_goldens_with_mistral(mistral: Any, template: str, count: int) -> None:
    assert compare_with_golden("llava_text_mistral", template, mistral) == count


@needs_fixtures
@pytest.mark.parametrize(("template", "count"), [("v1", 244), ("plain", 130)])
def test_llava_goldens_with_llama2(llama2: Any, template: str, count: int) -> None:
    assert compare_with_golden("llava_text_llama2", template, llama2) == count


@pytest.mark.parametrize(
    ("template", "key"), [(t, key) for t, keys in LLAVA_DIFFERS.items() for key in keys]
)
def test_where_llava_differs_ours_trains_the_answers(mistral: Any, template: str, key: str) -> None:
    element, theirs = next(
        (e, g) for e, g in golden("llava_text_mistral", template) if e["id"] == key
    )
    record = to_record(element)
    ids, labels = encode(record, mistral, template)
    answers = [said["value"] for said in element["conversations"] if said["from"] == "gpt"]
    trained = [mistral.decode(span) for span in trained_ids(record, mistral, template)]
    end = "</s>" if template == "v1" else "\n"
    assert trained == [f"{answer}{end}" for answer in answers]
    if key == "adv_long_text":
        assert len(theirs["input_ids"]) == 2048 < len(ids)
        assert (ids[:2048], labels[:2048]) == (theirs["input_ids"], theirs["labels"])
    elif template == "v1":
        assert set(theirs["labels"]) == {IGNORE_INDEX}
        assert (ids == theirs["input_ids"]) == (key == "adv_answer_contains_assistant")
    else:
        assert 0 in theirs["labels"]
        assert 0 not in ids


# --- SentencePiece: spaces, and the leading space -------------------------------------------


@pytest.fixture(scope="session")
def pieces(mistral: Any) -> Any:
    """The original of Mistral's tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=mistral.vocab_file)


spaced = st.text(st.sampled_from(list("  ▁aeht.\n\té😀€")) | st.characters(codec="utf-8"))


@given(text=spaced)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_has_sentencepieces_ids(mistral: Any, pieces: Any, text: str) -> None:
    template = Template(name="bare", opening="", answer_end="")
    ids, _ = encode(conversation(text), mistral, template)
    assert ids == pieces.encode(text)


def test_runs_of_spaces_of_any_length(mistral: Any, pieces: Any) -> None:
    template = Template(name="bare", opening="", answer_end="")
    for length in range(60):
        for text in (" " * length, " " * length + "the end", "a" + " " * length + "\n b"):
            assert encode(conversation(text), mistral, template)[0] == pieces.encode(text)


def test_without_legacy_only_a_start_gets_the_leading_space(
    tmp_path: Path, mistral: Any, pieces: Any
) -> None:
    # No golden of LLaVA covers `legacy: false` (the slow tokenizer's own rule is restated here):
    # the text behind </s> follows directly, the text behind an image is a start of its own.
    later = sentencepiece_tokenizer(Path(mistral.vocab_file), tmp_path, legacy=False)
    template = Template(name="t", before_user="U:", before_answer="A:")
    record = conversation("<image>q", "a", "r", "b")
    unk = pieces.encode("<unk>")
    joined = pieces.encode("<unk>U:rA:b")[len(unk) :]
    eos = [2]
    starts = [1, *pieces.encode("U:"), IMAGE_TOKEN_INDEX, *pieces.encode("qA:a"), *eos]
    assert encode(record, later, template)[0] == [*starts, *joined, *eos]
    apart = pieces.encode("U:rA:b")
    assert encode(record, mistral, template)[0] == [*starts, *apart, *eos]
    assert joined != apart


@needs_fixtures
@pytest.mark.parametrize("name", ["llama2-32k", "gpt2"])
def test_special_tokens_in_a_text_are_text(name: str) -> None:
    tokenizer: Any = load_tokenizer(FIXTURES / "tokenizers" / name)
    text = " x ".join(tokenizer.all_special_tokens)
    template = Template(name="bare", opening="", answer_end="")
    ids, _ = encode(conversation(text), tokenizer, template)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


# --- a tokenizer of our own: any text, any template -----------------------------------------

WORDS = "What is in the picture? A red kite, a blue cup and an old stone bridge. USER: ASSISTANT: "


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    train_tokenizer([WORDS] * 4, folder, vocab_size=400)
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Any:
    return load_tokenizer(small_folder)


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


FRAMED = Template(
    name="framed",
    before_user="\nQ:",
    before_answer="\nA:",
    answer_start="\n",
    answer_end="\n%%%",
    after_answer="\nend",
)


@given(record=records())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize(
    ("template", "start", "end"), [("v1", " ", "</s>"), (FRAMED, "\n", "\n%%%")]
)
def test_the_answers_and_nothing_else_are_trained(
    small: Any, template: Template | str, start: str, end: str, record: Record
) -> None:
    spans = trained_ids(record, small, template)
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    assert [decode(small, span) for span in spans] == [f"{start}{a}{end}" for a in answers]
    if template == "v1":
        assert [span.count(2) for span in spans] == [1] * len(answers)


def test_a_token_across_the_edge_is_trained_whole(small: Any) -> None:
    template = Template(name="t", before_answer=" re", answer_end="", after_answer="d bridge")
    [ids] = trained_ids(conversation("a", "d kite and a re"), small, template)
    assert small.convert_ids_to_tokens(ids) == ["Ġred", "Ġkite", "Ġand", "Ġa", "Ġred"]


@given(record=records(), template=st.sampled_from(["v1", "plain"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_encoded_counts_and_labels_agree(small: Any, record: Record, template: str) -> None:
    encoded = encode_batch([record], small, template)[0]
    ids, labels = encode(record, small, template)
    assert ids == encoded.input_ids
    assert ids.count(IMAGE_TOKEN_INDEX) == len(record.images)
    assert encoded.text_length == len(ids) - len(record.images)
    trained = [at for at, label in enumerate(labels) if label != IGNORE_INDEX]
    assert len(trained) == encoded.num_trained
    assert all(labels[at] == ids[at] for at in trained)
    assert encoded.label_spans == sorted(set(encoded.label_spans))


@given(batch=st.lists(records(), max_size=4))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_batch_is_its_records(small: Any, batch: list[Record]) -> None:
    one_by_one = [encode_batch([record], small, "v1")[0] for record in batch]
    assert encode_batch(batch, small, "v1") == one_by_one


def test_training_all_leaves_out_the_images(small: Any) -> None:
    template = Template(name="all", before_user="USER: ", before_answer="A:", trains="all")
    ids, labels = encode(conversation("What <image> is", "a kite"), small, template)
    assert labels == [IGNORE_INDEX if i == IMAGE_TOKEN_INDEX else i for i in ids]


def test_named_special_tokens_and_a_missing_one(small_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(small_folder)
    template = Template(name="chat", before_answer="{<|im_start|>}A:", answer_end="{<|im_end|>}")
    record = conversation("q <|im_end|>", "a <|im_end|>")
    with pytest.raises(DataError, match=r"special token '<\|im_start\|>', which the tokenizer"):
        encode(record, tokenizer, template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    ids, _ = encode(record, tokenizer, template)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end), ids[-1]) == (1, 1, end)


def test_a_tokenizer_without_bos_or_eos(small: Any) -> None:
    bare = Tokenizer.from_str(small.backend_tokenizer.to_str())
    record = conversation("<image>\nWhat?", "A red kite.")
    assert encode(record, bare, "v1") == encode(record, small, "v1")
    state = json.loads(bare.to_str())
    state["post_processor"] = None
    no_bos = Tokenizer.from_str(json.dumps(state))
    assert encode(record, no_bos, "v1")[0] == encode(record, small, "v1")[0][1:]
    state["added_tokens"] = []
    state["model"]["vocab"]["</S>"] = state["model"]["vocab"].pop("</s>")
    with pytest.raises(DataError, match="special token 'eos'"):
        encode(record, Tokenizer.from_str(json.dumps(state)), "v1")


def test_the_users_tokenizer_is_left_alone(small_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(small_folder)
    tokenizer("some text", truncation=True, max_length=3, padding="max_length")
    backend = tokenizer.backend_tokenizer
    before = backend.to_str(), backend.encode_special_tokens
    encoded = encode_batch([conversation("</s>What is it?", "A red kite.")], tokenizer, "v1")[0]
    assert (backend.to_str(), backend.encode_special_tokens) == before
    assert encoded.text_length > 10, "neither truncated nor padded"


def test_threads_share_a_tokenizer(small_folder: Path) -> None:
    tokenizer: Any = load_tokenizer(small_folder)
    batch = [conversation(f"What </s> {n}?", f"A red kite {n}.") for n in range(40)]
    expected = encode_batch(batch, load_tokenizer(small_folder), "v1")

    def run(_: int) -> list[Encoded]:
        return encode_batch(batch, tokenizer, "v1")

    with ThreadPoolExecutor(4) as pool:
        assert all(result == expected for result in pool.map(run, range(12)))


# --- the rest -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["<image>\nWhat is this?", "A cat."], 6),
        (["<image>\nWhat is this?"], 4),
        (["What is this?\n<image>"], 4),
        (["see<image>this"], 1),
        (["a\u2003b\tc", ""], 3),
        (["", ""], 0),
    ],
)
def test_llava_length(values: list[str], words: int) -> None:
    assert llava_length(conversation(*values)) == words
    assert words == sum(len(value.split()) for value in values)


def test_training_is_deterministic_and_knows_words(tmp_path: Path, small_folder: Path) -> None:
    train_tokenizer((WORDS for _ in range(4)), tmp_path / "again", vocab_size=400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (small_folder / name).read_bytes()
    tokenizer: Any = load_tokenizer(tmp_path / "again")
    assert tokenizer.is_fast
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<s>", "</s>", "<pad>", "<pad>")
    assert tokenizer.tokenize("a red bridge") == ["Ġa", "Ġred", "Ġbridge"]
    with pytest.raises(DataError, match="needs 259"):
        train_tokenizer([WORDS], tmp_path / "none", vocab_size=258)


def test_facts(small_folder: Path, tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(small_folder)
    facts = tokenizer_facts(tokenizer)
    assert (facts.name, facts.bos_id, facts.eos_id, facts.pad_id) == (small_folder.name, 1, 2, 0)
    assert facts.vocab_size == len(tokenizer)
    tokenizer("some text", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_facts(tokenizer) == facts, "the last call's settings are no fact"
    bare = tokenizer_facts(tokenizer.backend_tokenizer)
    assert (bare.fingerprint, bare.bos_id, bare.eos_id) == (facts.fingerprint, 1, 2)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.add_tokens(["kite!"])
    assert tokenizer_facts(tokenizer).fingerprint != facts.fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nope", "tokenizer folder /nope does not exist"),
        ("some/where/else", "tokenizer folder some/where/else does not exist"),
        ("../nope", "does not exist"),
        (HERE, "holds no tokenizer"),
    ],
)
def test_no_tokenizer_there(name: str | Path, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="could not be loaded"):
        load_tokenizer(tmp_path)
