"""A projector of one's own, as a recipe would name it."""

from __future__ import annotations

from torch import nn


def double_linear(inputs: int, outputs: int) -> nn.Module:
    """Two linear layers with nothing between."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, outputs))
