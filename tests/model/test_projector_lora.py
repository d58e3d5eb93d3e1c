"""Adapters on the projector: alone learning there, in one group, merged wherever it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lapilli.model.config import LoraConfig
from lapilli.model.errors import ModelError
from lapilli.model.flops import model_numbers
from lapilli.model.interop.hf import write_hf
from lapilli.model.interop.llava import load_llava, write_projector
from lapilli.model.interop.lora_run import write_lora_run
from lapilli.model.parts.trainable import base_name, group_of, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins
from tests.model.test_interop_hf import assert_same_logits

LORA = LoraConfig(rank=3, alpha=6, dropout=0.0, projector=True)


def made(**values: Any) -> VisionLanguageModel:
    """Adapters that do something."""
    given: dict[str, Any] = {"lora": LORA, "trainable": ("projector", "language"), **values}
    model = build_model(twins.config(**given))
    torch.manual_seed(4)
    with torch.no_grad():
        for value in trainable_parameters(model).values():
            value += 0.1 * torch.randn_like(value)
    return model


def features(model: VisionLanguageModel) -> torch.Tensor:
    pixels = torch.randint(
        0, 256, (2, twins.SIDE, twins.SIDE, 3), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    with torch.no_grad():
        return model.eval().image_features(pixels)


def test_its_adapters_learn_and_nothing_else_of_it() -> None:
    model = made()
    learnt = [n for n in trainable_parameters(model) if n.startswith("projector.")]
    assert sorted(learnt) == sorted(
        f"projector.{layer}.lora_{side}.default.weight" for layer in (0, 2) for side in "AB"
    )
    assert {group_of(name) for name in learnt} == {"adapters"}
    assert [m.trained for m in model_numbers(model).projector.matmuls].count(True) == 4


def test_features_are_those_of_pefts_own_model() -> None:
    model = made()
    plain = build_model(twins.config(trainable=("projector", "language"), lora=None))
    assert not torch.allclose(features(plain), features(model), atol=1e-3)  # they do something
    library: Any = peft
    settings = library.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"])
    wrapped = library.get_peft_model(plain.projector, settings)
    own = {n: v for n, v in model.projector.state_dict().items() if ".lora_" in n}
    wrapped.load_state_dict({f"base_model.model.{n}": v for n, v in own.items()}, strict=False)
    plain.projector = wrapped
    torch.testing.assert_close(features(model), features(plain), rtol=0, atol=1e-6)


def test_a_batch_without_images_gives_every_adapter_a_gradient() -> None:
    model = made().train()
    ids = torch.tensor([[1, 5, 9, 3]])
    model(
        input_ids=ids, position_ids=torch.arange(4)[None], merge_index=torch.full_like(ids, -1),
        pixels=torch.zeros(0, twins.SIDE, twins.SIDE, 3, dtype=torch.uint8),
        predict_positions=torch.tensor([0, 1]), targets=torch.tensor([5, 9]),
    ).backward()  # fmt: skip
    for name, value in trainable_parameters(model).items():
        assert value.grad is not None, name
        if name.startswith("projector."):
            assert not value.grad.any(), name


@pytest.mark.parametrize("form", ["projector", "lora run", "hf"])
def test_it_is_written_with_its_adapters_merged(tmp_path: Path, form: str) -> None:
    model = made()
    if form == "hf":
        write_hf(model.eval(), tmp_path, image_token_id=64)
        twin: Any = LlavaForConditionalGeneration.from_pretrained(
            tmp_path, attn_implementation="eager"
        )
        assert_same_logits(model, twin.eval())
        return
    target = build_model(twins.config(trainable=("projector", "language"), lora=None, seed=8))
    if form == "projector":
        load_llava(write_projector(model, tmp_path), target)
    else:
        write_lora_run(model, tmp_path)
        assert "projector" in load_llava(tmp_path, target)
    for name, value in target.projector.state_dict().items():
        held = dict(model.projector.named_parameters())
        plain = {base_name(n): v for n, v in held.items() if ".lora_" not in n}
        assert value.shape == plain[name].shape
        if name.endswith("weight"):
            layer = name.removesuffix(".weight")
            first, second = (held[f"{layer}.lora_{s}.default.weight"] for s in "AB")
            merged = plain[name] + second @ first * 2.0
            torch.testing.assert_close(value, merged.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainable": ("language",)}, "lora.projector: true, but projector is not in trainable"),
        (
            {"projector": "linear"},
            "lora.projector: true with projector linear, which has no linear",
        ),
    ],
)
def test_a_projector_without_a_place_for_them_is_one_line(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(replace(twins.config(), **{"lora": LORA, **values}))
