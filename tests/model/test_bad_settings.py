"""Settings that transformers asserts, divides or indexes by: one line, with field and value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.model.config import LanguageConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.language import build_language
from lapilli.model.parts.pretrained import one_line
from lapilli.model.parts.vision import build_tower
from tests.model import twins


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("phi3", {}, "pad_token_id 32000 is no row of vocab_size 64; set pad_token_id"),
        ("llama", {"pad_token_id": 64}, "pad_token_id 64 is no row of vocab_size 64"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads 0"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads 5"),
        ("llama", {"hidden_act": "relux"}, "hidden_act 'relux'"),
        ("llama", {"vocab_size": -1}, "vocab_size -1"),
        ("llama", {"num_hidden_layers": "two"}, "num_hidden_layers 'two'"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types ['full_attention']"),
        ("gpt2", {"n_inner": "wide"}, "n_inner 'wide'"),
    ],
)
def test_of_a_language_model(kind: str, settings: dict[str, Any], words: str) -> None:
    decoder = {k: v for k, v in twins.DECODER.items() if k != "pad_token_id" or kind != "phi3"}
    if kind == "gpt2":
        decoder = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    config = LanguageConfig(kind, settings={**decoder, **settings})
    with pytest.raises(ModelError) as refused:
        build_language(config)
    said = str(refused.value)
    assert said.startswith("language.settings: ")
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize("tower", list(twins.TOWERS))
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads 3"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"patch_size": 48}, "smaller than the patch, 48"),
        ({"image_size": [24, 16]}, "image_size [24, 16]"),
        ({"hidden_act": "relux"}, "hidden_act 'relux'"),
        ({"hidden_size": "wide"}, "hidden_size 'wide'"),
        ({"num_hidden_layers": 0}, "the tower has 0 layers"),
    ],
)
def test_of_a_tower(tower: str, settings: dict[str, Any], words: str) -> None:
    config = VisionConfig(tower, settings={**twins.TOWERS[tower], **settings})
    with pytest.raises(ModelError) as refused:
        build_tower(config)
    assert str(refused.value).startswith("vision")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_whose_padding_token_is_no_row(tmp_path: Path) -> None:
    settings = {**twins.DECODER, **twins.MORE["phi"]}
    build_language(LanguageConfig("phi", settings=settings)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 99}))
    config = LanguageConfig(pretrained=str(tmp_path))
    for reads in (True, False):
        with pytest.raises(ModelError, match=r"language\.pretrained: pad_token_id 99 is no row"):
            build_language(config, weights=reads)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_with_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    build_language(LanguageConfig(settings=twins.DECODER)).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"\x80no file of weights")
    with pytest.raises(ModelError, match=r"language\.pretrained: .*") as refused:
        build_language(LanguageConfig(pretrained=str(tmp_path)))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_full_memory_is_no_setting() -> None:
    for error in (MemoryError("full"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)), one_line("settings"):
            raise error


@pytest.mark.parametrize("language", ["llama", "phi", "qwen2", "gemma", "gemma2", "gpt2"])
def test_the_default_attention_is_one_that_the_family_has(language: str) -> None:
    settings: dict[str, Any] = {**twins.DECODER, **twins.MORE.get(language, {})}
    if language == "gpt2":
        settings = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    model = build_language(LanguageConfig(language, settings=settings))
    config: Any = model.config
    assert config._attn_implementation == "lapilli"
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long)).logits).all()


@pytest.mark.parametrize(
    ("language", "wanted", "words"),
    [
        ("gemma2", "sdpa", r"'sdpa' is nothing gemma2 supports; expected auto, or one of eager"),
        ("llama", "spda", r"'spda' is nothing llama supports; expected auto, or one of .*sdpa"),
        ("llama", "flash_attention_2", r"'flash_attention_2' cannot be used here \(.*\); expected"),
        ("gpt_oss", "sdpa", r"'sdpa' is nothing gpt_oss supports"),
    ],
)
@pytest.mark.parametrize("from_folder", [False, True])
def test_an_attention_that_is_not_there_names_the_setting(
    language: str, wanted: str, words: str, from_folder: bool, tmp_path: Path
) -> None:
    settings = {**twins.DECODER, **twins.MORE.get(language, {})}
    config = LanguageConfig(language, settings=settings, attention=wanted)
    if from_folder:
        build_language(replace(config, attention="auto")).save_pretrained(tmp_path)
        config = LanguageConfig(pretrained=str(tmp_path), attention=wanted)
    with pytest.raises(ModelError, match=r"^language\.attention: " + words):
        build_language(config)
