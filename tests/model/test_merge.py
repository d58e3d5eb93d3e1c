"""The merge against a loop in float64 and against transformers' way of merging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.model.errors import ModelError
from lapilli.model.merging import merge


def case(
    seed: int, rows: int, tokens: int, features: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random ids, an index that uses some feature rows once each, an embedding, features."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (rows, tokens), generator=generator)
    index = torch.full((rows * tokens,), -1, dtype=torch.int32)
    used = min(features, rows * tokens // 2)
    places = torch.randperm(rows * tokens, generator=generator)[:used]
    index[places] = torch.randperm(features, generator=generator)[:used].int()
    embedding = torch.randn(11, 5, generator=generator, dtype=dtype)
    rows_FD = torch.randn(features, 5, generator=generator, dtype=dtype)
    return ids, index.view(rows, tokens), embedding, rows_FD


def by_loop(
    ids: torch.Tensor, index: torch.Tensor, embedding: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """What the contract says, one position after another."""
    rows = [
        features[int(i)] if i >= 0 else embedding[int(t)]
        for t, i in zip(ids.flatten(), index.flatten(), strict=True)
    ]
    return torch.stack(rows).view(*ids.shape, -1)


def gradients(merged: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, merged.numel(), dtype=merged.dtype).view_as(merged)
    found = torch.autograd.grad((merged * weight).sum(), leaves, materialize_grads=True)
    return list(found)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 17),
    features=st.integers(0, 30),
)
def test_forward_and_both_gradients_equal_a_loop(
    seed: int, rows: int, tokens: int, features: int
) -> None:
    ids, index, embedding, rows_FD = case(seed, rows, tokens, features)
    embedding.requires_grad_()
    rows_FD.requires_grad_()
    expected = by_loop(ids, index, embedding, rows_FD)
    found = merge(ids, index, embedding, rows_FD, check=True)
    assert torch.equal(found, expected)
    for here, there in zip(
        gradients(found, embedding, rows_FD),
        gradients(expected, embedding, rows_FD),
        strict=True,
    ):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_equals_transformers_masked_scatter() -> None:
    ids, index, embedding, features = case(5, 3, 20, 24)
    # masked_scatter takes features in the order of the slots, so name them in that order
    slots = index.flatten() >= 0
    index = index.flatten().clone()
    index[slots] = torch.arange(int(slots.sum()), dtype=torch.int32)
    index = index.view(ids.shape)
    embedding.requires_grad_()
    features.requires_grad_()
    mask = (index >= 0).unsqueeze(-1).expand(*ids.shape, 5)
    expected = torch.nn.functional.embedding(ids, embedding).masked_scatter(mask, features)
    found = merge(ids, index, embedding, features)
    assert torch.equal(found, expected)
    for here, there in zip(
        gradients(found, embedding, features),
        gradients(expected, embedding, features),
        strict=True,
    ):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_an_unused_feature_row_gets_gradient_zero() -> None:
    features = torch.randn(3, 5, requires_grad=True)
    index = torch.tensor([[-1, 2, 0]], dtype=torch.int32)
    merge(torch.zeros(1, 3, dtype=torch.long), index, torch.randn(4, 5), features).sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum(1).tolist() == [5.0, 0.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_copied_in_every_dtype(dtype: torch.dtype) -> None:
    ids, index, embedding, features = case(1, 2, 9, 6, dtype)
    found = merge(ids, index, embedding, features)
    assert found.dtype == dtype
    assert torch.equal(found, by_loop(ids, index, embedding, features))


@pytest.mark.parametrize(
    ("ids", "index", "words"),
    [
        ([[0]], [[3]], "outside -1 to 2"),
        ([[0, 0]], [[1, 1]], "used twice"),
        ([[9]], [[-1]], "outside 0 to 3"),
    ],
)
def test_check_names_a_bad_index(ids: list[list[int]], index: list[list[int]], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        merge(
            torch.tensor(ids),
            torch.tensor(index, dtype=torch.int32),
            torch.zeros(4, 2),
            torch.zeros(3, 2),
            check=True,
        )


def test_an_unknown_implementation_is_named() -> None:
    empty = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ModelError, match="'fast' is unknown; expected one of auto, torch"):
        merge(empty, empty.int(), torch.zeros(1, 1), torch.zeros(0, 1), implementation="fast")  # type: ignore[arg-type]
