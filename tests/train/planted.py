"""A projector with a fault: `PLANTED=hang:1:6` lets rank 1 sleep for ever in its 6th forward.

`PLANTED=slow:1:0.2` lets rank 1 sleep 0.2 s in each.
"""

from __future__ import annotations

import os
import time

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["projector"]


class _Planted(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        """The linear layer's, after the fault."""
        self.calls += 1
        kind, rank, value = os.environ.get("PLANTED", "none:0:0").split(":")
        if dist.is_initialized() and dist.get_rank() == int(rank):
            if kind == "hang" and self.calls == int(value):
                time.sleep(10_000)
            if kind == "slow":
                time.sleep(float(value))
        return super().forward(input)


def projector(inputs: int, outputs: int) -> nn.Module:
    """What `model.projector: tests.train.planted:projector` builds."""
    return _Planted(inputs, outputs)
