"""Runs with adapters as files of others: PEFT's own model computes the same, and they come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from lapilli.model.config import LoraConfig, ModelConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop import weights
from lapilli.model.interop.hf import read_hf, write_hf
from lapilli.model.interop.llava import load_llava, write_llava
from lapilli.model.interop.lora_run import write_lora_run
from lapilli.model.interop.weights import Weight, plain_weights, write_weights
from lapilli.model.parts.weight_files import read_tensors
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins
from tests.model.test_interop_hf import assert_same_logits
from tests.model.twins import llava_form

LORA = LoraConfig(rank=4, alpha=12, dropout=0.0)


def trained(config: ModelConfig) -> VisionLanguageModel:
    """A model in which whatever learns has moved; an adapter's B begins as zeros."""
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn(value.shape, generator=generator)
    return model


def by_peft(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """The language model's tensors as peft itself merges them, in fp32."""
    library: Any = peft
    layers = [m for m in model.language.modules() if isinstance(m, library.tuners.lora.LoraLayer)]
    assert layers
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in layers:
        layer.merge()
    found = {
        name.replace(".base_layer.", "."): value.clone()
        for name, value in model.language.state_dict().items()
        if ".lora_" not in name
    }
    for layer in layers:
        layer.unmerge()
    model.load_state_dict(before)
    return found


@pytest.mark.parametrize("language", ["llama", "gpt2"])
def test_merged_weights_are_pefts_bit_for_bit(language: str) -> None:
    """GPT-2's layers hold their weight the other way round."""
    lora = replace(LORA, target=r"language\..*", bias="lora_only")
    config = twins.config("clip", language, lora=lora)
    if language == "gpt2":
        settings = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 64}
        config = replace(config, language=replace(config.language, settings=settings))
    model = trained(config)
    expected = by_peft(model)
    found = plain_weights(model.language)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        value = weight.make()
        assert weight.shape == value.shape
        assert torch.equal(value, expected[name]), name


def test_merging_is_in_fp32_before_it_is_rounded() -> None:
    model = trained(twins.config(lora=LORA, dtype="bf16"))
    (layer,) = [
        m for n, m in model.language.named_modules() if n == "model.layers.1.self_attn.q_proj"
    ]
    held: Any = layer
    product = held.lora_B["default"].weight.double() @ held.lora_A["default"].weight.double()
    exact = held.base_layer.weight.double() + 3 * product
    found = plain_weights(model.language)["model.layers.1.self_attn.q_proj.weight"].make()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_transformers_computes_with_the_merged_weights(tmp_path: Path, tower: str) -> None:
    model = trained(twins.config(tower, lora=LORA))
    write_hf(model, tmp_path, image_token_id=64)
    twin: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same_logits(model, twin.eval())
    back = read_hf(tmp_path).state_dict()
    for part in ("language", "vision", "projector"):
        for name, weight in plain_weights(model.get_submodule(part)).items():
            assert torch.equal(weight.make(), back[f"{part}.{name}"]), name


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_peft_computes_the_same_on_the_base_model(tmp_path: Path, bias: Any) -> None:
    """Adapters on language model and tower; Qwen2's layers have biases."""
    library: Any = peft
    config = twins.config("clip", "qwen2", lora=replace(LORA, bias=bias))
    base = build_model(replace(config, lora=None)).eval()
    base.language.save_pretrained(tmp_path / "base")
    model = trained(config)
    language, tower = write_lora_run(model, tmp_path / "run", base=str(tmp_path / "base"))
    settings = library.PeftConfig.from_pretrained(language)
    assert settings.base_model_name_or_path == str(tmp_path / "base")
    plain: Any = AutoModelForCausalLM.from_pretrained(settings.base_model_name_or_path)
    ids = torch.arange(1, 9)[None]
    theirs = library.PeftModel.from_pretrained(plain, language).eval()
    torch.testing.assert_close(theirs(ids).logits, model.language(ids).logits, rtol=1e-5, atol=1e-5)
    ours: Any = model
    held: Any = base
    seen = library.PeftModel.from_pretrained(held.vision.encoder, tower).eval()
    pixels = torch.randn(2, 3, twins.SIDE, twins.SIDE)
    torch.testing.assert_close(
        seen(pixel_values=pixels).last_hidden_state,
        ours.vision.encoder(pixel_values=pixels).last_hidden_state,
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_lora_run_comes_back_onto_its_base(tmp_path: Path) -> None:
    config = twins.config(lora=LORA, trainable=("projector", "language"))
    model, other = trained(config), build_model(replace(config, lora=None)).eval()
    write_lora_run(model, tmp_path)
    left = read_tensors(tmp_path / "non_lora_trainables.bin")
    assert set(left) == {
        f"base_model.model.model.mm_projector.{n}.{kind}"
        for n in (0, 2)
        for kind in ("weight", "bias")
    }
    assert load_llava(tmp_path, other) == ["projector", "language"]
    for part in ("language", "projector"):
        found = other.get_submodule(part).state_dict()
        for name, weight in plain_weights(model.get_submodule(part)).items():
            assert torch.equal(weight.make(), found[name]), name


def test_what_learnt_whole_beside_adapters_is_left_over(tmp_path: Path) -> None:
    config = twins.config(lora=replace(LORA, target=r"language\..*"))
    model = trained(config)
    assert write_lora_run(model, tmp_path) == [tmp_path]
    fresh = build_model(replace(config, lora=None, seed=7))
    assert set(load_llava(tmp_path / "non_lora_trainables.bin", fresh)) == {"projector", "vision"}
    for name, value in model.vision.state_dict().items():
        assert torch.equal(value, fresh.vision.state_dict()[name]), name


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_llavas_layout_in_shards_comes_back_with_adapters_merged(tmp_path: Path, form: Any) -> None:
    language = replace(twins.config().language, vocab_size=80)
    config = twins.config(lora=LORA)
    model = trained(replace(config, language=language))
    write_llava(model, tmp_path, replace(llava_form(tmp_path), shard_size="20KB", files=form))
    index = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    assert (tmp_path / f"{index}.index.json").is_file()
    other = build_model(replace(model.config, lora=None, seed=9))
    assert set(load_llava(tmp_path, other)) == {"projector", "language", "vision"}
    expected = plain_weights(model)
    found = other.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weight.make(), found[name]), name
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(ModelError, match="which is not there"):
        load_llava(tmp_path, other)


def test_weights_go_below_the_adapters_of_a_model(tmp_path: Path) -> None:
    """ICM's second strategy: adapters learn on top of a whole LLaVA checkpoint."""
    plain = build_model(twins.config())
    write_llava(plain, tmp_path, llava_form(tmp_path))
    model = build_model(twins.config(lora=LORA, seed=9))
    load_llava(tmp_path, model)
    for name, weight in plain_weights(model).items():  # a new adapter adds nothing
        assert torch.equal(weight.make(), plain.state_dict()[name]), name


def test_without_adapters_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="trained without adapters"):
        write_lora_run(build_model(twins.config()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_file_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are made for the file that is written next, and not before."""
    alive: list[int] = []
    most, written = 0, 0

    def make() -> torch.Tensor:
        alive.append(1)
        return torch.ones(256)

    def watched(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        nonlocal most
        most = max(most, len(alive))
        return weight.to(dtype)

    def told(done: int, total: int) -> None:
        nonlocal written
        assert total == 12 * 1024
        written = done
        alive.clear()

    monkeypatch.setattr(weights, "_cast", watched)
    many = {f"w{n}": Weight((256,), make) for n in range(12)}
    write_weights(many, tmp_path, torch.float32, shard_size="3KB", on_progress=told)
    assert (most, written) == (2, 12 * 1024)  # 3KB is 3000 bytes
    with safe_open(next(iter(tmp_path.glob("model-00001*"))), "pt") as file:
        assert len(list(file.keys())) == 2
