"""The loss on a CUDA device: chunks and Liger against torch's own cross-entropy, and its memory."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from lapilli.model.loss import LossImplementation, trained_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
WAYS: list[object] = [
    "torch",
    pytest.param(
        "liger",
        marks=pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel is absent: extra liger"),
    ),
]


def inputs(dtype: torch.dtype, words: int = 4096) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [1, 512, 128], every other position trained, a head of `words`."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 512, 128, device="cuda", dtype=dtype, requires_grad=True)
    head = (torch.randn(words, 128, device="cuda") / 11).to(dtype).requires_grad_()
    positions = torch.arange(0, 512, 2, device="cuda")
    targets = torch.randint(0, words, (256,), device="cuda")
    return hidden, positions, targets, head


def plain(hidden: Tensor, positions: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    logits = hidden.flatten(0, 1)[positions].float() @ head.float().T
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_torchs(dtype: torch.dtype, way: LossImplementation) -> None:
    given = inputs(dtype)
    expected = plain(*given)
    wanted = torch.autograd.grad(expected, (given[0], given[3]))
    found = trained_loss(*given, chunk=100, implementation=way)
    got = torch.autograd.grad(found, (given[0], given[3]))
    near = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    for value, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, reference, rtol=near, atol=near)


def test_the_logits_are_never_there_at_once() -> None:
    given = inputs(torch.bfloat16, words=65_536)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained_loss(*given, chunk=32, implementation="torch").backward()
    logits = 256 * 65_536 * 4
    head_in_fp32 = 65_536 * 128 * 4  # its gradient is summed so
    assert torch.cuda.max_memory_allocated() - before < logits + 2 * head_in_fp32
