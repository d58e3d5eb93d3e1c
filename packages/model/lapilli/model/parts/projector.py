"""Projectors: tower features to the language model's embedding size."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from lapilli.model.errors import ModelError
from lapilli.model.registry import build_own, load_builder

__all__ = ["PROJECTORS", "build_projector", "set_scale"]


def _linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


def _identity(inputs: int, outputs: int) -> nn.Module:
    if inputs != outputs:
        raise ModelError(
            f"projector: identity from {inputs} to {outputs}; the sizes must be equal, take linear"
        )
    return nn.Identity()


def _mlp(depth: int) -> Callable[[int, int], nn.Module]:
    """LLaVA's `mlpNx_gelu`: N linear layers with GELU between them."""

    def build(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(inputs, outputs)]
        for _ in range(1, depth):
            layers += [nn.GELU(), nn.Linear(outputs, outputs)]
        return nn.Sequential(*layers)

    return build


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {"linear": _linear, "identity": _identity}


def build_projector(name: str, inputs: int, outputs: int) -> nn.Module:
    """The projector a config names, from `inputs` to `outputs` features.

    Raises:
        ModelError: Unknown name.
    """
    match = re.fullmatch(r"mlp([1-9])x_gelu", name)
    if match:
        return _mlp(int(match[1]))(inputs, outputs)
    builder = load_builder(name, PROJECTORS, what="projector (or mlpNx_gelu)")
    return (
        builder(inputs, outputs)
        if name in PROJECTORS
        else build_own(lambda: builder(inputs, outputs))
    )


def set_scale(projector: nn.Module, std: float) -> None:
    """Redraw the weights of its linear layers, normal with deviation `std`; biases become zero.

    With a small deviation an image contributes almost nothing at first, so a trained language model
    behaves as before.
    """
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(module.bias)
