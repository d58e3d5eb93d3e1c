"""The plain engine's update against torch's own clipping and AdamW on fp32 copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lapilli.train.engine import torch_engine
from lapilli.train.engine.torch_engine import PlainEngine


class Layers(nn.Module):
    """Three layers, of which the last has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, rows: Tensor) -> Tensor:
        """Mean square of two layers."""
        return self.second(self.first(rows).relu()).float().square().mean()


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("numbers", [1, 100, 2**28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_torchs(
    dtype: torch.dtype, numbers: int, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "UPDATE_NUMBERS", numbers)
    torch.manual_seed(0)
    model = Layers().to(dtype)
    twin = copy.deepcopy(model)
    engine = PlainEngine(model, torch.optim.AdamW(model.parameters(), lr=0.1), grad_clip=clip)
    masters = [parameter.detach().float() for parameter in twin.parameters()]
    adam = torch.optim.AdamW(masters, lr=0.1)
    for _ in range(4):
        rows = torch.randn(5, 8, dtype=dtype)
        engine.backward(engine(rows=rows))
        engine.step()

        twin(rows).backward()
        for master, parameter in zip(masters, twin.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, clip or float("inf"))
        adam.step()
        with torch.no_grad():
            for master, parameter in zip(masters, twin.parameters(), strict=True):
                parameter.copy_(master)
                parameter.grad = None

        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert ours.grad is None


def test_a_step_that_is_not_whole_changes_nothing() -> None:
    model = Layers()
    before = copy.deepcopy(model.state_dict())
    engine = PlainEngine(model, torch.optim.AdamW(model.parameters(), lr=0.1), accumulation=2)
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(rows=torch.ones(1, 8)))
    engine.step()
    torch.testing.assert_close(model.state_dict(), before)
    assert model.first.weight.grad is not None
