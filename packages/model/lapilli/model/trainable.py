"""Which parameters learn."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

__all__ = ["decay_groups", "freeze", "trainable_parameters"]


def freeze(model: nn.Module, trainable: Collection[str]) -> None:
    """Let the named parts (direct children of `model`) learn and freeze the others."""
    for name, child in model.named_children():
        child.requires_grad_(name in trainable)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; one shared by two modules stands once."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that learn, with and without weight decay.

    Vectors (biases, norms' weights) get none.
    """
    values = list(trainable_parameters(model).values())
    return [v for v in values if v.dim() >= 2], [v for v in values if v.dim() < 2]
