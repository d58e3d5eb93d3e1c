"""The count of operations against torch's own counter, on tiny models of each architecture."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.config import ActivationPolicy, LoraConfig
from lapilli.model.flops import (
    BatchNumbers,
    Matmul,
    ModelNumbers,
    model_numbers,
    part_numbers,
    step_flops,
)
from lapilli.model.parts.recomputation import apply_policy
from lapilli.model.parts.trainable import set_modes
from lapilli.model.peak import measured_peak, peak_flops
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins
from tests.model.aux_models import aux_batch, aux_config, aux_inputs

ROWS, TOKENS, IMAGES, TARGETS, SIZE, VOCABULARY = 2, 12, 3, 5, 32, 40
LANGUAGES = ["llama", "mistral", "phi", "qwen2", "qwen3", "gemma", "gemma2", "phi3"]
BATCH = BatchNumbers([TOKENS] * ROWS, IMAGES, TARGETS, ROWS, TOKENS, IMAGES, TARGETS)


def language(name: str) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": SIZE, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name in ("phi", "phi3"):
        del settings["head_dim"]
    config = AutoConfig.for_model(name, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def clip() -> Any:
    config: Any = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    config._attn_implementation = "eager"
    return CLIPVisionModel(config)


def lora(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=3, target_modules="all-linear"), model)


def counted(tower: Any, projector: nn.Module, model: Any, head: nn.Module) -> int:
    """What torch's counter sees of a step, less rotary positions, which it takes for products."""
    pixels = torch.randn(IMAGES, 3, 24, 24)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    embedding = model.get_input_embeddings()(ids)
    with FlopCounterMode(display=False) as counter:
        features = projector(tower(pixel_values=pixels).last_hidden_state[:, 1:])
        mixed = embedding + 0 * features.sum()
        hidden = model(inputs_embeds=mixed, use_cache=False).last_hidden_state
        head(hidden.flatten(0, 1)[:TARGETS]).square().sum().backward()
    return counter.get_total_flops()


def rotary(model: Any) -> int:
    """Positions times frequencies: a product [d, 1] x [1, S] in each row or once, forward only."""
    with FlopCounterMode(display=False) as counter:
        model.rotary_emb(torch.zeros(1, 1), torch.arange(TOKENS).unsqueeze(0))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize(
    "trains", ["projector", "projector language", "tower projector language", "projector lora"]
)
def test_equals_torchs_counter(name: str, trains: str) -> None:
    tower, whole = clip(), language(name)
    projector = nn.Sequential(nn.Linear(16, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE))
    model, head = whole.get_decoder(), whole.get_output_embeddings()
    parts = {"tower": tower, "projector": projector, "language": whole}
    for part, module in parts.items():
        module.requires_grad_(part in trains.split())
    # transformers' norm after the last layer has no weight that a matrix product could see
    if "lora" in trains:
        lora(model)
    numbers = ModelNumbers(
        tower=part_numbers(tower, tower.config),
        projector=part_numbers(projector),
        language=part_numbers(model, whole.config),
        head=Matmul(SIZE, VOCABULARY, head.weight.requires_grad),
        patches=9,
        tower_tokens=10,
        image_tokens=9,
    )
    found = step_flops(numbers, BATCH, attention="eager", skips_future=False)
    assert counted(tower, projector, model, head) - rotary(model) == found.hardware.total


def test_models_figure_leaves_padding_future_and_recomputation_out() -> None:
    whole = language("llama")
    decoder = whole.get_decoder()
    tower, projector = clip().requires_grad_(False), nn.Linear(16, SIZE)
    made: list[ModelNumbers] = []
    for again in (False, True):
        for layer in decoder.layers:
            layer.gradient_checkpointing = again
        made.append(
            ModelNumbers(
                part_numbers(tower, tower.config),
                part_numbers(projector),
                part_numbers(decoder, whole.config),
                Matmul(SIZE, VOCABULARY, True),
                9,
                10,
                9,
            )
        )
    padded = BatchNumbers([5, 7], 1, 4, 3, 16, 2, 8)
    plain, again = (step_flops(numbers, padded) for numbers in made)
    assert plain.model == again.model
    weights = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))
    assert plain.model.language == 6 * 12 * weights
    assert plain.model.head == 6 * 4 * SIZE * VOCABULARY
    assert plain.model.attention == 3 * 2 * 2 * 2 * 4 * 8 * sum(
        1 for length in (5, 7) for i in range(length) for j in range(length) if j <= i
    )
    lasts = 2 * SIZE * 40  # of two layers, their last product is not run again
    assert again.hardware.language == 3 * 16 * (8 * weights - 2 * lasts)
    assert plain.hardware.language == 3 * 16 * 6 * weights
    assert plain.hardware.head == 2 * plain.model.head


def test_without_images_only_the_hardware_runs_the_projector() -> None:
    whole, tower = language("llama"), clip().requires_grad_(False)
    numbers = ModelNumbers(
        part_numbers(tower, tower.config),
        part_numbers(nn.Linear(16, SIZE)),
        part_numbers(whole.get_decoder(), whole.config),
        Matmul(SIZE, VOCABULARY, True),
        9,
        10,
        9,
    )
    found = step_flops(numbers, BatchNumbers([5], 0, 4, 1, 8, 0, 4))
    assert found.model.tower == found.model.projector == found.hardware.tower == 0
    assert found.hardware.projector == 2 * 2 * 16 * SIZE


def numbers_of(batch: Batch) -> BatchNumbers:
    rows, length = batch.input_ids.shape
    return BatchNumbers(
        [int(n) for n in batch.row_lengths],
        batch.num_images,
        batch.num_targets,
        rows,
        length,
        len(batch.pixels),
        len(batch.targets),
    )


def seen_by_torch(model: VisionLanguageModel, batch: Batch) -> int:
    """Forward and backward of a batch, less what the counter takes for products and we do not.

    It does not know the product in place by which the loss sums the head's gradient.
    """

    def in_place(_: Any, left: Any, right: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    known = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        twins.forward(model, batch).backward()
    decoder = model.language.get_decoder()
    positions = torch.from_numpy(batch.position_ids)
    with FlopCounterMode(display=False) as rotary_counter:
        decoder.rotary_emb(torch.zeros(1, 1), positions)
    return counter.get_total_flops() - rotary_counter.get_total_flops()


ALL, BOTH = ("vision", "projector", "language"), ("projector", "language")
LORA = LoraConfig(rank=2, alpha=4, dropout=0.0)


@pytest.mark.parametrize(
    ("tower", "name", "values"),
    [
        ("clip", "llama", {"trainable": ALL}),
        ("clip", "llama", {"trainable": BOTH, "strategy": "full"}),
        ("clip", "llama", {"trainable": ("projector",)}),
        ("clip", "llama", {"trainable": ("language",)}),
        ("clip", "llama", {"trainable": BOTH, "again": (0, 2)}),
        ("clip", "llama", {"trainable": ALL, "again": (2, 2)}),
        ("clip", "llama", {"trainable": ALL, "again": (1, 0)}),
        ("siglip", "qwen2", {"trainable": ALL, "again": (1, 1)}),
        ("clip", "llama", {"trainable": ("projector",), "again": (0, 2)}),
        ("clip", "gemma2", {"trainable": BOTH, "again": (0, 2)}),
        ("clip", "phi", {"trainable": BOTH, "again": (0, 1), "lora": LORA}),
        ("dinov2", "llama", {"trainable": ALL, "again": (2, 2)}),
        ("siglip", "qwen2", {"trainable": ALL}),
        ("siglip", "qwen2", {"trainable": BOTH, "lora": LORA}),
        ("clip", "phi", {"trainable": BOTH}),
        ("clip", "phi", {"trainable": BOTH, "lora": LORA}),
        ("dinov2", "llama", {"trainable": BOTH, "projector": "linear"}),
        ("clip", "llama", {"trainable": BOTH, "lora": LORA, "vocab_size": twins.VOCABULARY + 8}),
    ],
)
@pytest.mark.parametrize("images", [(1, 0, 2), (0, 0)])
def test_a_built_models_step_equals_torchs_counter(
    tower: str, name: str, values: dict[str, Any], images: tuple[int, ...]
) -> None:
    grown = {key: value for key, value in values.items() if key == "vocab_size"}
    given = {key: value for key, value in values.items() if key not in ("vocab_size", "again")}
    config = twins.config(tower, name, **given)
    model = build_model(replace(config, language=replace(config.language, **grown)))
    again: dict[str, int] = dict(zip(("vision", "language"), values.get("again", ()), strict=False))
    apply_policy(model, ActivationPolicy(again))
    set_modes(model)
    vision: Any = model.vision
    vision.encoder.set_attn_implementation("eager")
    slots = vision.num_tokens
    batch = collate(twins.samples(3, images), BatchShape(4, (64,), slots, 4), twins.SIDE)
    # torch's counter knows nothing of padding: the hardware's figure has it, and all pairs
    found = step_flops(
        model_numbers(model), numbers_of(batch), attention="eager", skips_future=False
    )
    assert found.hardware.total == seen_by_torch(model, batch)
    assert found.model.total < found.hardware.total


@pytest.mark.parametrize("images", [(1, 0, 2), (0, 1)])
def test_predictors_are_counted_as_torch_counts_them(images: tuple[int, ...]) -> None:
    model = build_model(aux_config())
    batch = aux_batch(images)
    aux = aux_inputs(batch, 0, 4)
    found = step_flops(
        model_numbers(model), numbers_of(batch), attention="eager", skips_future=False
    )

    def counted(**given: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            model(**twins.inputs(batch), **given).backward()
        return counter.get_total_flops()

    similarities = sum(
        2 * 2 * len(batch.pixels) * math.prod(model.config.aux.shape(task)) * 4
        for task, _ in model.config.aux.heads
    )
    assert found.hardware.predictors + similarities == counted(aux=aux) - counted()


def test_numbers_are_the_same_without_weights() -> None:
    config = twins.config(trainable=BOTH, lora=LORA)
    model = build_model(config)
    expected = model_numbers(model)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)  # as ZeRO-3 leaves them
    assert model_numbers(model) == expected
    assert model_numbers(model.to("meta")) == expected


def test_peaks_by_the_names_that_torch_reports() -> None:
    expected = {
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989.4e12, "NVIDIA B200": 2250e12,
        "NVIDIA GeForce RTX 4090": 165.2e12, "GAUDI2": 432e12, "GAUDI3": 1835e12,
        "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 2080 Ti": None, "cpu": None,
    }  # fmt: skip
    assert {name: peak_flops(name) for name in expected} == expected
    assert measured_peak(torch.device("cpu"), size=128, rounds=2) > 0
