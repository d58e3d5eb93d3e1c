"""A row of several samples has the hidden states, losses and gradients of the samples alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lapilli.data.batches.collate import Batch, BatchShape, collate, collate_rows
from lapilli.data.batches.tree_rows import Row
from lapilli.data.dataset.dataset import Sample
from lapilli.model.attention.choice import DECODERS
from lapilli.model.attention.forward import NAME, attend, register
from lapilli.model.attention.trees import Trees, check_trees
from lapilli.model.config import LoraConfig, ModelConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes, trainable_parameters
from lapilli.model.vlm import build_model
from lapilli.train.steps.step import to_device
from tests.model import decoders, twins

register()

# Trees of one row: the length of the prefix and those of the branches; above every window.
ROW = ((5, (4, 3, 6)), (0, (7,)), (6, (2,)))


def ids_of(row: Any, padding: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """tree_ids, branch_ids and position_ids, int [1, S], written token by token."""
    tokens: list[tuple[int, int, int]] = []
    for tree, (prefix, branches) in enumerate(row, start=1):
        tokens += [(tree, 0, place) for place in range(prefix)]
        for branch, size in enumerate(branches, start=1):
            tokens += [(tree, branch, prefix + place) for place in range(size)]
    tokens += [(0, 0, 0)] * padding
    trees, branches, positions = torch.tensor(tokens).T.unsqueeze(1)
    return trees, branches, positions


def samples_of(row: Any) -> list[list[int]]:
    """The places of each sample's tokens in the row."""
    found: list[list[int]] = []
    start = 0
    for prefix, branches in row:
        shared = list(range(start, start + prefix))
        start += prefix
        for size in branches:
            found.append(shared + list(range(start, start + size)))
            start += size
    return found


def run(model: Any, calls: list[dict[str, Any]], embedded: Tensor) -> Any:
    """Hidden states of every call, and by name the gradients of their weighed sum."""
    decoder = model.get_decoder()
    hidden: list[Tensor] = []
    total = torch.zeros(())
    for call in calls:
        inputs = {name: value for name, value in call.items() if name != "weights"}
        hidden.append(decoder(use_cache=False, **inputs).last_hidden_state)
        total = total + (hidden[-1] * call["weights"]).sum()
    named = dict(decoder.named_parameters())
    gradients = torch.autograd.grad(total, [embedded, *named.values()], allow_unused=True)
    return hidden, dict(zip(["inputs", *named], gradients, strict=True))


@pytest.mark.parametrize("family", DECODERS)
def test_a_row_of_trees_equals_its_samples_one_by_one(family: str) -> None:
    trees, branches, positions = ids_of(ROW)
    size = trees.shape[1]
    model = decoders.language(family, NAME)
    embedded = decoders.inputs(shape=(1, size))["inputs_embeds"]
    weights = torch.randn(1, size, decoders.HIDDEN, generator=torch.Generator().manual_seed(2))
    weights[trees == 0] = 0.0
    times = torch.zeros(size)  # a prefix is in every sample, so its states count as often
    calls: list[dict[str, Any]] = []
    for places in samples_of(ROW):
        times[places] += 1
        calls.append({
            "inputs_embeds": embedded[:, places], "weights": weights[:, places],
            "position_ids": torch.arange(len(places)).unsqueeze(0),
        })  # fmt: skip
    apart, expected = run(model, calls, embedded)
    ids = Trees(trees, branches, positions)
    together: dict[str, Any] = {
        "inputs_embeds": embedded, "position_ids": ids.on_positions(), "trees": ids,
        "weights": weights * times.view(1, -1, 1),
    }  # fmt: skip
    (found,), gradients = run(model, [together], embedded)
    for places, state in zip(samples_of(ROW), apart, strict=True):
        torch.testing.assert_close(found[:, places], state, rtol=1e-5, atol=1e-5)
    assert expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        if gradient is None:
            assert gradients[name] is None
            continue
        near = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=near, msg=name)
    if family in decoders.WINDOWED:  # the window bounds what a branch sees of its prefix
        wide = decoders.language(family, NAME, window=64)
        (seen,), _ = run(wide, [together], embedded)
        assert not torch.allclose(seen, found, atol=1e-3)


def sample(name: str, ids: list[int], spans: list[tuple[int, int]], images: int) -> Sample:
    """A sample whose images are a function of how many it has."""
    pixels = np.random.default_rng(images).integers(0, 256, (images, twins.SIDE, twins.SIDE, 3))
    return Sample(
        name, np.array(ids, np.int32), np.array(spans, np.int32).reshape(-1, 2),
        pixels.astype(np.uint8),
    )  # fmt: skip


def made_rows() -> list[Row]:
    """Two rows: a tree of three and one of text alone; one of two images and two samples."""
    first = [
        sample("a", [1, 5, -200, 7, 8, 9], [(4, 6)], 1),
        sample("b", [1, 5, -200, 11], [(3, 4)], 1),  # trained right behind the image
        sample("c", [1, 5, -200, 12, 13, 14, 15, 16], [(5, 6), (7, 8)], 1),
    ]
    second = [
        sample("e", [2, -200, 3, -200, 21, 22], [(4, 5)], 2),
        sample("f", [2, -200, 3, -200, 23, 24, 25], [(5, 7)], 2),
    ]
    return [[first, [sample("d", [4, 5, 6, 7], [(2, 4)], 0)]], [second]]


def ours(family: str = "llama", **values: Any) -> ModelConfig:
    """A small model with our attention."""
    config = twins.config(language=family, **values)
    return replace(config, language=replace(config.language, attention=NAME))


def shape(rows: int, *, has_trees: bool = False) -> BatchShape:
    return BatchShape(rows, (64,), twins.TOKENS, predict_chunk=8, has_trees=has_trees)


def run_batch(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, each sample's share, gradients by name."""
    inputs = to_device(batch, torch.device("cpu")).inputs
    loss = model(**inputs)
    named = trainable_parameters(model)
    gradients = torch.autograd.grad(loss, list(named.values()))
    each = inputs["sample_losses"][: len(batch.sample_ids)]
    return loss.detach(), each, dict(zip(named, gradients, strict=True))


def assert_equal(model: Any, rows: list[Row]) -> None:
    """Rows of trees against a batch of one sample a row."""
    samples = [one for row in rows for tree in row for one in tree]
    loss, each, gradients = run_batch(
        model, collate_rows(rows, shape(len(rows), has_trees=True), twins.SIDE)
    )
    expected = run_batch(model, collate(samples, shape(len(samples)), twins.SIDE))
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each, expected[1], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[2].items():
        near = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=near, msg=name)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.0)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "stablelm"])
def test_losses_and_gradients_of_a_model_are_the_samples(
    family: str, lora: LoraConfig | None, recomputes: bool
) -> None:
    trainable = ("projector", "language") if lora else ("vision", "projector", "language")
    model = build_model(ours(family, trainable=trainable, lora=lora))
    if recomputes:
        recompute_all(model)
    set_modes(model)
    assert_equal(model, made_rows())


@st.composite
def random_rows(draw: st.DrawFn) -> list[Row]:
    """Up to two rows of up to three trees of up to three samples."""
    token = st.integers(1, twins.IMAGE_ID - 1)
    number = 0
    rows: list[Row] = []
    for _ in range(draw(st.integers(1, 2))):
        trees: list[list[Sample]] = []
        for _ in range(draw(st.integers(1, 3))):
            images = draw(st.integers(0, 1))
            prefix = [draw(token), -200] if images else []
            tree: list[Sample] = []
            for _ in range(draw(st.integers(1, 3)) if images else 1):
                rest = draw(st.lists(token, min_size=1, max_size=5))
                end = len(prefix) + len(rest)
                start = draw(st.integers(max(1, len(prefix)), end))
                tree.append(sample(f"s{number}", prefix + rest, [(start, end)], images))
                number += 1
            trees.append(tree)
        rows.append(trees)
    return rows


@settings(deadline=None, max_examples=50)
@given(random_rows())
def test_random_trees(rows: list[Row]) -> None:
    assert_equal(MODEL, rows)


MODEL = build_model(ours())


def test_no_sample_sees_another() -> None:
    """What stands in one sample alone changes no state of another, and gets no gradient of it."""
    trees, branches, positions = ids_of(ROW)
    decoder = decoders.language("mistral", NAME).get_decoder()
    size = trees.shape[1]
    embedded = decoders.inputs(shape=(1, size))["inputs_embeds"]
    call = {"position_ids": positions, "use_cache": False}

    def states(inputs: Tensor) -> Tensor:
        given = Trees(trees, branches, positions)
        return decoder(inputs_embeds=inputs, trees=given, **call).last_hidden_state

    before = states(embedded)
    samples = samples_of(ROW)
    for number, places in enumerate(samples):
        others = [other for other in range(len(samples)) if other != number]
        own = sorted(set(places) - {place for other in others for place in samples[other]})
        changed = embedded.detach().clone()
        changed[:, own] = 1e4
        after = states(changed)
        (gradient,) = torch.autograd.grad(before[:, own].sum(), embedded, retain_graph=True)
        assert (gradient[0, own] != 0).any()
        for other in others:
            kept = samples[other]
            torch.testing.assert_close(after[:, kept], before[:, kept], rtol=0, atol=1e-6)
            apart = sorted(set(kept) - set(places))
            assert (gradient[0, apart] == 0).all()


@pytest.mark.parametrize("window", [None, 4])
def test_flex_attention_computes_the_dense_form(window: int | None) -> None:
    """Its forward: torch has no backward for a CPU (gpu-test compares the gradients)."""
    from torch.nn.attention.flex_attention import flex_attention

    trees = Trees(*ids_of(ROW, padding=95))
    generator = torch.Generator().manual_seed(3)
    size = trees.tree_ids.shape[1]
    query, key, value = (
        torch.randn(1, heads, size, 16, generator=generator) for heads in (4, 2, 2)
    )
    with torch.no_grad():
        expected, _ = attend(
            torch.nn.Module(), query, key, value, None, sliding_window=window, trees=trees
        )
        found = flex_attention(query, key, value, block_mask=trees.blocks(window), enable_gqa=True)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_have_trees_is_refused() -> None:
    for attention in ("sdpa", "eager"):
        with pytest.raises(ModelError, match=f"is {attention}, under which samples of a row"):
            check_trees(attention)


def test_the_dense_form_is_of_one_shape_and_shared_by_layers() -> None:
    trees = Trees(*ids_of(ROW))
    size = trees.tree_ids.shape[1]
    bias = trees.bias(4, torch.float32)
    assert bias.shape == (1, 1, size, size)
    assert bias is trees.bias(4, torch.float32)
    assert torch.equal(bias == 0, trees.seen(4))
    assert torch.equal(bias == -torch.inf, ~trees.seen(4))
    model = build_model(ours())
    model.language.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match=r"set language.attention: lapilli"):
        run_batch(model, collate_rows(made_rows(), shape(2, has_trees=True), twins.SIDE))
