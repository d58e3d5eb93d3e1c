"""Adapters over a language model in 4 bits."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.weights import plain_weights
from lapilli.model.parts.quantized import Quantization, round_linear_layers
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from tests.model import twins

SETTINGS = {**twins.DECODER, "hidden_size": 64, "intermediate_size": 128}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is absent; pip install 'lapilli[qlora]'",
)


KINDS: list[dict[str, Any]] = [
    {"quantize": "nf4"}, {"quantize": "fp4"}, {"quantize": "int8"},
    {"quantize": "nf4", "double_quant": False}, {"quantize": "fp4", "double_quant": False},
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    base = twins.config(trainable=("projector", "language"))
    plain = build_model(replace(base, language=replace(base.language, settings=SETTINGS)))
    plain.language.save_pretrained(tmp_path)
    language = LanguageConfig(pretrained=str(tmp_path), attention="eager", quantize="nf4")
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0)
    return replace(base, language=language, lora=lora)


def batch() -> Any:
    return collate(twins.samples(5, (1, 0, 2)), BatchShape(3, (48,), 9, 4), twins.SIDE)


def packed(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    found = {n: p for n, p in model.named_parameters() if not p.is_floating_point()}
    return {name: value.detach().clone() for name, value in found.items()}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_loss_and_leave_the_weights_in_few_bits(
    config: ModelConfig, kind: dict[str, Any]
) -> None:
    model = build_model(replace(config, language=replace(config.language, **kind)))
    before = packed(model)
    assert len(before) == 2 * 7  # two layers; neither head nor tower
    kept_in = torch.int8 if kind["quantize"] == "int8" else torch.uint8
    assert {v.dtype for v in before.values()} == {kept_in}
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01)
    losses: list[float] = []
    for _ in range(8):
        loss = twins.forward(model, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = packed(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is not None for p in trainable_parameters(model).values())


@needs_bitsandbytes
@pytest.mark.parametrize("width", [64, 96])
def test_answers_are_computed_with_the_weights_of_training_on_every_processor(
    config: ModelConfig, width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """bitsandbytes has a kernel of its own for some, which takes whole blocks of 64 columns."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    settings = {**SETTINGS, "intermediate_size": width}
    plain = build_model(replace(config, lora=None, language=LanguageConfig(settings=settings)))
    plain.language.save_pretrained(tmp_path / "base")
    language = replace(config.language, pretrained=str(tmp_path / "base"))
    model = build_model(replace(config, language=language))
    before = packed(model)
    trained: Any = model.train().language
    ids = torch.arange(1, 12)[None]
    with torch.inference_mode():
        expected = trained(ids).logits
        assert torch.equal(model.eval().language(ids).logits, expected)
    after = packed(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_that_transformers_loader_makes(
    config: ModelConfig, kind: dict[str, Any]
) -> None:
    """The same packed numbers, and the same logits."""
    quantize, is_double = kind["quantize"], kind.get("double_quant", True)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantize != "int8":
        settings = {
            "load_in_4bit": True, "bnb_4bit_quant_type": quantize,
            "bnb_4bit_use_double_quant": is_double, "bnb_4bit_compute_dtype": torch.float32,
        }  # fmt: skip
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        config.language.pretrained, dtype=torch.float32, attn_implementation="eager",
        quantization_config=BitsAndBytesConfig(**settings),
    )  # fmt: skip
    language = replace(config.language, **kind)
    ours = build_model(replace(config, lora=None, trainable=("projector",), language=language))
    expected = {n: p for n, p in theirs.named_parameters() if not p.is_floating_point()}
    found = {n.removeprefix("language."): v for n, v in packed(ours).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        # in training mode: in the other one theirs takes bf16 on some processors
        logits = ours.language.train()(ids, use_cache=False).logits
        torch.testing.assert_close(logits, theirs.train()(ids, use_cache=False).logits)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_are_the_numbers_that_it_computes_with(
    config: ModelConfig, kind: dict[str, Any]
) -> None:
    """Before and after a forward, in which bitsandbytes moves the scales of 8 bits; rounding whole
    weights, as an export of adapters is read, gives the same ones."""
    how = replace(config.language, **kind)
    model = build_model(replace(config, language=how))
    before = {n: w.make().clone() for n, w in plain_weights(model.language, merged=False).items()}
    twins.forward(model, batch())
    after = plain_weights(model.language, merged=False)
    assert all(torch.equal(after[n].make(), value) for n, value in before.items())
    plain = build_model(replace(config, lora=None, trainable=("projector",), language=replace(
        how, quantize="none", double_quant=True
    )))  # fmt: skip
    whole: dict[str, torch.Tensor] = plain.language.state_dict()
    assert before.keys() == whole.keys()
    assert 0 < max((before[n] - v).abs().max().item() for n, v in whole.items()) < 0.2
    round_linear_layers(plain.language, torch.float32, Quantization.of(how))
    for name, value in plain.language.state_dict().items():
        torch.testing.assert_close(before[name], value, rtol=0, atol=1e-6)


@needs_bitsandbytes
def test_the_loss_equals_that_of_the_weights_dequantised(config: ModelConfig) -> None:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    model = build_model(config)
    plain = build_model(replace(config, language=replace(config.language, quantize="none")))
    modules = dict(plain.named_modules())
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            whole: Any = modules[name]
            whole.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    plain.load_state_dict(
        {n: v for n, v in model.state_dict().items() if ".lora_" in n or n.startswith("projector")},
        strict=False,
    )
    with torch.no_grad():
        torch.testing.assert_close(
            twins.forward(model, batch()), twins.forward(plain, batch()), rtol=1e-4, atol=1e-4
        )


def test_without_the_package_the_extra_is_named(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    absent = "bitsandbytes"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == absent else found(name, *a)
    )
    with pytest.raises(ModelError, match=r"bitsandbytes is not installed; pip install"):
        build_model(config)


def test_what_4_bits_cannot_do_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"to learn whole; set lora"):
        replace(config, lora=None)
    with pytest.raises(ModelError, match=r"without language\.pretrained"):
        LanguageConfig(quantize="nf4")
    with pytest.raises(ModelError, match=r"double_quant: false with quantize int8, which has no"):
        replace(config.language, quantize="int8", double_quant=False)
    with pytest.raises(TrainError, match=r"zero_stage: 3 with model\.language\.quantize nf4"):
        RunConfig(
            "in", "out", "view", config, global_batch_size=1, micro_batch_size=1, zero_stage=3
        )
