"""The loss against cross-entropy over all logits, as everybody else computes it."""

from __future__ import annotations

import pytest
import torch

from lapilli.model.errors import ModelError
from lapilli.model.loss import choose_loss, trained_loss


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


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.25), (2.0, 1.5)])
@pytest.mark.parametrize("frozen", [(), ("head",), ("hidden",), ("bias", "head")])
def test_logits_changed_by_the_model_and_parts_that_are_frozen(
    softcap: float | None, scale: float, frozen: tuple[str, ...]
) -> None:
    torch.manual_seed(1)
    tensors = {
        "hidden": torch.randn(2, 9, 6, dtype=torch.float64),
        "head": torch.randn(13, 6, dtype=torch.float64),
        "bias": torch.randn(13, dtype=torch.float64),
    }
    leaves = [t.requires_grad_() for name, t in tensors.items() if name not in frozen]
    positions = torch.tensor([3, 4, 11, 17, 0])
    targets = torch.tensor([5, 0, 12, 5, -100])
    logits = tensors["hidden"].flatten(0, 1)[positions] @ tensors["head"].T + tensors["bias"]
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    full = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    found = trained_loss(
        tensors["hidden"],
        positions,
        targets,
        tensors["head"],
        tensors["bias"],
        chunk=2,
        softcap=softcap,
        scale=scale,
    )
    torch.testing.assert_close(found, full.float())
    # a gradient that comes from above is passed on
    expected = torch.autograd.grad(full * 0.125, leaves)
    for here, there in zip(torch.autograd.grad(found * 0.125, leaves), expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-12)


def test_a_bf16_heads_gradient_is_summed_in_fp32() -> None:
    torch.manual_seed(2)
    hidden = torch.randn(1, 512, 16).bfloat16()
    head = torch.randn(9, 16).bfloat16().requires_grad_()
    positions, targets = torch.arange(512), torch.randint(0, 9, (512,))
    trained_loss(hidden, positions, targets, head, chunk=1).backward()
    exact = head.detach().double().requires_grad_()
    logits = hidden[0].double() @ exact.T
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert head.grad is not None
    assert exact.grad is not None
    # 512 sums in bf16 would be off by several per cent
    off = (head.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert off < 0.01


def test_without_gradients_there_is_only_the_loss() -> None:
    hidden, head = torch.randn(1, 4, 3), torch.randn(5, 3, requires_grad=True)
    positions, targets = torch.arange(3), torch.tensor([1, 2, -100])
    with torch.no_grad():
        loss = trained_loss(hidden, positions, targets, head, chunk=2)
    assert not loss.requires_grad
    full = torch.nn.functional.cross_entropy(hidden[0, :3] @ head.T, targets, reduction="sum")
    torch.testing.assert_close(loss, full.detach())


def test_auto_says_what_it_is_and_liger_is_never_replaced() -> None:
    assert choose_loss("auto", "cuda") == "torch"
    with pytest.raises(ModelError, match="liger needs a CUDA device, this is cpu"):
        choose_loss("liger", "cpu")
    with pytest.raises(ModelError, match="'fast' is unknown; expected one of auto, torch, liger"):
        choose_loss("fast", "cpu")  # type: ignore[arg-type]
