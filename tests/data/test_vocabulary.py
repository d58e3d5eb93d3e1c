"""Tokenizers' files: Qwen-7B's tiktoken ranks, and slow implementations as a second opinion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from lapilli.data.text.encode import load_tokenizer
from lapilli.data.text.tokenizer import backend_for, check_agreement
from lapilli.data.text.tokenizer_files import QWEN_SPECIALS, second_opinion
from tests.data.text_material import needs_fixtures, sentencepiece_tokenizer
from tests.factories import build_config, make_mixture, make_tokenizer

any_text = st.text(st.sampled_from(list("  aeht.\n\té😀'sLL12")) | st.characters(codec="utf-8"))


def fast_ids(tokenizer: Any, text: str) -> list[int]:
    return backend_for(tokenizer).first.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def tiktokens_ids(real_tokenizer: Callable[[str], Any]) -> Callable[[str], Sequence[int]]:
    pytest.importorskip("tiktoken", reason="the package tiktoken is the reference")
    slow = second_opinion(real_tokenizer("qwen-7b-tiktoken"))
    assert slow is not None
    assert slow[0] == "tiktoken on qwen.tiktoken"
    return slow[1]


@needs_fixtures
@given(text=any_text)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_qwen_7b_has_the_ids_of_tiktoken_and_of_qwen_3(
    real_tokenizer: Callable[[str], Any], tiktokens_ids: Callable[[str], Sequence[int]], text: str
) -> None:
    ids = fast_ids(real_tokenizer("qwen-7b-tiktoken"), text)
    assert ids == list(tiktokens_ids(text))
    # Qwen 3 still has the same ranks, in another file; its own words for tools are added tokens.
    if "<" not in text:
        assert ids == fast_ids(real_tokenizer("qwen3"), text)


@needs_fixtures
def test_qwen_7b_as_transformers_sees_it(
    real_tokenizer: Callable[[str], Any], tmp_path: Path
) -> None:
    qwen = real_tokenizer("qwen-7b-tiktoken")
    assert len(qwen) == 151851
    assert (qwen.bos_token_id, qwen.eos_token_id, qwen.pad_token_id) == (None, 151643, 151643)
    assert qwen.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [151644, 151645]
    assert qwen.convert_tokens_to_ids("<|extra_0|>") == 151643 + QWEN_SPECIALS.index("<|extra_0|>")
    text = "<|im_start|>user\nnaïve 图片<|im_end|>"
    assert qwen.decode(qwen(text).input_ids) == text
    qwen.save_pretrained(str(tmp_path))
    again: Any = load_tokenizer(tmp_path)
    assert again(text).input_ids == qwen(text).input_ids


def test_ranks_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\nnot base64 1\n")
    with pytest.raises(DataError, match=r"qwen\.tiktoken is no list of base64 tokens") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_sentencepiece_agrees(mistral: Any) -> None:
    check_agreement(mistral, ["a" + " " * n + "b" for n in range(40)])
    assert second_opinion(mistral)


@pytest.fixture
def disagreeing(mistral: Any, tmp_path: Path) -> Path:
    """A folder whose tokenizer.json was made by a converter that forgot the scores."""
    folder = tmp_path / "disagreeing"
    folder.mkdir()
    sentencepiece_tokenizer(Path(mistral.vocab_file), folder, legacy=True)
    mistral.save_pretrained(str(folder))
    state = json.loads((folder / "tokenizer.json").read_text())
    merges = state["model"]["merges"]
    merges.reverse()
    (folder / "tokenizer.json").write_text(json.dumps(state))
    shutil.copy(mistral.vocab_file, folder / "tokenizer.model")
    return folder


def test_a_fast_tokenizer_that_disagrees_stops_the_build(tmp_path: Path, disagreeing: Path) -> None:
    with pytest.raises(DataError, match=r"sentencepiece on tokenizer\.model gives ids") as caught:
        check_agreement(load_tokenizer(disagreeing))
    assert "\n" not in str(caught.value)
    config = build_config(make_mixture(tmp_path / "mixture"), tmp_path / "out", disagreeing)
    with pytest.raises(DataError, match=r"take tokenizer\.json out of the folder"):
        plan_build(config)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_one_implementation_has_nothing_to_agree_with(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    assert second_opinion(tokenizer) is None
    check_agreement(tokenizer, ["any text"])
