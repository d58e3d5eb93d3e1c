"""The tokenizer kept in a dataset: its own files, and the ids that the shards have."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken

from lapilli.data.building import finish
from lapilli.data.building.driver import build
from lapilli.data.building.repair import repair_dataset
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.dataset.tokenizer_copy import open_copy, write_copy
from lapilli.data.dataset.verify import verify_dataset
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from lapilli.data.record import Record, TextPart, Turn
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.text.encode import encode_batch, load_tokenizer
from lapilli.data.text.tokenizer import backend_for, tokenizer_facts
from lapilli.data.text.tokenizer_files import KEPT_FILES
from tests.data.text_material import needs_fixtures, unpacked
from tests.factories import Mixture, build_config, make_mixture, make_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is the reference")

VIEW = "pad32"
TEXT = "a  b   c\n\nUSER: hi </s>ASSISTANT: x  y, the goat is red. "


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of Llama's kind: BPE, bytes, no normalisation, a space in front."""
    model = io.BytesIO()
    texts = [
        f"the {a} {b} is {c}. USER: ASSISTANT: why {n}" for n, (a, b, c) in enumerate(_words())
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def _words() -> Iterator[tuple[str, str, str]]:
    for first in ("pale", "old", "small"):
        for noun in ("goat", "pebble", "lantern", "harbour", "cloud"):
            for colour in ("red", "grey", "golden"):
                yield first, noun, colour


def llama_folder(folder: Path, model: bytes, *, model_type: str = "", **settings: Any) -> Path:
    """A folder with `tokenizer.model`, and what is given of settings and of a model's config."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model)
    if settings:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        text = json.dumps({"tokenizer_class": "LlamaTokenizer", **names, **settings})
        (folder / "tokenizer_config.json").write_text(text)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "model.safetensors").write_bytes(b"weights are no tokenizer's")
    return folder


def conversation_ids(tokenizer: Any) -> list[int]:
    turns = (
        Turn("user", (TextPart("Why?"),)),
        Turn("assistant", (TextPart("So."),)),
        Turn("user", (TextPart("And?"),)),
        Turn("assistant", (TextPart("No."),)),
    )
    record = Record("", "", "", turns, ())
    return encode_batch([record], tokenizer, "v1")[0].input_ids


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("model_type", ["", "llama", "mistral", "llava", "phi3"])
def test_a_sentencepiece_folder_has_sentencepieces_ids_whatever_lies_beside(
    pieces: bytes, tmp_path: Path, model_type: str, legacy: bool
) -> None:
    folder = llama_folder(
        tmp_path / "model", pieces, model_type=model_type, legacy=legacy, add_bos_token=True
    )
    reference: Any = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    tokenizer = load_tokenizer(folder)
    ids = backend_for(tokenizer).first.encode(TEXT, add_special_tokens=False).ids
    assert ids == reference.encode(TEXT)
    later = backend_for(tokenizer).later.encode("USER", add_special_tokens=False).ids
    assert (later == reference.encode("USER")) is legacy  # the later rule puts no space there
    write_copy(tokenizer, tmp_path / "copy")
    assert conversation_ids(load_tokenizer(tmp_path / "copy")) == conversation_ids(tokenizer)


def test_a_mistral_folder_without_settings_is_read_as_its_first_library_read_it(
    pieces: bytes, tmp_path: Path
) -> None:
    bare = load_tokenizer(llama_folder(tmp_path / "bare", pieces, model_type="mistral"))
    told = load_tokenizer(llama_folder(tmp_path / "told", pieces, legacy=True, add_bos_token=True))
    assert conversation_ids(bare) == conversation_ids(told)
    assert conversation_ids(bare)[0] == 1


def test_a_unigram_model_is_not_read_as_llamas(tmp_path: Path) -> None:
    model = io.BytesIO()
    texts = [" ".join(words) for words in _words()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=28,
        minloglevel=2,
        num_threads=1,
    )
    folder = llama_folder(tmp_path / "model", model.getvalue(), model_type="llava")
    assert type(load_tokenizer(folder)).__name__ != "LlamaTokenizer"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer.json", b""),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("vocab.json", b"\xff\xfe"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    settings = {"tokenizer_class": "LlamaTokenizer" if name.endswith("l") else "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- copies ------------------------------------------------------------------------------------


def same(first: Any, second: Any) -> bool:
    one, other = (replace(tokenizer_facts(t), name="") for t in (first, second))
    return one == other and conversation_ids(first) == conversation_ids(second)


@needs_fixtures
@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("llama2-32k", "llama"),
        ("mistral-v1-32k", "mistral"),
        ("phi-1_5-codegen", "phi"),
        ("gpt2", ""),
        ("gpt2", "gpt2"),
        ("qwen-7b-tiktoken", "qwen2"),
    ],
)
def test_a_copy_of_each_family_writes_the_same_ids(
    tmp_path: Path, name: str, model_type: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(unpacked(name, tmp_path), folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(folder)
    write_copy(tokenizer, tmp_path / "copy")
    assert same(load_tokenizer(tmp_path / "copy"), tokenizer)
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


@needs_fixtures
@pytest.mark.parametrize("name", ["qwen3", "clip-bpe"])
def test_a_copy_of_other_families_writes_the_same_ids(
    tmp_path: Path, real_tokenizer: Callable[[str], Any], name: str
) -> None:
    tokenizer = real_tokenizer(name)
    write_copy(tokenizer, tmp_path / "copy")
    assert same(load_tokenizer(tmp_path / "copy"), tokenizer)


def test_a_copy_takes_files_and_neither_weights_nor_code(pieces: bytes, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "model", pieces, model_type="mistral", legacy=True)
    (folder / "tokenization_mine.py").write_text("raise SystemExit")
    write_copy(load_tokenizer(folder), tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"tokenizer.model", "tokenizer_config.json", "config.json"}
    assert "model.safetensors" not in KEPT_FILES


def test_a_tokenizer_changed_in_memory_is_saved_as_it_is(pieces: bytes, tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(llama_folder(tmp_path / "model", pieces, legacy=True))
    tokenizer.add_tokens([AddedToken("<mine>", special=True)])
    write_copy(tokenizer, tmp_path / "copy")
    again: Any = load_tokenizer(tmp_path / "copy")
    assert same(again, tokenizer)
    assert again.convert_tokens_to_ids("<mine>") == len(tokenizer) - 1


def test_a_tokenizer_made_in_memory_is_saved(tmp_path: Path) -> None:
    made: Any = load_tokenizer(make_tokenizer(tmp_path / "model"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    write_copy(fast, tmp_path / "copy")
    assert same(load_tokenizer(tmp_path / "copy"), fast)


def test_a_copy_that_became_another_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "model"))
    write_copy(tokenizer, tmp_path / "copy")
    facts = asdict(tokenizer_facts(tokenizer))
    assert open_copy(tmp_path / "copy", facts) is not None
    path = tmp_path / "copy" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "</s>"', '"eos_token": "<s>"'))
    with pytest.raises(DataError, match=r"copy is another .*eos_id was 2, is 1.*; do it again"):
        open_copy(tmp_path / "copy", facts, "do it again")


# ---- datasets ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return make_mixture(tmp_path_factory.mktemp("mixture") / "raw", images=3, text_only=5)


def built(config: BuildConfig) -> Path:
    build(plan_build(config), runner=run_here)
    return Path(config.output)


@pytest.fixture
def config(pieces: bytes, mixture: Mixture, tmp_path: Path) -> BuildConfig:
    folder = llama_folder(tmp_path / "llama", pieces, model_type="mistral", legacy=True)
    return build_config(mixture, tmp_path / "out", folder)


def first_ids(output: Path) -> list[int]:
    return open_dataset(output, view=VIEW, image_tokens=4).sample(0).input_ids.tolist()


def test_a_dataset_keeps_the_tokenizer_that_its_ids_are_of(config: BuildConfig) -> None:
    output = built(config)
    kept = {path.name: path.read_bytes() for path in (output / "tokenizer").iterdir()}
    original = Path(config.tokenizer)
    assert kept == {name: (original / name).read_bytes() for name in kept}
    shutil.rmtree(original)
    dataset = open_dataset(output, view=VIEW, image_tokens=4)
    assert conversation_ids(dataset.tokenizer)[:1] == dataset.sample(0).input_ids[:1].tolist()
    assert asdict(dataset.template) == read_manifest(output).template_fields


@pytest.mark.parametrize("what", ["changed", "missing", "added"])
def test_a_dataset_whose_tokenizer_was_touched_is_not_opened_and_is_mended(
    config: BuildConfig, what: str
) -> None:
    output = built(config)
    path = output / "tokenizer" / "tokenizer_config.json"
    before, ids = path.read_bytes(), first_ids(output)
    if what == "changed":
        path.write_bytes(before.replace(b'"legacy": true', b'"legacy": false'))
    elif what == "missing":
        path.unlink()
    else:
        path = output / "tokenizer" / "added_tokens.json"
        path.write_text("{}")
    with pytest.raises(DataError, match=r"(tokenizer_config|added_tokens)\.json: .*preprocess"):
        first_ids(output)
    damaged = [damage.path for damage in verify_dataset(output).damaged]
    assert damaged == ([] if what == "added" else ["tokenizer/tokenizer_config.json"])
    repair_dataset(output, config, runner=run_here)
    assert first_ids(output) == ids
    assert (output / "tokenizer" / "tokenizer_config.json").read_bytes() == before
    assert not list(output.glob(".tokenizer*"))


def test_a_copy_that_writes_other_ids_ends_the_build(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a library would that reads a copy otherwise, and has the same fingerprint for it."""
    wrong: Any = load_tokenizer(config.tokenizer)
    wrong.backend_tokenizer.pre_tokenizer = None
    monkeypatch.setattr(finish, "open_copy", lambda *_: wrong)
    with pytest.raises(
        DataError, match=r"writes other ids than .*llama did: .* from place"
    ) as found:
        built(config)
    assert "\n" not in str(found.value)
    assert not (Path(config.output) / "manifest.json").exists()
    monkeypatch.undo()
    assert first_ids(built(config))


def test_an_amended_dataset_has_the_new_tokenizer(config: BuildConfig, pieces: bytes) -> None:
    output = built(config)
    before = first_ids(output)
    folder = Path(config.tokenizer)
    (folder / "tokenizer_config.json").unlink()
    other = llama_folder(folder.with_name("other"), pieces, legacy=False, add_bos_token=True)
    built(replace(config, tokenizer=str(other), incremental=True))
    assert (output / "tokenizer" / "tokenizer_config.json").read_bytes() == (
        other / "tokenizer_config.json"
    ).read_bytes()
    assert not (output / "tokenizer" / "config.json").exists()
    assert first_ids(output) != before


def test_another_end_of_text_makes_other_rows(config: BuildConfig) -> None:
    output = built(config)
    before = first_ids(output)
    path = Path(config.tokenizer) / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "</s>"', '"eos_token": "<unk>"'))
    with pytest.raises(DataError, match="built with another tokenizer"):
        built(config)
    built(replace(config, incremental=True))
    assert first_ids(output) != before


def test_an_edited_template_in_the_manifest_is_named(config: BuildConfig) -> None:
    output = built(config)
    path = output / "manifest.json"
    path.write_text(path.read_text().replace('"before_user": "USER: "', '"before_user": "Q: "'))
    with pytest.raises(DataError, match=r"template_fields of manifest\.json are not what"):
        _ = open_dataset(output, view=VIEW, image_tokens=4).template
