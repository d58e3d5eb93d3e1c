"""The projector's first weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lapilli.model.errors import ModelError
from lapilli.model.vlm import build_model
from tests.model import twins


def linears(std: float | None) -> list[nn.Linear]:
    model = build_model(replace(twins.config(), projector_std=std))
    return [module for module in model.projector.modules() if isinstance(module, nn.Linear)]


def test_without_a_deviation_they_are_torchs_own() -> None:
    for layer in linears(None):
        bound = layer.in_features**-0.5
        assert 0.9 * bound < float(layer.weight.abs().max()) <= bound


def test_a_deviation_makes_them_normal_and_biases_zero() -> None:
    for layer in linears(0.01):
        assert float(layer.weight.std()) == pytest.approx(0.01, rel=0.2)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_a_deviation_below_zero_is_refused() -> None:
    with pytest.raises(ModelError, match="projector_std: -1"):
        replace(twins.config(), projector_std=-1.0)
