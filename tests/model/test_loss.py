"""The loss against cross-entropy over all logits, as everybody else computes it."""

from __future__ import annotations

import pytest
import torch

from lapilli.model.loss import trained_loss


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_equals_full_cross_entropy_with_its_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.full((2, 7), -100)
    labels[0, 3:6] = torch.tensor([4, 0, 10])
    labels[1, 1] = 2
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1).flatten()
    positions = (shifted >= 0).nonzero().flatten()
    padding = torch.zeros(2, dtype=torch.long)

    full = torch.nn.functional.cross_entropy(
        (hidden @ head.T).flatten(0, 1).float(), shifted, ignore_index=-100, reduction="sum"
    )
    found = trained_loss(
        hidden,
        torch.cat([positions, padding]),
        torch.cat([shifted[positions], padding - 100]),
        head,
        chunk=chunk,
    )
    torch.testing.assert_close(found, full, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(full, (hidden, head))
    for here, there in zip(torch.autograd.grad(found, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


def test_nothing_trained_is_zero_with_gradient_zero() -> None:
    hidden = torch.randn(1, 2, 3, requires_grad=True)
    nothing = torch.tensor([0, 0]), torch.tensor([-100, -100])
    loss = trained_loss(hidden, *nothing, torch.randn(4, 3), chunk=2)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0
