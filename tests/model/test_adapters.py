"""LoRA layers that accumulate their update, against PEFT's own forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lapilli.model.kernels.adapters import fuse_adapters


def adapted(*, bias: bool, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 10, bias=bias), nn.GELU(), nn.Linear(10, 4, bias=bias))
    model.requires_grad_(requires_grad=False)
    settings = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0", "2"])
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: an update that is left out would go unseen
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)])
def test_output_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool, dropout: float) -> None:
    theirs = adapted(bias=bias, dropout=dropout)
    ours = copy.deepcopy(theirs)
    assert fuse_adapters(ours) == 2
    found: list[list[torch.Tensor]] = []
    for model in (theirs, ours):
        x = torch.linspace(-1, 1, 2 * 5 * 6).flatten()[: torch.Size(shape).numel()].view(shape)
        x.requires_grad_()
        torch.manual_seed(1)  # of dropout
        output = model(x)
        output.square().sum().backward()
        assert x.grad is not None
        learnt = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(learnt) == 4
        found.append([output.detach(), x.grad, *learnt])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_names_copies_and_pefts_methods_stay() -> None:
    theirs = adapted(bias=True)
    ours = copy.deepcopy(theirs)
    fuse_adapters(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        copied[0].lora_B["default"].weight.zero_()
        copied[2].lora_B["default"].weight.zero_()
    x = torch.ones(3, 6)
    assert not torch.allclose(copied(x), ours(x)), "a copy computes with its own weights"
    expected = ours(x)
    for layer in (ours[0], ours[2]):
        layer.merge()
    torch.testing.assert_close(ours(x), expected)
    for layer in (ours[0], ours[2]):
        layer.unmerge()
        layer.enable_adapters(enabled=False)
    torch.testing.assert_close(ours(x), copied(x))
