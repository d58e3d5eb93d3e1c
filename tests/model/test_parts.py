"""Every tower and decoder against transformers' LLaVA with the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.generate import generate_greedy
from lapilli.model.parts.normalisation import with_normalisation
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.parts.vision import build_tower
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins

DECODERS = [
    "llama", "mistral", "phi", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere",
    "granite",
]  # fmt: skip
PAIRS = [("clip", "llama"), ("siglip", "qwen2"), ("clip", "phi"), ("dinov2", "llama")]
# transformers' LLaVA has a head of its own, which does not scale
SCALES_LOGITS = ("gemma2", "cohere", "granite")


def our_logits(model: VisionLanguageModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    embedded = model.embed(inputs["input_ids"], inputs["merge_index"], inputs["pixels"])
    return model.language(
        inputs_embeds=embedded,
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
    ).logits


def batch_of(tokens: int, images: tuple[int, ...]) -> Any:
    return collate(twins.samples(7, images), BatchShape(4, (48,), tokens, 4), twins.SIDE)


@pytest.mark.parametrize(("tower", "language"), PAIRS)
@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1), (0, 0), (3,)])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_logits_equal_transformers(
    tower: str, language: str, images: tuple[int, ...], padding: str
) -> None:
    model = build_model(twins.config(tower, language)).eval()
    twin = twins.transformers_twin(model)
    batch = batch_of(model.vision.num_tokens, images)
    inputs = {
        "attention_mask": torch.from_numpy(batch.segment_ids).long(),
        "input_ids": torch.from_numpy(batch.input_ids),
        "merge_index": torch.from_numpy(batch.merge_index),
    }
    if padding == "left":
        shifts = [int((row == 0).sum()) for row in batch.segment_ids]
        inputs = {
            name: torch.stack([row.roll(n) for row, n in zip(value.unbind(), shifts, strict=True)])
            for name, value in inputs.items()
        }
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    inputs["pixels"] = torch.from_numpy(batch.pixels)
    theirs = twin(
        input_ids=torch.where(inputs["merge_index"] >= 0, twins.IMAGE_ID, inputs["input_ids"]),
        attention_mask=mask,
        position_ids=inputs["position_ids"],
        pixel_values=twins.transformers_inputs(model, batch).get("pixel_values"),
    ).logits
    found = our_logits(model, inputs)[mask.bool()]
    assert found.std() > 0.1
    torch.testing.assert_close(found, theirs[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tower", "language"), PAIRS)
@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1), (0, 0)])
def test_loss_and_every_gradient_equal_transformers(
    tower: str, language: str, images: tuple[int, ...]
) -> None:
    model = build_model(twins.config(tower, language)).eval()
    twin = twins.transformers_twin(model)
    batch = batch_of(model.vision.num_tokens, images)
    loss = twins.forward(model, batch)
    keep = batch.targets >= 0
    logits = twin(**twins.transformers_inputs(model, batch)).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(batch.predict_positions[keep])],
        torch.from_numpy(batch.targets[keep]),
        reduction="sum",
    )
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    loss.backward()
    expected.backward()
    theirs = {name: value.grad for name, value in twin.named_parameters()}
    for name, parameter in trainable_parameters(model).items():
        there = theirs[their_name(name)]
        assert parameter.grad is not None, name
        wanted = torch.zeros_like(parameter) if there is None else there
        if name.endswith(("embed_tokens.weight",)):
            wanted, found = wanted[1:], parameter.grad[1:]  # padding's row learns nothing there
        else:
            found = parameter.grad
        worst = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
        assert worst <= 1e-5, f"{name}: {worst}"


def their_name(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "vision":
        return "model.vision_tower." + rest.partition(".")[2]
    if part == "projector":
        layer, _, kind = rest.partition(".")
        return f"model.multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"
    return rest if rest.startswith("lm_head") else "model.language_model." + rest.partition(".")[2]


@pytest.mark.parametrize(("tower", "language"), PAIRS)
def test_greedy_answers_equal_transformers_token_for_token(tower: str, language: str) -> None:
    model = build_model(twins.config(tower, language)).eval()
    twin = twins.transformers_twin(model)
    asked = twins.samples(11, (1, 0, 2))
    found = generate_greedy(
        model,
        [s.input_ids.astype(np.int64) for s in asked],
        [s.pixels for s in asked],
        end_id=twins.END_ID,
        max_new_tokens=8,
    )
    assert any(found)
    for sample, ids in zip(asked, found, strict=True):
        repeats = np.where(sample.input_ids < 0, model.vision.num_tokens, 1)
        expanded = np.repeat(sample.input_ids, repeats)
        prompt = torch.from_numpy(np.where(expanded < 0, twins.IMAGE_ID, expanded))[None].long()
        inputs: dict[str, Any] = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        if len(sample.pixels):
            inputs["pixel_values"] = twins.normal_pixels(sample.pixels, model)
        produced = twin.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=twins.END_ID,
            pad_token_id=twins.END_ID,
        )[0, len(expanded) :].tolist()
        assert ids == [i for i in produced if i != twins.END_ID], sample.sample_id


@pytest.mark.parametrize("language", DECODERS)
def test_a_decoders_own_logits_give_the_loss(language: str) -> None:
    """Scaled embeddings, scaled and soft-capped logits included."""
    model = build_model(twins.config("clip", language)).eval()
    batch = batch_of(model.vision.num_tokens, (0, 0))
    expected = twins.loss_of_text(model, batch)
    found = twins.forward(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward()
    embedding = model.language.get_input_embeddings().weight
    assert embedding.grad.abs().max() > 0


@pytest.mark.parametrize("language", [d for d in DECODERS if d not in SCALES_LOGITS])
def test_image_features_among_scaled_embeddings_equal_transformers(language: str) -> None:
    model = build_model(twins.config("siglip", language)).eval()
    twin = twins.transformers_twin(model)
    batch = batch_of(9, (2, 0, 1))
    inputs = {
        name: torch.from_numpy(getattr(batch, name))
        for name in ("input_ids", "merge_index", "pixels", "position_ids")
    }
    mask = torch.from_numpy(batch.segment_ids).long()
    found = our_logits(model, {**inputs, "attention_mask": mask})
    theirs = twin(**twins.transformers_inputs(model, batch)).logits
    torch.testing.assert_close(found[mask.bool()], theirs[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tower", list(twins.TOWERS))
@pytest.mark.parametrize("layer", [1, 2, -1, -2, -3])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_a_towers_features_are_transformers_hidden_states(
    tower: str, layer: int, strategy: str
) -> None:
    if tower == "siglip" and strategy == "full":
        with pytest.raises(ModelError, match="siglip has no class token"):
            build_model(twins.config(tower, layer=layer, strategy=strategy))
        return
    model = build_model(twins.config(tower, layer=layer, strategy=strategy)).eval()
    whole = twins.transformers_twin(model).model.vision_tower
    pixels = twins.samples(1, (2,))[0].pixels
    states = whole(twins.normal_pixels(pixels, model), output_hidden_states=True).hidden_states
    classes = 0 if tower == "siglip" or strategy == "full" else 1
    found = model.vision(torch.from_numpy(pixels))
    assert found.shape[1] == model.vision.num_tokens == 9 + (strategy == "full")
    torch.testing.assert_close(found, states[layer][:, classes:], rtol=0, atol=1e-5)
    layers = [m for m in model.vision.modules() if isinstance(m, torch.nn.ModuleList)]
    assert [len(found) for found in layers] == [layer if layer > 0 else 4 + layer]


def test_siglip_so400m_has_729_features() -> None:
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 1, "image_size": 384, "patch_size": 14}  # fmt: skip
    tower = build_tower(VisionConfig("siglip", settings=settings))
    assert tower.num_tokens == 729
    with torch.no_grad():
        assert tower(torch.zeros(1, 384, 384, 3, dtype=torch.uint8)).shape == (1, 729, 8)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_come_from_a_folder_of_the_tower_or_of_both_towers(
    tmp_path: Path, whole: bool
) -> None:
    vision = SiglipVisionConfig(**twins.TOWER)
    if whole:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 16}  # fmt: skip
        both = SiglipModel(SiglipConfig(text_config=text, vision_config=vision.to_dict()))
        both.save_pretrained(tmp_path)
        saved: Any = both.vision_model
    else:
        saved = SiglipVisionModel(vision)
        saved.save_pretrained(tmp_path)
    tower: Any = build_tower(VisionConfig("siglip", str(tmp_path)))
    expected = saved.state_dict()
    assert len(tower.siglip.encoder.layers) == 2
    for name, value in tower.siglip.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_normalisation_comes_with_the_weights(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 16}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=twins.TOWER)).save_pretrained(tmp_path)
    plain = with_normalisation(VisionConfig("clip", str(tmp_path)))
    assert plain.mean == tuple(CLIPImageProcessorPil().image_mean)
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        tmp_path
    )
    found = with_normalisation(VisionConfig("clip", str(tmp_path)))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    own = with_normalisation(VisionConfig("clip", str(tmp_path), mean=(0.0, 0.0, 0.0)))
    assert own.mean == (0.0, 0.0, 0.0)


def test_weights_of_another_architecture_are_named(tmp_path: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**twins.TOWER)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"clip vision model.*it is a siglip_vision_model"):
        build_tower(VisionConfig("clip", str(tmp_path)))


def test_weights_that_are_pickled_are_taken_only_when_asked(tmp_path: Path) -> None:
    model = build_model(twins.config())
    model.language.config.save_pretrained(tmp_path)
    torch.save(model.language.state_dict(), tmp_path / "pytorch_model.bin")
    config = LanguageConfig(pretrained=str(tmp_path), attention="eager")
    with pytest.raises(ModelError, match="in safetensors"):
        build_model(ModelConfig(model.config.vision, config))
    allowed = LanguageConfig(pretrained=str(tmp_path), attention="eager", allow_pickle=True)
    loaded = build_model(ModelConfig(model.config.vision, allowed))
    for name, value in loaded.language.state_dict().items():
        assert torch.equal(value, model.language.state_dict()[name]), name


@pytest.mark.parametrize("language", ["llama", "phi", "gemma2"])
def test_added_tokens_begin_as_the_mean_of_the_others(language: str) -> None:
    config = twins.config(language=language)
    before = build_model(config).language
    grown = build_model(replace(config, language=replace(config.language, vocab_size=66)))
    assert grown.vocab_size == 66
    for old, new in (
        (before.get_input_embeddings(), grown.language.get_input_embeddings()),
        (before.get_output_embeddings(), grown.language.get_output_embeddings()),
    ):
        values = dict(new.named_parameters())
        for name, value in old.named_parameters():
            assert torch.equal(values[name][:64], value)
            for row in (64, 65):
                torch.testing.assert_close(values[name][row], value.mean(0))
    ids = torch.randint(1, 60, (1, 7))
    found, expected = grown.language.eval()(ids).logits, before.eval()(ids).logits
    torch.testing.assert_close(found[..., :64], expected)
    kept = build_model(replace(config, language=replace(config.language, vocab_size=8)))
    assert kept.vocab_size == 64


def test_weights_are_loaded_in_the_wanted_dtype_and_frequencies_stay_fp32(tmp_path: Path) -> None:
    made = build_model(twins.config())
    made.language.save_pretrained(tmp_path)
    language = LanguageConfig(pretrained=str(tmp_path), attention="eager")
    config = ModelConfig(twins.config().vision, language, dtype="bf16")
    model = build_model(config)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = made.language.model.rotary_emb.inv_freq
    assert torch.equal(model.language.model.rotary_emb.inv_freq, exact)
    for name, value in model.language.state_dict().items():
        assert torch.equal(value, made.language.state_dict()[name].bfloat16()), name
