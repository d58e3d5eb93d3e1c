"""What a policy keeps for backward is what autograd keeps, and no value changes with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.attention.choice import DECODERS
from lapilli.model.config import (
    ActivationPolicy,
    LanguageConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
)
from lapilli.model.parts import recomputation
from lapilli.model.parts.language import build_language
from lapilli.model.parts.recomputation import apply_policy, recomputable_layers
from lapilli.model.parts.trainable import set_modes, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.driver.activation_memory import ActivationBytes, LayerBytes, policies
from lapilli.train.driver.fake_model import sketch_model
from tests.model import decoders, twins

EVERYTHING: Any = ("vision", "projector", "language")
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is absent; pip install 'lapilli[qlora]'",
)
# By part, layers that run again: none, some of each, all of one, all.
SOME: list[Mapping[str, int]] = [
    {}, {"language": 1}, {"vision": 1, "language": 2}, {"vision": 2, "language": 1},
    {"vision": 9, "language": 9},
]  # fmt: skip


def made(tower: str = "clip", family: str = "llama", **values: Any) -> ModelConfig:
    given: dict[str, Any] = {"trainable": EVERYTHING, "head_chunk": 4, "seed": 1, **values}
    return ModelConfig(
        vision=VisionConfig(tower, settings=twins.TOWERS[tower]),
        language=LanguageConfig(family, settings=decoders.settings(family)),
        **given,
    )


def built(config: ModelConfig, policy: ActivationPolicy) -> VisionLanguageModel:
    model = build_model(config)
    apply_policy(model, policy)
    set_modes(model)
    return model


def batch_of(model: Any) -> Batch:
    shape = BatchShape(2, (48,), model.vision.num_tokens, 4)
    return collate([], shape, model.vision.image_size, with_images=True)


def kept_by_autograd(model: VisionLanguageModel, batch: Batch) -> int:
    """Bytes that a forward with real tensors keeps, each storage once and no weight.

    With what a layer that runs again is called with: masks and rotary angles.
    """
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in seen:
            kept[storage.data_ptr()] = storage
        return saved

    def called(layer: Any, _: Any, named: dict[str, Any]) -> None:
        if layer.gradient_checkpointing:
            for given in named.values():
                for each in given if isinstance(given, tuple) else [given]:
                    if isinstance(each, torch.Tensor) and each.is_floating_point():
                        pack(each)

    for layers in recomputable_layers(model).values():
        for layer in layers:
            layer.register_forward_pre_hook(called, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        twins.forward(model, batch)
    return sum(storage.nbytes() for storage in kept.values())


def assert_as_autograd(config: ModelConfig, recompute: Mapping[str, int]) -> None:
    policy = ActivationPolicy(recompute)
    sketch, model = sketch_model(config), built(config, policy)
    batch = batch_of(model)
    estimated = sketch.activations(batch).held(policy)
    assert estimated == pytest.approx(kept_by_autograd(model, batch), rel=0.05)


@pytest.mark.parametrize("recompute", SOME)
@pytest.mark.parametrize("tower", list(twins.TOWERS))
def test_what_a_tower_keeps(tower: str, recompute: Mapping[str, int]) -> None:
    assert_as_autograd(made(tower), recompute)


@pytest.mark.parametrize("recompute", [{}, {"language": 1}, {"language": 2}])
@pytest.mark.parametrize("family", DECODERS)
def test_what_a_decoder_keeps(family: str, recompute: Mapping[str, int]) -> None:
    assert_as_autograd(made(family=family, trainable=("projector", "language")), recompute)


@pytest.mark.parametrize("recompute", SOME)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("lora", "trainable"),
    [(LORA, EVERYTHING), (None, ("projector",)), (LORA, ("language",)), (None, ("language",))],
)
def test_what_parts_and_adapters_keep(
    lora: LoraConfig | None, trainable: Any, dtype: Any, recompute: Mapping[str, int]
) -> None:
    assert_as_autograd(made(lora=lora, trainable=trainable, dtype=dtype), recompute)


@needs_bitsandbytes
@pytest.mark.parametrize("recompute", SOME[:2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_adapters_over_4_bits_keep(
    dtype: Any, recompute: Mapping[str, int], tmp_path: Path
) -> None:
    wide = {**twins.DECODER, "hidden_size": 64, "intermediate_size": 128}
    build_language(LanguageConfig(settings=wide)).save_pretrained(tmp_path)
    packed = LanguageConfig(pretrained=str(tmp_path), quantize="nf4")
    assert_as_autograd(replace(made(lora=LORA, dtype=dtype), language=packed), recompute)


POLICIES = [ActivationPolicy(again, offload) for again in SOME[1:] for offload in (False, True)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("lora", [None, replace(LORA, dropout=0.1)])
def test_losses_and_gradients_do_not_depend_on_the_policy(
    family: str, lora: LoraConfig | None
) -> None:
    found: list[dict[str, torch.Tensor]] = []
    config = made(family=family, lora=lora)
    for policy in (ActivationPolicy(), *POLICIES):
        model = built(config, policy)
        torch.manual_seed(7)  # dropout's
        loss = twins.forward(model, twins.batch((1, 0, 2)))
        loss.backward()
        gradients = {
            n: p.grad for n, p in trainable_parameters(model).items() if p.grad is not None
        }
        found.append({"": loss.detach(), **gradients})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize("policy", POLICIES)
def test_what_lies_on_the_host_is_the_inputs_of_recomputed_layers(
    policy: ActivationPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    to_host = recomputation._to_host  # pyright: ignore[reportPrivateUsage]

    def counted(saved: torch.Tensor) -> Any:
        moved.append(saved.nbytes)
        device, copy = to_host(saved)
        assert copy.data_ptr() != saved.data_ptr()
        return device, copy

    monkeypatch.setattr(recomputation, "_to_host", counted)
    config = made()
    model = built(config, policy)
    batch = batch_of(model)
    twins.forward(model, batch)
    assert sum(moved) == sketch_model(config).activations(batch).on_host(policy)
    assert bool(moved) == policy.offload


def layer(part: str, kept: int, given: int, flops: int, *, keeps: bool = False) -> LayerBytes:
    return LayerBytes(part=part, kept=kept, input=given, keeps_input=keeps, flops=flops)


def simulated(made: ActivationBytes, again: Sequence[bool], *, offload: bool) -> int:
    """The most that is alive, by walking forward and backward with a list of what is held."""
    alive: list[dict[str, int]] = []
    most = made.outside

    def look() -> None:
        nonlocal most
        most = max(most, made.outside + sum(sum(held.values()) for held in alive))

    for each, runs_again in zip(made.layers, again, strict=True):
        own = {"input": each.input * each.keeps_input, "kept": each.kept}
        alive.append({"input": each.input * (not offload)} if runs_again else own)
        look()
    for each, runs_again in reversed([*zip(made.layers, again, strict=True)]):
        if runs_again:
            alive[-1] = {"input": each.input, "kept": each.kept}
            look()
        alive.pop()
    return most


EXAMPLE = ActivationBytes(
    70,
    (
        *(layer("vision", 300, 40, 7) for _ in range(2)),
        *(layer("language", 500, 100, 11, keeps=True) for _ in range(4)),
    ),
)


@pytest.mark.parametrize("offload", [False, True])
def test_the_cheapest_policy_that_fits_is_the_cheapest_of_all_choices_of_layers(
    offload: bool,
) -> None:
    """Against every set of layers."""
    choices = [*product((False, True), repeat=6)]
    sizes = {again: simulated(EXAMPLE, again, offload=offload) for again in choices}
    costs = {
        again: sum(each.flops for each, on in zip(EXAMPLE.layers, again, strict=True) if on)
        for again in choices
    }
    listed = policies(EXAMPLE, offload=offload)
    for policy in listed:
        numbers = policy.recompute["vision"], policy.recompute["language"]
        again = tuple(n < numbers[0] for n in range(2)) + tuple(n < numbers[1] for n in range(4))
        assert EXAMPLE.peak(policy) == sizes[again]
        assert EXAMPLE.extra_flops(policy) == costs[again]
    for budget in sorted({*sizes.values()}):
        cheapest = min(costs[again] for again in choices if sizes[again] <= budget)
        chosen = next(policy for policy in listed if EXAMPLE.peak(policy) <= budget)
        assert EXAMPLE.extra_flops(chosen) == cheapest


def test_more_rows_take_what_a_run_of_them_keeps() -> None:
    sketch = sketch_model(made())
    found = [
        sketch.activations(collate([], BatchShape(n, (48,), 9, 4 * n), 24, with_images=True))
        for n in (1, 2, 5)
    ]
    grown = found[0].grown(found[1], 5)
    for policy in POLICIES:
        assert grown.peak(policy) == pytest.approx(found[2].peak(policy), rel=0.01)
