"""A vision tower of your own: three numbers and a forward from pixels to features."""

from typing import Any

import torch
from torch import Tensor, nn

from lapilli.model import LanguageConfig, ModelConfig, Tower, VisionConfig, build_model


class ColourTower(Tower):
    """The mean colour of each cell of a grid, and a linear layer."""

    def __init__(self, cells: int = 4, hidden_size: int = 16, image_size: int = 32) -> None:
        super().__init__()
        self.image_size, self.hidden_size, self.num_tokens = image_size, hidden_size, cells**2
        self.pool = nn.AdaptiveAvgPool2d(cells)
        self.layer = nn.Linear(3, hidden_size)

    def forward(self, pixels_NHW3: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] to [N, T, C], in the dtype of the weights."""
        colours = self.pool(pixels_NHW3.permute(0, 3, 1, 2).to(self.layer.weight.dtype) / 255)
        return self.layer(colours.flatten(2).transpose(1, 2))


def colour_tower(config: VisionConfig) -> Tower:
    """What a recipe names: `tower: own_tower:colour_tower`, with `settings` of your own."""
    return ColourTower(**config.settings)


if __name__ == "__main__":
    decoder: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 300,
    }
    model = build_model(
        ModelConfig(
            VisionConfig("own_tower:colour_tower", settings={"cells": 2}),
            LanguageConfig("llama", settings=decoder),
            trainable=("vision", "projector", "language"),
        )
    )
    features = model.image_features(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
    print(tuple(features.shape))  # 3 images x 4 tokens, the decoder's width
