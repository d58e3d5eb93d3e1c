"""The whole model on a CUDA device, every tower and stage: forward and backward never wait."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_attention import never_waits
from tests.model import twins
from tests.model.test_gate import BATCHES, STAGES, built, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tower", twins.TOWERS)
def test_forward_and_backward_never_wait(tower: str, stage: str) -> None:
    """With the merge and the kernels that `auto` takes here."""
    model = built(tower, "qwen2", **STAGES[stage]).to("cuda")
    given = [twins.inputs(batch, "cuda") for batch in BATCHES.values()]
    for inputs in given:
        step(model, inputs)  # compiles the kernels, copies the tower's mean
    model.zero_grad()
    with never_waits():
        losses = [step(model, inputs) for inputs in given]
    on_cpu = built(tower, "qwen2", **STAGES[stage])
    on_cpu.load_state_dict(model.state_dict())
    if "lora" in STAGES[stage]:
        return  # drops its inputs, differently on each device
    for loss, batch in zip(losses, BATCHES.values(), strict=True):
        wanted = step(on_cpu, twins.inputs(batch))
        torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-3, atol=1e-3)
