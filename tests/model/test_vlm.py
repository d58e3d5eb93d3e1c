"""The whole model against transformers' LLaVA with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import build_model
from tests.model import twins
from tests.model.twins import forward, samples

CLIP = twins.TOWER
LLAMA = twins.DECODER
TOKENS = 9
CONFIG = twins.config()


def test_a_head_with_a_bias_is_part_of_the_loss() -> None:
    settings = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
    language = LanguageConfig("phi", settings=settings, attention="eager")
    model = build_model(ModelConfig(CONFIG.vision, language, head_chunk=4))
    head: Any = model.language.lm_head
    torch.nn.init.normal_(head.bias)
    batch = collate(samples(5, (0, 0)), BatchShape(2, (16,), TOKENS, 4), 24)
    expected = twins.loss_of_text(model, batch)
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


def test_pixels_are_normalised_in_fp32_whatever_the_weights_are() -> None:
    """Rounding CLIP's mean to bf16 before the subtraction would move every pixel by 0.2 of 255."""
    seen: list[torch.Tensor] = []
    model = build_model(CONFIG).to(torch.bfloat16)
    tower: Any = model.vision
    tower.clip.embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pixels = torch.randint(0, 256, (1, 24, 24, 3), dtype=torch.uint8)
    tower(pixels)
    mean, std = torch.tensor(model.config.vision.mean), torch.tensor(model.config.vision.std)
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
        (
            {"vision": VisionConfig(tower="vit")},
            "vision.tower: 'vit' is unknown; expected",
        ),
        (
            {"vision": VisionConfig(settings=CLIP, vision_feature_layer=9)},
            "vision.vision_feature_layer: 9; the tower has 3",
        ),
        ({"vision": VisionConfig(pretrained="/no/such/folder")}, "vision.pretrained.*cannot be"),
        ({"language": LanguageConfig(model_type="no_model")}, "'no_model' is no architecture"),
        ({"language": LanguageConfig(pretrained="/no/folder")}, "'/no/folder' cannot be loaded"),
        (
            {"language": LanguageConfig(settings={"hiden_size": 3})},
            "language.settings: 'hiden_size' is unknown",
        ),
        ({"vision": VisionConfig(settings={**CLIP, "num_attention_heads": 3})}, "vision.settings"),
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
