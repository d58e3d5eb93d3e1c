"""Towers at another image size: positions are interpolated as transformers does it itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LlavaForConditionalGeneration

from lapilli.model.config import VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.hf import read_hf, write_hf
from lapilli.model.interop.llava_tower import TowerImages, published_tower, write_tower
from lapilli.model.parts.vision import FAMILIES, Tower, TransformersTower, build_tower, tower_shape
from lapilli.model.vlm import build_model
from tests.model import twins

OWN, PATCH = twins.SIDE, 8  # 9 patches


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights for each family, with positions large enough to matter."""
    folder = tmp_path_factory.mktemp("towers")
    for name, family in FAMILIES.items():
        torch.manual_seed(2)
        config: Any = getattr(transformers, f"{family.prefix}Config")(**twins.TOWERS[name])
        model: Any = getattr(transformers, f"{family.prefix}Model")(config)
        with torch.no_grad():
            positions = model.embeddings.get_parameter(family.positions)
            positions.copy_(torch.randn(positions.shape))
        model.save_pretrained(folder / name)
    return folder


def random_pixels(side: int) -> torch.Tensor:
    generator = np.random.default_rng(side)
    return torch.from_numpy(generator.integers(0, 256, (2, side, side, 3)).astype(np.uint8))


def transformers_features(folder: Path, name: str, pixels: torch.Tensor) -> torch.Tensor:
    """The last hidden state but one of the published model, asked to interpolate."""
    family = FAMILIES[name]
    model: Any = getattr(transformers, f"{family.prefix}Model").from_pretrained(folder / name)
    mean, std = torch.tensor(family.mean), torch.tensor(family.std)
    normal = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    asked = {} if name == "dinov2" else {"interpolate_pos_encoding": True}  # which always does
    states = model(normal, output_hidden_states=True, **asked).hidden_states
    return states[-2][:, family.class_tokens :]


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("side", [16, 24, 40, 64])
def test_features_equal_transformers_that_interpolates(name: str, side: int, towers: Path) -> None:
    config = VisionConfig(name, str(towers / name), image_size=side)
    tower = build_tower(config).eval()
    pixels = random_pixels(side)
    with torch.no_grad():
        found, wanted = tower(pixels), transformers_features(towers, name, pixels)
    patches = (side // PATCH) ** 2
    assert found.shape == (2, patches, 16)
    assert (tower.image_size, tower.num_tokens) == (side, patches)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    shape = tower_shape(config)
    assert shape is not None
    assert (shape.image_size, shape.num_tokens) == (side, patches)
    kept = (
        build_tower(replace(config, vision_feature_select_strategy="full"))
        if name != "siglip"
        else tower
    )
    assert kept.num_tokens == patches + (name != "siglip")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_class_token_and_the_rest_stay_as_they_were(name: str, towers: Path) -> None:
    before = build_tower(VisionConfig(name, str(towers / name))).state_dict()
    after = build_tower(VisionConfig(name, str(towers / name), image_size=40)).state_dict()
    positions = f"{name}.embeddings.{FAMILIES[name].positions}"
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key != positions:
            assert torch.equal(after[key], value), key
    rows = {key: state[positions].reshape(-1, 16) for key, state in (("b", before), ("a", after))}
    classes = FAMILIES[name].class_tokens
    assert torch.equal(rows["b"][:classes], rows["a"][:classes])
    assert len(rows["a"]) == 25 + classes


@pytest.mark.parametrize("name", list(FAMILIES))
def test_random_weights_are_made_at_the_size(name: str) -> None:
    tower = build_tower(VisionConfig(name, settings=twins.TOWERS[name], image_size=40))
    assert isinstance(tower, TransformersTower)
    assert (tower.image_size, tower.num_tokens, tower.own_size) == (40, 25, 40)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (30, r"vision\.image_size: 30 is no multiple of the tower's patch, 8; set 24 or 32$"),
        (7, r"vision\.image_size: 7 is no multiple of the tower's patch, 8; set 8$"),
        (-8, r"vision\.image_size: -8; expected a side in pixels, or 0"),
    ],
)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_size_that_cannot_be_is_one_line(size: int, words: str, name: str, towers: Path) -> None:
    both: list[dict[str, Any]] = [
        {"pretrained": str(towers / name)},
        {"settings": twins.TOWERS[name]},
    ]
    for given in both:
        with pytest.raises(ModelError, match=words):
            build_tower(VisionConfig(name, image_size=size, **given))


def test_a_published_size_that_its_patch_does_not_divide_stays(tmp_path: Path) -> None:
    """As SigLIP's so400m has it: 384 px and patches of 14."""
    settings: Any = {**twins.TOWER, "image_size": 20}
    model: Any = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings))
    model.save_pretrained(tmp_path)
    for size in (0, 20):
        assert build_tower(VisionConfig("siglip", str(tmp_path), image_size=size)).num_tokens == 4


class Fixed(Tower):
    """A tower of one's own that takes images of one size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size, self.num_tokens, self.hidden_size = 8, 1, 4


def test_a_tower_of_ones_own_must_follow_the_size() -> None:
    name = f"{__name__}:Fixed"
    assert tower_shape(VisionConfig(name)) is None
    assert build_tower(VisionConfig(name, image_size=8)).image_size == 8
    with pytest.raises(ModelError, match=r"vision\.image_size: 16, but tower .*Fixed takes .* 8"):
        build_tower(VisionConfig(name, image_size=16))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_an_export_has_the_size_and_the_positions(name: str, towers: Path, tmp_path: Path) -> None:
    config = twins.config(name)
    vision = replace(config.vision, pretrained=str(towers / name), settings={}, image_size=40)
    model = build_model(replace(config, vision=vision)).eval()
    write_hf(model, tmp_path, image_token_id=twins.IMAGE_ID)
    pixels = random_pixels(40)
    with torch.no_grad():
        wanted = model.image_features(pixels)
        assert torch.equal(read_hf(tmp_path).image_features(pixels), wanted)
        theirs: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path)
        assert theirs.config.vision_config.image_size == 40
        assert theirs.config.image_seq_length == 25
        found = theirs.get_image_features(twins.normal_pixels(pixels.numpy(), model))
    rows = torch.cat([*getattr(found, "pooler_output", found)])
    torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-5)


def test_llavas_layout_has_a_tower_of_another_size_as_a_folder(
    towers: Path, tmp_path: Path
) -> None:
    """LLaVA builds its tower of what it names: the published one, or the one that is written."""
    config = twins.config("clip")
    vision = replace(config.vision, pretrained=str(towers / "clip"), settings={}, image_size=40)
    resized = build_model(replace(config, vision=vision)).eval()
    assert published_tower(resized, TowerImages(40, "pad")) == ""
    folder = write_tower(resized, tmp_path, TowerImages(40, "pad"), torch.float32)
    theirs = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    pixels = random_pixels(40)
    mean, std = (torch.tensor(v) for v in (resized.config.vision.mean, resized.config.vision.std))
    normal = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    states: Any = theirs(normal, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-1][:, 1:], resized.vision(pixels), rtol=1e-5, atol=1e-5)
