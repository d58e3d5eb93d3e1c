"""Teachers of transformers' classes, tiny and random, loaded from a folder as published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)

from lapilli.data.building.teachers import load_teacher
from lapilli.data.config import TargetConfig
from lapilli.data.errors import DataError

SIDE, WIDTH = 32, 16
DINO: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 1,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def normal(images: np.ndarray, of: Any) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in of)
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def made(kind: Any, config: Any, folder: Path) -> Any:
    """A random model of a class, saved as published ones are."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and projections that are not one and zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def target(teacher: str, folder: Path, rows: int, width: int, **values: Any) -> TargetConfig:
    return TargetConfig(
        teacher, rows=rows, width=width, size=SIDE, pretrained=str(folder), **values
    )


@torch.no_grad()
def test_depth_is_the_mean_of_the_encoders_four_levels(tmp_path: Path) -> None:
    levels_of: dict[str, Any] = {"out_indices": [1, 2, 3, 4]}  # the backbone's own settings
    backbone = Dinov2Config(**DINO, **levels_of, apply_layernorm=True, reshape_hidden_states=False)
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, reassemble_hidden_size=WIDTH,
        neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4, head_hidden_size=4,
    )  # fmt: skip
    model = made(DepthAnythingForDepthEstimation, config, tmp_path)
    found = load_teacher(target("depth_anything_v2", tmp_path, 16, WIDTH))(pixels(3))
    states = model.backbone.embeddings(normal(pixels(3), IMAGENET))
    levels = []
    for layer in model.backbone.encoder.layer:
        states = layer(states)
        states = states if isinstance(states, torch.Tensor) else states[0]
        levels.append(model.backbone.layernorm(states)[:, 1:])
    np.testing.assert_allclose(found, torch.stack(levels).mean(0).numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_segmentation_is_the_encoders_last_map_on_the_targets_grid(tmp_path: Path) -> None:
    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    swin = SwinConfig(
        image_size=SIDE, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=2, **stages,
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=swin, hidden_dim=32, conv_dim=32, mask_dim=32, num_queries=4,
        num_attention_heads=2, encoder_layers=1, decoder_layers=2, text_encoder_width=32,
        text_encoder_num_layers=1, text_encoder_vocab_size=10, encoder_feedforward_dim=8,
        dim_feedforward=8, is_training=False, common_stride=4,
    )  # fmt: skip
    model = made(OneFormerForUniversalSegmentation, config, tmp_path)
    found = load_teacher(target("oneformer", tmp_path, 9, 64))(pixels(2))
    last = model.model.pixel_level_module.encoder(normal(pixels(2), IMAGENET)).feature_maps[-1]
    assert last.shape == (2, 64, 2, 2)
    # bilinear without aligned corners from 2 to 3: the middle is the mean, the ends are the cells
    grid = last.permute(0, 2, 3, 1)
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    expected = torch.einsum("ya,xb,nabc->nyxc", weights, weights, grid).flatten(1, 2)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_images_embedding_is_clips(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIDE, patch_size=8, projection_dim=12,
    )  # fmt: skip
    model = made(CLIPVisionModelWithProjection, config, tmp_path)
    found = load_teacher(target("clip_image", tmp_path, 1, 12))(pixels(2))
    pooled = model.vision_model(normal(pixels(2), CLIP)).pooler_output
    expected = (pooled @ model.visual_projection.weight.T).unsqueeze(1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dinov2_gives_the_mean_of_the_layers_that_are_named(tmp_path: Path) -> None:
    model = made(Dinov2Model, Dinov2Config(**DINO), tmp_path)
    images = pixels(2)
    last = load_teacher(target("dinov2", tmp_path, 16, WIDTH))(images)
    whole = model(normal(images, IMAGENET)).last_hidden_state[:, 1:]
    np.testing.assert_allclose(last, whole.numpy(), rtol=1e-4, atol=1e-5)
    both = load_teacher(target("dinov2", tmp_path, 16, WIDTH, settings={"layers": [2, 4]}))(images)
    states = model(normal(images, IMAGENET), output_hidden_states=True).hidden_states
    second = model.layernorm(states[2])[:, 1:]
    np.testing.assert_allclose(both, ((second + whole) / 2).numpy(), rtol=1e-4, atol=1e-5)


def test_weights_of_another_model_are_one_line(tmp_path: Path) -> None:
    made(Dinov2Model, Dinov2Config(**DINO), tmp_path)
    for teacher, words in (
        ("clip_image", "cannot be made: pretrained: .* cannot be loaded as CLIPVisionModel"),
        ("oneformer", "cannot be loaded as OneFormer"),
    ):
        with pytest.raises(DataError, match=words) as said:
            load_teacher(target(teacher, tmp_path, 1, 12))
        assert "\n" not in str(said.value)
    with pytest.raises(DataError, match="settings: 'layer' is unknown; expected layers"):
        load_teacher(target("dinov2", tmp_path, 16, WIDTH, settings={"layer": 1}))
    with pytest.raises(DataError, match="cannot be loaded as Dinov2"):
        load_teacher(target("dinov2", tmp_path / "nowhere", 16, WIDTH))
