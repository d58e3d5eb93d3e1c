"""The Triton merge against a loop, transformers' way and torch's own checks of a custom op.

Collected by `tests/gpu/test_merge.py` on a GPU, and run by `test_merge_triton.py` in a process of
its own under Triton's interpreter, which must be chosen before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.model.kernels.merge import (
    embedding_backward_op,
    features_backward_op,
    merge_op,
    tile,
)
from lapilli.model.merging import merge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(
    seed: int,
    rows: int,
    tokens: int,
    features: int,
    hidden: int,
    *,
    used: float = 0.5,
    repeated: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random ids (a share of them one id), feature rows used at most once, embedding, features."""
    generator = torch.Generator().manual_seed(seed)
    positions = rows * tokens
    ids = torch.randint(0, 37, (positions,), generator=generator)
    ids[torch.rand(positions, generator=generator) < repeated] = 3
    index = torch.full((positions,), -1, dtype=torch.int32)
    count = min(features, int(positions * used))
    places = torch.randperm(positions, generator=generator)[:count]
    index[places] = torch.randperm(features, generator=generator)[:count].int()
    embedding = torch.randn(37, hidden, generator=generator, dtype=torch.float64).to(dtype)
    rows_FD = torch.randn(features, hidden, generator=generator, dtype=torch.float64).to(dtype)
    shape = rows, tokens
    return (
        ids.view(shape).to(DEVICE),
        index.view(shape).to(DEVICE),
        embedding.to(DEVICE).requires_grad_(),
        rows_FD.to(DEVICE).requires_grad_(),
    )


def by_loop(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merged rows, the weights of a loss, and both gradients in float64, a position at a time."""
    ids, index, embedding, features = case
    hidden = embedding.shape[1]
    merged = embedding.detach().new_empty(ids.numel(), hidden)
    weight = torch.linspace(-1, 1, merged.numel(), dtype=torch.float64, device=DEVICE)
    weight = weight.view(merged.shape).to(embedding.dtype)
    to_embedding = torch.zeros(embedding.shape, dtype=torch.float64, device=DEVICE)
    to_features = torch.zeros(features.shape, dtype=torch.float64, device=DEVICE)
    for n, (token, slot) in enumerate(
        zip(ids.flatten().tolist(), index.flatten().tolist(), strict=True)
    ):
        merged[n] = features.detach()[slot] if slot >= 0 else embedding.detach()[token]
        (to_features[slot] if slot >= 0 else to_embedding[token]).add_(weight[n].double())
    return merged.view(*ids.shape, hidden), weight, to_embedding, to_features


def check(case: Case) -> None:
    """Copies are bit-identical; an embedding's gradient is exact to its dtype's rounding."""
    ids, index, embedding, features = case
    expected, weight, to_embedding, to_features = by_loop(case)
    found = merge(ids, index, embedding, features, implementation="triton")
    assert torch.equal(found, expected)
    found.backward(weight.view(found.shape))
    assert embedding.grad is not None
    assert features.grad is not None
    assert torch.equal(features.grad, to_features.to(features.dtype))
    # the sum is kept in fp32 (fp64 for fp64) and rounded once
    size = float(to_embedding.abs().max()) if to_embedding.numel() else 0.0
    limit = (
        size * torch.finfo(embedding.dtype).eps + 1e-12 + (embedding.dtype == torch.float32) * 2e-5
    )
    torch.testing.assert_close(embedding.grad.double(), to_embedding, rtol=0, atol=limit)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 80),
    features=st.integers(0, 60),
    hidden=st.sampled_from([1, 5, 16, 33, 130]),
    used=st.sampled_from([0.0, 0.5, 1.0]),
    repeated=st.sampled_from([0.0, 0.9]),
)
def test_equals_a_loop(
    seed: int, rows: int, tokens: int, features: int, hidden: int, used: float, repeated: float
) -> None:
    check(case(seed, rows, tokens, features, hidden, used=used, repeated=repeated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("hidden", [64, 300, 2560])
def test_every_dtype_and_sizes_that_are_no_power_of_two(dtype: torch.dtype, hidden: int) -> None:
    check(case(1, 2, 33, 20, hidden, dtype=dtype))


def test_one_id_over_many_chunks_is_summed_exactly() -> None:
    check(case(2, 3, 211, 40, 24, used=0.1, repeated=1.0))


def test_only_images_and_nothing_at_all() -> None:
    check(case(3, 2, 8, 16, 32, used=1.0))
    check(case(3, 1, 4, 0, 32))
    ids = torch.zeros(0, 5, dtype=torch.long, device=DEVICE)
    embedding = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    features = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    merged = merge(ids, ids.int(), embedding, features, implementation="triton")
    assert merged.shape == (0, 5, 8)
    merged.sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.abs().max() == 0


def test_equals_transformers_masked_scatter() -> None:
    ids, index, embedding, features = case(5, 3, 20, 24, 40)
    # masked_scatter takes features in the order of the slots, so name them in that order
    slots = index.flatten() >= 0
    ordered = torch.cumsum(slots, 0).int() - 1
    index = torch.where(slots, ordered, -1).int().view(ids.shape)
    mask = (index >= 0).unsqueeze(-1).expand(*ids.shape, 40)
    expected = torch.nn.functional.embedding(ids, embedding).masked_scatter(mask, features)
    found = merge(ids, index, embedding, features, implementation="triton")
    assert torch.equal(found, expected)
    weight = torch.randn_like(expected)
    for here, there in zip(
        torch.autograd.grad(found, (embedding, features), weight),
        torch.autograd.grad(expected, (embedding, features), weight),
        strict=True,
    ):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_gradients_do_not_change_between_runs() -> None:
    found: list[torch.Tensor] = []
    for _ in range(3):
        ids, index, embedding, features = case(7, 4, 150, 99, 48, dtype=torch.bfloat16)
        merged = merge(ids, index, embedding, features, implementation="triton")
        weight = torch.linspace(-1, 1, merged.numel(), device=DEVICE).view(merged.shape).bfloat16()
        merged.backward(weight)
        assert embedding.grad is not None
        found.append(embedding.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_frozen_embedding_gets_no_gradient() -> None:
    ids, index, embedding, features = case(8, 2, 9, 6, 16)
    frozen = embedding.detach()
    merge(ids, index, frozen, features, implementation="triton").sum().backward()
    assert frozen.grad is None
    assert features.grad is not None


def test_compiles_in_one_graph() -> None:
    ids, index, embedding, features = case(9, 2, 9, 6, 16)

    def whole(*tensors: torch.Tensor) -> torch.Tensor:
        return merge(*tensors, implementation="triton") * 2

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    expected, weight, to_embedding, to_features = by_loop((ids, index, embedding, features))
    found = compiled(ids, index, embedding, features)
    assert torch.equal(found, expected * 2)
    found.backward(weight.view(found.shape))
    torch.testing.assert_close(embedding.grad, 2 * to_embedding)
    torch.testing.assert_close(features.grad, 2 * to_features)


def test_the_ops_are_what_torch_expects_of_one() -> None:
    # every row used: what an unused one leaves in `places` is undefined
    ids, index, embedding, features = case(10, 2, 10, 6, 16, used=0.5)
    torch.library.opcheck(merge_op, (ids, index, embedding, features))
    merged, places = merge_op(ids, index, embedding.detach(), features.detach())
    torch.library.opcheck(features_backward_op, (merged, index, places))
    torch.library.opcheck(embedding_backward_op, (merged, ids, index, 37))


@pytest.mark.parametrize("hidden", [1, 5, 64, 576, 896, 960, 2048, 2560, 4096, 5120])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_a_tile_wastes_less_than_half(hidden: int, itemsize: int) -> None:
    columns, rows = tile(hidden, itemsize)
    assert columns & (columns - 1) == 0
    assert columns * rows * itemsize <= 8192
    padded = -(-hidden // columns) * columns
    assert padded < 2 * hidden
