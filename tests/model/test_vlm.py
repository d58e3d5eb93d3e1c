"""The whole model against transformers' LLaVA with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lapilli.data.collate import Batch, BatchShape, collate
from lapilli.data.dataset import Sample
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.generate import generate_greedy
from lapilli.model.trainable import trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model

IMAGE_ID = 60  # transformers marks image slots in the ids
CLIP: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 24, "patch_size": 8,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "initializer_range": 0.2,
}  # fmt: skip
TOKENS = 9
CONFIG = ModelConfig(
    vision=VisionConfig(settings=CLIP),
    language=LanguageConfig(settings=LLAMA, attention="eager"),
    trainable=("vision", "projector", "language"),
    head_chunk=4,
    seed=1,
)


def transformers_twin(model: VisionLanguageModel) -> Any:
    """transformers' LLaVA with this model's weights; its tower keeps the layer ours leaves out."""
    config: Any = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**LLAMA),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
    )
    config._attn_implementation = "eager"
    twin: Any = LlavaForConditionalGeneration(config).eval()
    ours: Any = model
    twin.model.vision_tower.load_state_dict(ours.vision.clip.state_dict(), strict=False)
    twin.model.multi_modal_projector.linear_1.load_state_dict(ours.projector[0].state_dict())
    twin.model.multi_modal_projector.linear_2.load_state_dict(ours.projector[2].state_dict())
    twin.model.language_model.load_state_dict(model.language.model.state_dict())
    twin.lm_head.load_state_dict(model.language.lm_head.state_dict())
    return twin


def samples(seed: int, images: tuple[int, ...]) -> list[Sample]:
    generator = np.random.default_rng(seed)
    made = []
    for number, count in enumerate(images):
        text = generator.integers(1, 59, 6 + 3 * number).astype(np.int32)
        ids = np.insert(text, generator.integers(1, 5, count), -200)
        spans = np.array([[len(ids) - 4, len(ids) - 2], [len(ids) - 1, len(ids)]], np.int32)
        pixels = generator.integers(0, 256, (count, 24, 24, 3)).astype(np.uint8)
        made.append(Sample(f"sample-{number}", ids, spans, pixels))
    return made


def forward(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    names = ("input_ids", "position_ids", "merge_index", "pixels", "predict_positions", "targets")
    return model(**{name: torch.from_numpy(getattr(batch, name)) for name in names})


def transformers_loss(twin: Any, model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """Its logits, and the loss as a plain sum over the labels."""
    ids = torch.from_numpy(np.where(batch.merge_index >= 0, IMAGE_ID, batch.input_ids))
    pixels = torch.from_numpy(batch.pixels).float() / 255
    mean, std = torch.tensor(CONFIG.vision.mean), torch.tensor(CONFIG.vision.std)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.from_numpy(batch.segment_ids),
    }
    if batch.num_images:
        normal = ((pixels - mean) / std).permute(0, 3, 1, 2)[: batch.num_images]
        inputs["pixel_values"] = normal
    logits = twin(**inputs).logits.flatten(0, 1)
    keep = batch.targets >= 0
    positions = torch.from_numpy(batch.predict_positions[keep])
    targets = torch.from_numpy(batch.targets[keep])
    return torch.nn.functional.cross_entropy(logits[positions], targets, reduction="sum")


@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1), (0, 0), (3,)])
def test_loss_and_gradients_equal_transformers(images: tuple[int, ...]) -> None:
    model = build_model(CONFIG).eval()
    twin = transformers_twin(model)
    batch = collate(samples(7, images), BatchShape(4, (48,), TOKENS, 4), 24)
    ours, theirs = forward(model, batch), transformers_loss(twin, model, batch)
    assert ours.item() > 1
    assert abs(ours.item() - theirs.item()) <= 1e-5 * max(1.0, theirs.item())
    ours.backward()
    theirs.backward()
    pairs = {
        "projector.0.weight": twin.model.multi_modal_projector.linear_1.weight,
        "projector.2.bias": twin.model.multi_modal_projector.linear_2.bias,
        "language.model.layers.0.self_attn.q_proj.weight": (
            twin.model.language_model.layers[0].self_attn.q_proj.weight
        ),
        "language.model.embed_tokens.weight": twin.model.language_model.embed_tokens.weight,
        "language.lm_head.weight": twin.lm_head.weight,
        "vision.clip.encoder.layers.1.mlp.fc1.weight": (
            twin.model.vision_tower.encoder.layers[1].mlp.fc1.weight
        ),
    }
    found = trainable_parameters(model)
    for name, theirs_p in pairs.items():
        gradient = found[name].grad
        expected = torch.zeros_like(theirs_p) if theirs_p.grad is None else theirs_p.grad
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=2e-5, msg=name)


def test_a_head_with_a_bias_is_part_of_the_loss() -> None:
    settings = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
    language = LanguageConfig("phi", settings=settings, attention="eager")
    model = build_model(ModelConfig(CONFIG.vision, language, head_chunk=4))
    head: Any = model.language.lm_head
    torch.nn.init.normal_(head.bias)
    batch = collate(samples(5, (0, 0)), BatchShape(2, (16,), TOKENS, 4), 24)
    logits = model.language(torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)
    keep = batch.targets >= 0
    expected = torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(batch.predict_positions[keep])],
        torch.from_numpy(batch.targets[keep]),
        reduction="sum",
    )
    found = forward(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward()
    assert head.bias.grad.abs().max() > 0


def test_every_trainable_parameter_gets_a_gradient_from_text_alone() -> None:
    model = build_model(CONFIG)
    forward(model, collate(samples(3, (0, 0)), BatchShape(2, (16,), TOKENS, 4), 24)).backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        if not name.startswith("language"):
            assert parameter.grad.abs().max() == 0, name


def test_greedy_answers_equal_transformers_token_for_token() -> None:
    model = build_model(CONFIG).eval()
    twin = transformers_twin(model)
    asked = samples(11, (1, 0, 2))
    found = generate_greedy(
        model, [s.input_ids.astype(np.int64) for s in asked], [s.pixels for s in asked],
        end_id=63, max_new_tokens=8,
    )  # fmt: skip
    for sample, ids in zip(asked, found, strict=True):
        expanded = np.repeat(sample.input_ids, np.where(sample.input_ids < 0, TOKENS, 1))
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.where(expanded < 0, IMAGE_ID, expanded))[None].long()
        }
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if len(sample.pixels):
            pixels = torch.from_numpy(sample.pixels).float() / 255
            mean, std = torch.tensor(CONFIG.vision.mean), torch.tensor(CONFIG.vision.std)
            inputs["pixel_values"] = ((pixels - mean) / std).permute(0, 3, 1, 2)
        produced = twin.generate(
            **inputs, do_sample=False, max_new_tokens=8, eos_token_id=63, pad_token_id=63
        )[0, len(expanded) :].tolist()
        assert ids == [i for i in produced if i != 63], sample.sample_id


def test_pixels_are_normalised_in_fp32_whatever_the_weights_are() -> None:
    """Rounding CLIP's mean to bf16 before the subtraction would move every pixel by 0.2 of 255."""
    seen: list[torch.Tensor] = []
    tower: Any = build_model(CONFIG).to(torch.bfloat16).vision
    tower.clip.embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randint(0, 256, (1, 24, 24, 3), dtype=torch.uint8)
    tower(pixels)
    mean, std = torch.tensor(CONFIG.vision.mean), torch.tensor(CONFIG.vision.std)
    exact = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(seen[0].double(), exact, rtol=2**-8, atol=1e-6)


def test_a_model_in_which_nothing_learns_is_named() -> None:
    vision = VisionConfig(settings={**CLIP, "hidden_size": 24})
    with pytest.raises(ModelError, match="has no parameter"):
        build_model(
            ModelConfig(vision, CONFIG.language, projector="identity", trainable=("projector",))
        )


def test_only_the_named_parts_learn() -> None:
    model = build_model(ModelConfig(CONFIG.vision, CONFIG.language, trainable=("projector",)))
    assert {name.partition(".")[0] for name in trainable_parameters(model)} == {"projector"}


def test_the_seed_decides_random_weights_and_leaves_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    first, second = build_model(CONFIG), build_model(CONFIG)
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projector": "mlp"}, "projector.*'mlp' is unknown"),
        ({"projector": "identity"}, "identity from 16 to 24"),
        ({"projector": "nowhere.at.all:thing"}, "does not import"),
        ({"vision": VisionConfig(tower="vit")}, "vision.tower: 'vit' is unknown; expected clip"),
        ({"vision": VisionConfig(settings=CLIP, layer=9)}, "vision.layer: 9; the tower has 3"),
        ({"vision": VisionConfig(pretrained="/no/such/folder")}, "vision.pretrained.*cannot be"),
        ({"language": LanguageConfig(model_type="no_model")}, "'no_model' is no architecture"),
        ({"language": LanguageConfig(pretrained="/no/folder")}, "'/no/folder' cannot be loaded"),
        (
            {"language": LanguageConfig(settings={"hiden_size": 3})},
            "language.settings: 'hiden_size' is unknown",
        ),
        ({"vision": VisionConfig(settings={**CLIP, "num_attention_heads": 3})}, "vision.settings"),
        (
            {"language": LanguageConfig("cohere", settings={**LLAMA, "logit_scale": 0.5})},
            "has logit_scale",
        ),
    ],
)
def test_a_wrong_part_is_one_line_that_names_it(change: dict[str, Any], words: str) -> None:
    fields: dict[str, Any] = {"vision": CONFIG.vision, "language": CONFIG.language, **change}
    with pytest.raises(ModelError, match=words):
        build_model(ModelConfig(**fields))


def test_a_part_of_ones_own_is_named_by_its_path() -> None:
    config = ModelConfig(
        CONFIG.vision, CONFIG.language, projector="tests.model.parts:double_linear"
    )
    model = build_model(config)
    assert isinstance(model.projector, torch.nn.Sequential)
    assert len(model.projector) == 2
