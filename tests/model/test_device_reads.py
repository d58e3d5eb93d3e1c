"""The spy itself: it must see each way of reading, in forward and in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.device_reads import device_reads

WAYS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "index": lambda x: [0, 1, 2][x.long()[0]],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask set": lambda x: x.clone().index_put_((x > 0,), x[:3]),
    "select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat": lambda x: torch.repeat_interleave(x.long()),
    "format": lambda x: f"{x.sum():.1f}",
}
SILENT: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape[0] * 2,
    "product": lambda x: (x * x).sum(),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "fill": lambda x: x.masked_fill(x > 0, 0.0),
    "gather": lambda x: x[torch.zeros(2, dtype=torch.long)],
    "repeat": lambda x: torch.repeat_interleave(x, 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_sees(way: str) -> None:
    x = torch.ones(3)
    with device_reads() as found:
        WAYS[way](x)
    assert found
    assert all(__file__ in read.where for read in found), found


@pytest.mark.parametrize("way", SILENT)
def test_leaves_out(way: str) -> None:
    x = torch.ones(3)
    with device_reads() as found:
        SILENT[way](x)
    assert found == []


def test_sees_a_read_in_backward() -> None:
    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * gradients[0].sum().item()

    x = torch.ones(3, requires_grad=True)
    with device_reads() as found:
        loss: Any = Asking.apply(x)
        loss.sum().backward()
    assert [read.operation for read in found] == ["_local_scalar_dense"]
    assert "backward" in found[0].where
