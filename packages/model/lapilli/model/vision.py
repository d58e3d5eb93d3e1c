"""Vision towers: pixels to patch features.

Shape suffix legend: N images, H height, W width, T tokens an image, C tower's hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.model.config import VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.extension import load_builder
from lapilli.model.pretrained import check_settings, one_line

__all__ = ["TOWERS", "ClipTower", "Tower", "build_tower"]


class Tower(nn.Module):
    """What a tower of one's own must be: these three numbers and a forward.

    Attributes:
        image_size: Side of the images, in pixels.
        num_tokens: Feature rows an image gives, T.
        hidden_size: Size of a feature row, C.
    """

    image_size: int
    num_tokens: int
    hidden_size: int

    @abstractmethod
    def forward(self, pixels_NHW3: Tensor) -> Tensor:
        """uint8 pixels [N, H, W, 3] to features [N, T, C]."""
        raise NotImplementedError


class ClipTower(Tower):
    """transformers' CLIP vision model, one hidden state of it, without the class token.

    Only the layers up to that state are kept, and no norm after it: what does not reach the
    output would never get a gradient.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        clip: Any = _load_clip(config)
        layers: int = clip.config.num_hidden_layers
        kept = config.layer if config.layer >= 0 else layers + 1 + config.layer
        if not 1 <= kept <= layers:
            raise ModelError(f"vision.layer: {config.layer}; the tower has {layers} layers")
        clip.encoder.layers = clip.encoder.layers[:kept]
        clip.post_layernorm = nn.Identity()
        self.clip = clip
        self.image_size = int(clip.config.image_size)
        self.num_tokens = (self.image_size // int(clip.config.patch_size)) ** 2
        self.hidden_size = int(clip.config.hidden_size)
        # No buffers: a model cast to bf16 casts its buffers too, and a mean of 122.77 becomes 123.
        self._scale = 255 * torch.tensor([config.mean, config.std])

    def forward(self, pixels_NHW3: Tensor) -> Tensor:
        """Normalise on the device in fp32, then encode in the weights' dtype."""
        if self._scale.device != pixels_NHW3.device:
            self._scale = self._scale.to(pixels_NHW3.device)
        mean, std = self._scale
        normal_N3HW = ((pixels_NHW3.float() - mean) / std).permute(0, 3, 1, 2)
        normal_N3HW = normal_N3HW.to(self.clip.pre_layrnorm.weight.dtype)
        return self.clip(pixel_values=normal_N3HW).last_hidden_state[:, 1:]


def _load_clip(config: VisionConfig) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if not config.pretrained:
        check_settings("vision.settings", config.settings, CLIPVisionConfig())
        with one_line("vision.settings: no CLIP tower can be built of them"):
            return CLIPVisionModel(CLIPVisionConfig(**config.settings))
    with one_line(
        f"vision.pretrained: {config.pretrained!r} cannot be loaded; expected a hub name or a "
        "folder with a CLIP vision model in safetensors"
    ):
        return CLIPVisionModel.from_pretrained(
            config.pretrained, dtype=torch.float32, use_safetensors=True
        )


TOWERS: dict[str, Callable[[VisionConfig], Tower]] = {"clip": ClipTower}


def build_tower(config: VisionConfig) -> Tower:
    """The tower a config names.

    Raises:
        ModelError: Unknown name, or weights that are not there.
    """
    return load_builder(config.tower, TOWERS, what="vision.tower")(config)
