"""Compiled layers: one graph each, none anew for another length, the same losses and answers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lapilli.model.attention.choice import DECODERS
from lapilli.model.attention.forward import NAME, register
from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.generate import generate_greedy
from lapilli.model.kernels.compiled import compile_blocks
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import decoders, twins

register()
dynamo: Any = importlib.import_module("torch._dynamo")
counters: Any = importlib.import_module("torch._dynamo.utils").counters
# Others are traced by `make test-long`: with and without a window, soft-capped, joined products.
SOME = ("gemma2", "gpt2", "llama", "phi3", "qwen2")
FAMILIES = [pytest.param(f, marks=[] if f in SOME else pytest.mark.long) for f in DECODERS]
# Rows of four lengths, with and without images, as a plan's shapes are.
BATCHES = [twins.batch((1, 1, 0), 32), twins.batch((0,), 40), twins.batch((1, 2, 0, 0), 48),
           twins.batch((0, 0), 64), twins.batch((1,), 32)]  # fmt: skip


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_decoders_layers_are_few_graphs_for_all_lengths(family: str) -> None:
    """`eager` traces and computes with torch: what is counted is the same with any backend."""
    plain, compiled = (decoders.language(family, NAME, layers=4) for _ in range(2))
    assert compile_blocks(compiled, backend="eager") == 4
    for number, length in enumerate((9, 10, 11, 16)):
        given = (2, length)
        expected, _ = decoders.run(plain, decoders.inputs(shape=given))
        found, _ = decoders.run(compiled, decoders.inputs(shape=given))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if number == 0:
            after_warm_up = graphs()
    # a layer with a window, and one without
    assert graphs() == after_warm_up <= 2  # pyright: ignore[reportPossiblyUnboundVariable]
    assert not counters["graph_break"]


def losses(model: VisionLanguageModel) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    set_modes(model)
    for batch in BATCHES:
        model.zero_grad()
        loss = twins.forward(model, batch)
        loss.backward()
        found = {n: p.grad for n, p in trainable_parameters(model).items()}
        yield loss.detach(), {n: None if g is None else g.clone() for n, g in found.items()}


def compare(backend: str, *, recomputes: bool = False, **values: Any) -> None:
    language = LanguageConfig(settings=decoders.settings("llama"))
    config = ModelConfig(
        VisionConfig(settings=twins.TOWER), language, head_chunk=4, kernels="torch", **values
    )
    plain, compiled = build_model(config), build_model(config)
    if recomputes:
        recompute_all(plain)
        recompute_all(compiled)
    compile_blocks(compiled, backend)
    after_warm_up = 0
    for (wanted, gradients), (found, computed) in zip(losses(plain), losses(compiled), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            near = 1e-5 * max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(computed[name], gradient, rtol=0, atol=near, msg=name)
        after_warm_up = after_warm_up or graphs()
    assert graphs() == after_warm_up == 2  # one of the tower, one of the decoder
    assert not counters["graph_break"]


def test_a_model_with_adapters_and_checkpointing() -> None:
    compare("aot_eager", lora=LoraConfig(rank=2, dropout=0.0), recomputes=True)


def test_a_model_that_learns_whole() -> None:
    compare("aot_eager")


@pytest.mark.long
def test_with_torchs_own_compiler() -> None:
    compare("inductor", lora=LoraConfig(rank=2, dropout=0.0), recomputes=True)


def test_generation_runs_layers_as_they_were() -> None:
    """The setting compiles, and nothing is compiled for a cache that grows by each token."""
    config = replace(twins.config(compile="blocks"), trainable=("projector",))
    model, plain = build_model(config).eval(), build_model(replace(config, compile="none")).eval()
    layer: Any = model.language.model.layers[0]
    assert layer._compiled_call_impl is not None
    asked = twins.samples(11, (1, 0))
    prompts, pixels = [s.input_ids.astype(np.int64) for s in asked], [s.pixels for s in asked]
    answers = [
        generate_greedy(one, prompts, pixels, end_id=63, max_new_tokens=4) for one in (model, plain)
    ]
    assert answers[0] == answers[1]
