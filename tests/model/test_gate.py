"""The model never reads the device: every tower with every decoder, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from lapilli.model.attention.choice import DECODERS
from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes
from lapilli.model.transformers_internals import without_grouped_mm
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.device_reads import device_reads, without_values
from tests.model import decoders, twins

WITH_IMAGES, WITHOUT = twins.batch((1, 2, 0), 32), twins.batch((0, 0), 32)
BATCHES = {"images": WITH_IMAGES, "text": WITHOUT}
# What learns, as the stages of training have it.
STAGES: dict[str, dict[str, Any]] = {
    "projector": {"trainable": ("projector",)},
    "adapters": {"trainable": ("projector", "language"), "lora": LoraConfig(rank=2)},
    "whole": {"trainable": ("vision", "projector", "language")},
}
PAIRS = [
    *(("clip", family) for family in DECODERS),
    *((tower, "llama") for tower in twins.TOWERS if tower != "clip"),
]  # fmt: skip


def built(tower: str, family: str, **values: Any) -> VisionLanguageModel:
    model = build_model(
        ModelConfig(
            VisionConfig(tower, settings=twins.TOWERS[tower]),
            LanguageConfig(family, settings=decoders.settings(family), vocab_size=80),
            head_chunk=4,
            **values,
        )
    )
    if "vision" in model.config.trainable:
        recompute_all(model)
    set_modes(model)
    return model


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(
        **inputs, sample_losses=torch.zeros_like(inputs["input_ids"][:, 0], dtype=torch.float)
    )
    loss.backward()
    return loss


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("tower", "family"), PAIRS)
def test_forward_and_backward_read_nothing(tower: str, family: str, stage: str) -> None:
    model = built(tower, family, **STAGES[stage])
    for batch in BATCHES.values():
        inputs = twins.inputs(batch)
        with device_reads() as reads:
            step(model, inputs)
        assert [*map(str, reads)] == []


@pytest.mark.parametrize(("tower", "family"), PAIRS)
def test_tensors_without_values_are_enough(tower: str, family: str) -> None:
    """With fake tensors a read is an error, in whatever library."""
    model = built(tower, family, **STAGES["whole"])
    real = [twins.inputs(batch) for batch in BATCHES.values()]
    with without_values(model), without_grouped_mm():
        for given in real:
            inputs = {name: torch.empty_like(value) for name, value in given.items()}
            assert step(model, inputs).shape == ()


def plant(model: Any) -> None:
    """A read in the decoder's last norm, such as a library might bring."""
    norm = model.language.model.norm

    def ask(*_: object) -> None:
        norm.weight.sum().item()

    norm.register_forward_hook(ask)


def test_a_planted_read_is_found() -> None:
    model = built("clip", "llama", **STAGES["whole"])
    plant(model)
    with device_reads() as reads:
        step(model, twins.inputs(WITH_IMAGES))
    assert [read.operation for read in reads] == ["_local_scalar_dense"]
    assert f"{__file__}:" in reads[0].where
    given = twins.inputs(WITH_IMAGES)
    with without_values(model), pytest.raises(DataDependentOutputException):
        step(model, {name: torch.empty_like(value) for name, value in given.items()})


def test_transformers_own_attention_is_what_reads() -> None:
    """What the gate is for: with `sdpa` each forward looks for packed sequences."""
    language = LanguageConfig(settings=decoders.settings("llama"), attention="sdpa")
    model = build_model(ModelConfig(VisionConfig(settings=twins.TOWER), language, head_chunk=4))
    with device_reads() as reads:
        step(model, twins.inputs(WITH_IMAGES))
    assert len(reads) == 1
    assert "masking_utils.py" in reads[0].where
