"""On a CUDA device: the same loss and gradients as on the CPU, and no waiting for the device."""

from __future__ import annotations

import pytest
import torch

from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import build_model
from lapilli.train.steps.step import to_device
from tests.train.tiny import model_config, random_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("step", [0, 1])
def test_loss_and_gradients_equal_the_cpus(step: int) -> None:
    batch = random_steps(2, seed=0)[step][0][0]
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for device in (CPU, CUDA):
        model = build_model(model_config("vision", "projector", "language")).to(device)
        loss = model(**to_device(batch, device).inputs)
        loss.backward()
        gradients = {
            n: p.grad.cpu() for n, p in trainable_parameters(model).items() if p.grad is not None
        }
        found.append((loss.item(), gradients))
    (loss_cpu, cpu), (loss_cuda, cuda) = found
    assert loss_cuda == pytest.approx(loss_cpu, rel=1e-4)
    assert cpu.keys() == cuda.keys()
    for name, gradient in cpu.items():
        torch.testing.assert_close(cuda[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_the_merge_never_waits_for_the_device() -> None:
    from lapilli.model.merging import merge

    ids = torch.zeros(2, 64, dtype=torch.long, device=CUDA)
    index = torch.arange(-64, 64, dtype=torch.int32, device=CUDA).clamp(min=-1).view(2, 64)
    embedding = torch.randn(32, 16, device=CUDA, requires_grad=True)
    features = torch.randn(64, 16, device=CUDA, requires_grad=True)
    merge(ids, index, embedding, features).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge(ids, index, embedding, features).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert features.grad is not None
