"""transformers' LLaVA folder: its own classes must read what is written, to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lapilli.model.errors import ModelError
from lapilli.model.interop.hf import (
    Preprocessing,
    read_facts,
    read_hf,
    write_hf,
    write_processor,
)
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import decoders, twins
from tests.model.test_vlm import CONFIG, LLAMA


def logits(model: VisionLanguageModel, ids: np.ndarray[Any, Any], pixels: torch.Tensor) -> Any:
    expanded = np.repeat(ids, np.where(ids < 0, model.vision.num_tokens, 1))
    slots = expanded < 0
    index = np.where(slots, np.cumsum(slots) - 1, -1).astype(np.int32)[None]
    embedded = model.embed(
        torch.from_numpy(np.where(slots, 0, expanded))[None], torch.from_numpy(index), pixels
    )
    return model.language(inputs_embeds=embedded).logits, expanded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("image_id", [60, 64, 70])
def test_stock_transformers_computes_the_same_logits(
    tmp_path: Path, image_id: int, tied: bool
) -> None:
    language = replace(CONFIG.language, settings={**LLAMA, "tie_word_embeddings": tied})
    model = build_model(replace(CONFIG, language=language)).eval()
    write_hf(model, tmp_path, image_token_id=image_id)
    twin: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = np.array([1, 5, -200, 9, 12, -200, 3], np.int64)
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    with torch.inference_mode():
        ours, expanded = logits(model, ids, pixels)
        mean, std = torch.tensor([model.config.vision.mean, model.config.vision.std])
        theirs = twin(
            input_ids=torch.from_numpy(np.where(expanded < 0, image_id, expanded))[None],
            pixel_values=((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2),
        ).logits
    torch.testing.assert_close(theirs[..., :64], ours, rtol=1e-5, atol=1e-5)
    if image_id >= 64:
        assert (theirs[..., 64:] <= ours.amax(-1, keepdim=True)).all()


def assert_same_logits(model: VisionLanguageModel, twin: Any, image_id: int = 64) -> None:
    """Two images in a row of text, through ours and through transformers' model."""
    ids = np.array([1, 5, -200, 9, 12, -200, 3], np.int64)
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    with torch.inference_mode():
        ours, expanded = logits(model, ids, pixels)
        theirs = twin(
            input_ids=torch.from_numpy(np.where(expanded < 0, image_id, expanded))[None],
            pixel_values=twins.normal_pixels(pixels.numpy(), model),
        ).logits
    torch.testing.assert_close(theirs[..., :64], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "language", "strategy"),
    [
        ("siglip", "qwen2", "default"),
        ("dinov2", "llama", "default"),
        ("dinov2", "mistral", "full"),
        ("clip", "gemma", "full"),
        ("clip", "phi", "default"),
    ],
)
def test_other_towers_and_decoders_compute_the_same_and_come_back(
    tmp_path: Path, tower: str, language: str, strategy: Any
) -> None:
    model = build_model(twins.config(tower, language, strategy=strategy)).eval()
    write_hf(model, tmp_path, image_token_id=64, shard_size="20KB")
    twin: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same_logits(model, twin.eval())
    back = read_hf(tmp_path)
    after = back.state_dict()
    assert after.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name]), name
    assert back.vision.num_tokens == model.vision.num_tokens


@pytest.mark.parametrize(
    "family",
    [
        "bloom", "falcon", "gemma3_text", "glm", "gpt2", "gpt_neox", "mixtral", "olmo2", "opt",
        "phi3", "qwen2_moe", "qwen3", "smollm3", "stablelm", "starcoder2",
    ],
)  # fmt: skip
def test_every_family_of_decoders_is_read_by_transformers_and_by_us(
    family: str, tmp_path: Path
) -> None:
    """Some name their embedding otherwise, some keep settings of transformers 4 beside the new."""
    sizes = decoders.settings(family, window=64)
    start = twins.config()
    language = replace(start.language, model_type=family, settings=sizes)
    model = build_model(replace(start, language=language)).eval()
    write_hf(model, tmp_path, image_token_id=64)
    twin: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same_logits(model, twin.eval())
    back = read_hf(tmp_path).eval()
    row = torch.arange(9)[None]
    with torch.inference_mode():
        ours, again = model.language(row).logits, back.language(row).logits
    torch.testing.assert_close(again, ours, rtol=1e-5, atol=1e-5)


def test_bf16_keeps_its_bits(tmp_path: Path) -> None:
    model = build_model(replace(CONFIG, dtype="bf16")).eval()
    write_hf(model, tmp_path, image_token_id=60, dtype=torch.bfloat16)
    after = read_hf(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name].to(torch.bfloat16)), name


def test_a_head_with_a_bias_that_learnt_has_no_place(tmp_path: Path) -> None:
    model = build_model(twins.config("clip", "phi"))
    head: Any = model.language.get_output_embeddings()
    torch.nn.init.ones_(head.bias)
    with pytest.raises(ModelError, match=r"lm_head\.bias has no counterpart"):
        write_hf(model, tmp_path, image_token_id=60)


@pytest.mark.parametrize("language", ["gemma2", "cohere", "granite"])
def test_a_decoder_that_bounds_or_scales_its_logits_is_refused(
    tmp_path: Path, language: str
) -> None:
    """transformers' LLaVA takes the head's product as it is: other logits, without a word."""
    with pytest.raises(ModelError, match=f"{language} (bounds|scales) its logits"):
        write_hf(build_model(twins.config("clip", language)), tmp_path, image_token_id=60)


@pytest.mark.parametrize("size", ["large", "5 stones"])
def test_a_size_that_is_none_is_named(tmp_path: Path, size: str) -> None:
    with pytest.raises(ModelError, match="expected a size such as 5GB"):
        write_hf(build_model(CONFIG), tmp_path, image_token_id=60, shard_size=size)


def test_there_and_back_every_tensor_is_the_same(tmp_path: Path) -> None:
    model = build_model(CONFIG).eval()
    write_hf(model, tmp_path, image_token_id=70, facts={"template": "v1"}, shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = read_hf(tmp_path)
    assert read_facts(tmp_path)["template"] == "v1"
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu"])
def test_a_projector_that_transformers_lacks_is_named(tmp_path: Path, projector: str) -> None:
    model = build_model(replace(CONFIG, projector=projector))
    with pytest.raises(ModelError, match=f"{projector} has no counterpart"):
        write_hf(model, tmp_path, image_token_id=60)


def test_a_folder_of_something_else_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded; expected a folder"):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 64}, " and should be [64"),
        ({"num_hidden_layers": 5}, "layers.2."),
        ({"num_hidden_layers": 1}, "has no place"),
    ],
)
def test_a_config_of_another_model_is_one_line(
    settings: dict[str, int], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers fills what is not there with random numbers and drops what has no place."""
    write_hf(build_model(CONFIG).eval(), tmp_path, image_token_id=60)
    read_hf(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["text_config"] |= settings
    path.write_text(json.dumps(values))
    capfd.readouterr()
    with pytest.raises(ModelError, match="weights are not of the model that config") as found:
        read_hf(tmp_path)
    assert "REPORT" not in capfd.readouterr().err
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_a_weight_file_cut_short_is_one_line(tmp_path: Path) -> None:
    write_hf(build_model(CONFIG).eval(), tmp_path, image_token_id=60)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for size in (0, 5, 300, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be loaded; expected a folder") as found:
            read_hf(tmp_path)
        assert "\n" not in str(found.value)


def test_keys_of_other_programs_are_kept(tmp_path: Path) -> None:
    write_hf(build_model(CONFIG).eval(), tmp_path / "a", image_token_id=60)
    path = tmp_path / "a" / "config.json"
    values = json.loads(path.read_text())
    others = {"_model_name_or_path": "x/y", "unk_token_id": 0}
    values["text_config"] |= others
    path.write_text(json.dumps(values))
    back = read_hf(tmp_path / "a")
    write_hf(back, tmp_path / "b", image_token_id=60)
    again = json.loads((tmp_path / "b" / "config.json").read_text())["text_config"]
    assert {name: again[name] for name in others} == others


def test_both_names_of_the_ropes_base_and_every_end_are_written(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    language = replace(CONFIG.language, settings={**LLAMA, "rope_parameters": rope})
    model = build_model(replace(CONFIG, language=language)).eval()
    write_hf(model, tmp_path, image_token_id=60, end_ids=[7, 2], pad_id=0, bos_id=1)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 5e5
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    twin: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert twin.config.text_config.rope_parameters == rope
    assert twin.generation_config.eos_token_id == [7, 2]
    assert read_hf(tmp_path).language.config.rope_parameters == rope


def test_a_padding_colour_that_transformers_lacks_is_a_note(tmp_path: Path) -> None:
    model = build_model(CONFIG)
    (note,) = write_processor(model, Preprocessing(24, "pad", (1, 2, 3)), tmp_path)
    assert "padded with (1, 2, 3)" in note
    mean = tuple(int(255 * value) for value in model.config.vision.mean or ())
    assert write_processor(model, Preprocessing(24, "pad", mean), tmp_path) == []  # type: ignore[arg-type]
