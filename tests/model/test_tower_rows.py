"""Which rows of a tower are taken: after its norm, and without the first ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lapilli.model.config import VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.flops import model_numbers
from lapilli.model.interop.hf import read_hf, write_hf
from lapilli.model.interop.llava_tower import TowerImages, write_tower
from lapilli.model.parts.vision import build_tower, tower_shape
from lapilli.model.vlm import build_model, read_outline
from tests.model import twins
from tests.model.test_interop_hf import assert_same_logits


def config(tower: str, *, layer: int = -1, strategy: Any = "default", **rows: Any) -> Any:
    found = twins.config(tower, layer=layer, strategy=strategy)
    return replace(found, vision=replace(found.vision, **rows))


def published(tower: str, folder: Path) -> Any:
    """transformers' own model of random weights, whose norm is not the identity, in a folder."""
    if tower == "siglip":
        model: Any = SiglipVisionModel(SiglipVisionConfig(**twins.TOWER))
    else:
        model = Dinov2Model(Dinov2Config(**twins.DINOV2))
    norm = model.post_layernorm if tower == "siglip" else model.layernorm
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2.0)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("tower", "strategy", "skip", "first"),
    [("siglip", "default", 1, 1), ("siglip", "default", 0, 0), ("dinov2", "default", 0, 1),
     ("dinov2", "full", 0, 0), ("dinov2", "default", 2, 3)],
)  # fmt: skip
def test_rows_are_those_of_last_hidden_state(
    tmp_path: Path, tower: str, strategy: str, skip: int, first: int
) -> None:
    theirs = published(tower, tmp_path)
    ours = config(tower, strategy=strategy, norm=True, skip=skip)
    ours = replace(ours, vision=replace(ours.vision, pretrained=str(tmp_path), settings={}))
    model = build_model(ours).eval()
    pixels = twins.samples(1, (2,))[0].pixels
    with torch.no_grad():
        expected = theirs(twins.normal_pixels(pixels, model)).last_hidden_state[:, first:]
        found = model.vision(torch.from_numpy(pixels))
    assert found.shape[1] == model.vision.num_tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    outline = read_outline(ours)
    assert outline is not None
    assert outline.vision.num_tokens == found.shape[1]
    counted = model_numbers(model)
    classes = int(tower == "dinov2")
    assert (counted.patches, counted.tower_tokens) == (twins.TOKENS, twins.TOKENS + classes)
    assert counted.image_tokens == found.shape[1]


def test_the_norm_learns_and_an_export_of_the_tower_has_it(tmp_path: Path) -> None:
    model = build_model(config("siglip", norm=True, skip=1))
    tower: Any = model.vision
    norm = tower.encoder.post_layernorm
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    tower(torch.zeros(1, twins.SIDE, twins.SIDE, 3, dtype=torch.uint8)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in norm.parameters())
    folder = write_tower(model, tmp_path, TowerImages(twins.SIDE, "stretch"), torch.float32)
    again = build_tower(replace(model.config.vision, pretrained=str(folder), settings={}))
    for name, value in tower.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_transformers_leaves_out_the_same_first_row(tmp_path: Path) -> None:
    """Its strategy `default` drops SigLIP's first patch, whatever that is."""
    model = build_model(config("siglip", layer=-2, skip=1)).eval()
    write_hf(model, tmp_path, image_token_id=64)
    assert_same_logits(model, LlavaForConditionalGeneration.from_pretrained(tmp_path).eval())
    back = read_hf(tmp_path)
    assert (back.config.vision.skip, back.vision.num_tokens) == (1, twins.TOKENS - 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"norm": True}, "vision.norm: true has no counterpart in transformers' LLaVA"),
        ({"skip": 2}, "vision.skip: 2 has no counterpart in transformers' LLaVA"),
    ],
)
def test_what_transformers_llava_cannot_take_is_refused(
    tmp_path: Path, rows: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        write_hf(build_model(config("siglip", **rows)), tmp_path, image_token_id=64)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (("clip", {"norm": True}), "the last norm of clip is for its class token alone"),
        (("siglip", {"norm": True, "layer": -2}), "the norm comes after the last layer, set"),
        (("siglip", {"skip": 9}), "vision.skip: 9 leaves none of an image's 9 rows"),
    ],
)
def test_rows_that_are_not_there_are_one_line(made: tuple[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as said:
        tower_shape(config(made[0], **made[1]).vision)
    assert "\n" not in str(said.value)


def test_a_number_of_rows_below_none_is_refused() -> None:
    with pytest.raises(ModelError, match=r"vision\.skip: -1; expected 0 or more rows"):
        VisionConfig(skip=-1)
