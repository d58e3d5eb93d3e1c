"""CLIP's ConvNeXt: the trunk of open_clip's towers, under timm's names, and its published files.

Read are `open_clip_config.json` and `open_clip_model.safetensors` (or the `.bin`, by
`allow_pickle`) of a hub name or folder. Rows leave the last stage before any norm, so
`vision_feature_layer` is -1; any image size that 32 divides will do. Exported with task tokens in
VisPer-LM's layout, which has its weights; transformers' LLaVA, LLaVA and PEFT have no place for it.
Tried on tiny weights of the published layout, not on LAION's.

Shape suffix legend: N images, H height, W width, T positions of a stage, C its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.hub import cached_file

from lapilli.model.config import VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.pretrained import check_readable, check_size, one_line
from lapilli.model.parts.weight_files import read_object, read_tensors

__all__ = [
    "ConvNextSettings", "ConvNextTrunk", "build_trunk", "convnext_settings", "published_norm",
]  # fmt: skip

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRUNK = "visual.trunk."
STEM = 4  # pixels a side that the stem makes one position of; each later stage halves the side


@dataclass(frozen=True)
class ConvNextSettings:
    """Sizes of a trunk, named as transformers' `ConvNextConfig` names them.

    Attributes:
        depths: Blocks of each stage.
        hidden_sizes: Channels of each stage.
        layer_norm_eps: Of every norm.
        image_size: Side of the images that the weights were trained with, in pixels.
    """

    depths: tuple[int, ...] = (3, 4, 30, 3)
    hidden_sizes: tuple[int, ...] = (384, 768, 1536, 3072)
    layer_norm_eps: float = 1e-5
    image_size: int = 256

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        numbers = (*self.depths, *self.hidden_sizes, self.image_size)
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ModelError(f"vision.settings: {self}; expected whole numbers above 0")
        if not self.depths or len(self.depths) != len(self.hidden_sizes):
            raise ModelError(
                f"vision.settings: depths {[*self.depths]} and hidden_sizes "
                f"{[*self.hidden_sizes]}; expected one of each a stage"
            )

    @property
    def reduction(self) -> int:
        """Pixels a side that a feature row stands for."""
        return STEM << (len(self.depths) - 1)


# By `timm_model_name`: what timm builds for open_clip's published towers.
PUBLISHED = {
    "convnext_base": ConvNextSettings((3, 3, 27, 3), (128, 256, 512, 1024), 1e-6),
    "convnext_large_mlp": ConvNextSettings((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6, 320),
    "convnext_xxlarge": ConvNextSettings(),
}


def convnext_settings(config: VisionConfig) -> ConvNextSettings:
    """A tower's sizes: those that its published name stands for, and `vision.settings` over them.

    Raises:
        ModelError: A config that cannot be read, another kind of tower, or an unknown setting.
    """
    known = [field.name for field in fields(ConvNextSettings)]
    if unknown := sorted({*config.settings} - {*known}):
        raise ModelError(f"vision.settings: {unknown[0]!r} is unknown; expected {', '.join(known)}")
    given: dict[str, Any] = {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        for name, value in config.settings.items()
    }
    if not config.pretrained:
        return ConvNextSettings(**given)
    vision = _section(_open_clip(config.pretrained), "model_cfg", "vision_cfg")
    name, side = vision.get("timm_model_name"), vision.get("image_size")
    if name not in PUBLISHED and not {"depths", "hidden_sizes", "layer_norm_eps"} <= {*given}:
        raise ModelError(
            f"vision.pretrained: {config.pretrained!r} is a {name}; expected "
            f"{', '.join(PUBLISHED)}, or depths, hidden_sizes and layer_norm_eps in vision.settings"
        )
    base = PUBLISHED.get(str(name), ConvNextSettings())
    sizes = {field: getattr(base, field) for field in known} | (
        {"image_size": side} if side else {}
    )
    return ConvNextSettings(**(sizes | given))


def published_norm(pretrained: str) -> Mapping[str, Any]:
    """`mean` and `std` of the images as open_clip's config has them; empty where it has none."""
    return _section(_open_clip(pretrained), "preprocess_cfg") if pretrained else {}


def _open_clip(pretrained: str) -> dict[str, Any]:
    check_readable(pretrained)
    with one_line(_unreadable(pretrained)):
        return read_object(Path(str(cached_file(pretrained, CONFIG))))


def _section(found: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        below: object = found.get(name)
        found = cast("Mapping[str, Any]", below) if isinstance(below, dict) else {}
    return found


def _unreadable(pretrained: str) -> str:
    return (
        f"vision.pretrained: {pretrained!r} cannot be loaded; expected a hub name or a folder with "
        f"open_clip's {CONFIG} and {WEIGHTS[0]}"
    )


class ConvNextBlock(GradientCheckpointingLayer):
    """A depthwise convolution, a norm and an MLP beside the input (arXiv 2201.03545)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(size, size, kernel_size=7, padding=3, groups=size)
        self.norm = nn.LayerNorm(size, eps=eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(size, 4 * size), "fc2": nn.Linear(4 * size, size)}
        )
        self.gamma = nn.Parameter(torch.full((size,), 1e-6))

    def forward(self, rows_NTC: Tensor) -> Tensor:
        """A square of positions, row by row, to as many."""
        mixed_NTC = _rows(self.conv_dw(_square(rows_NTC)))
        wide = nn.functional.gelu(self.mlp["fc1"](self.norm(mixed_NTC)))
        return rows_NTC + self.gamma * self.mlp["fc2"](wide)


class ConvNextStage(nn.Module):
    """Halve the side, but in the first stage, and run the blocks."""

    def __init__(self, inputs: int, size: int, depth: int, eps: float, *, is_first: bool) -> None:
        super().__init__()
        layers = [] if is_first else [
            nn.LayerNorm(inputs, eps=eps), nn.Conv2d(inputs, size, kernel_size=2, stride=2)
        ]  # fmt: skip
        self.downsample = nn.ModuleList(layers)
        self.blocks = nn.ModuleList(ConvNextBlock(size, eps) for _ in range(depth))

    def forward(self, rows_NTC: Tensor) -> Tensor:
        """Positions of the stage before to those of this one."""
        if len(self.downsample):
            norm, convolution = self.downsample
            rows_NTC = _rows(convolution(_square(norm(rows_NTC))))
        for block in self.blocks:
            rows_NTC = block(rows_NTC)
        return rows_NTC


class ConvNextTrunk(nn.Module):
    """Stem and stages, without the head that pools; parameters are named as in timm."""

    def __init__(self, settings: ConvNextSettings) -> None:
        super().__init__()
        self.settings, eps = settings, settings.layer_norm_eps
        widths = settings.hidden_sizes
        self.stem = nn.ModuleList([
            nn.Conv2d(3, widths[0], kernel_size=STEM, stride=STEM), nn.LayerNorm(widths[0], eps=eps)
        ])  # fmt: skip
        self.stages = nn.ModuleList(
            ConvNextStage(inputs, size, depth, eps, is_first=not number)
            for number, (inputs, size, depth) in enumerate(
                zip((0, *widths), widths, settings.depths, strict=False)
            )
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Normalised images to the last stage's positions, [N, T, C], as they leave it."""
        convolution, norm = self.stem
        rows_NTC = norm(_rows(convolution(pixels_N3HW)))
        for stage in self.stages:
            rows_NTC = stage(rows_NTC)
        return rows_NTC

    def positions(self) -> dict[nn.Module, int]:
        """By module, how many positions it works on for each row that leaves the trunk."""
        last = len(self.stages) - 1
        parts = [(0, self.stem), *enumerate(self.stages)]
        return {module: 4 ** (last - number) for number, part in parts for module in part.modules()}


def _square(rows_NTC: Tensor) -> Tensor:
    side = round(rows_NTC.shape[1] ** 0.5)
    return rows_NTC.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _rows(square_NCHW: Tensor) -> Tensor:
    return square_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def build_trunk(config: VisionConfig, *, weights: bool) -> ConvNextTrunk:
    """A trunk with open_clip's weights, or with random ones where the config names none.

    Raises:
        ModelError: Weights that are not there or of other sizes, or more than the memory holds.
    """
    settings = convnext_settings(config)
    if not config.pretrained:
        check_size("vision.settings", _bytes(settings), f"{settings}", layers=sum(settings.depths))
    trunk = ConvNextTrunk(settings)
    if not config.pretrained or not weights:
        return trunk
    check_readable(config.pretrained)
    with one_line(_unreadable(config.pretrained)):
        wanted = {f"{TRUNK}{name}" for name in trunk.state_dict()}
        found = read_tensors(_weight_file(config), wanted.__contains__)
        trunk.load_state_dict({n.removeprefix(TRUNK): v.float() for n, v in found.items()})
    return trunk


def _weight_file(config: VisionConfig) -> Path:
    """The file of weights; a pickle where the config allows one and there is nothing else.

    Raises:
        OSError: There is none.
    """
    try:
        return Path(str(cached_file(config.pretrained, WEIGHTS[0])))
    except OSError:
        if not config.allow_pickle:
            raise
    return Path(str(cached_file(config.pretrained, WEIGHTS[1])))


def _bytes(settings: ConvNextSettings) -> int:
    """Size of random weights in fp32, roughly."""
    pairs = zip(settings.depths, settings.hidden_sizes, strict=True)
    return 4 * sum(depth * size * (8 * size + 64) for depth, size in pairs)
