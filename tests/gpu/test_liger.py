"""Liger's kernels on a CUDA device: the interpreter's cases, and no waiting."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is absent; torch's CUDA build brings it")
pytest.importorskip("liger_kernel", reason="liger-kernel is absent: extra liger")

from lapilli.model.attention.forward import NAME
from lapilli.model.kernels.liger import FAMILIES, apply_liger
from tests.gpu.test_attention import never_waits
from tests.model import decoders
from tests.model.liger_cases import *  # noqa: F403

# behind the import, which brings a mark of its own
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_never_wait(family: str, dtype: torch.dtype) -> None:
    model = decoders.language(family, NAME).to("cuda", dtype)
    apply_liger(model, "liger")
    decoders.run(model, decoders.inputs("cuda", dtype))  # compiles the kernels
    model.zero_grad()
    given = decoders.inputs("cuda", dtype)
    with never_waits():
        decoders.run(model, given)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_fp32_as_torchs(family: str) -> None:
    """Against the same rounded weights computed in fp32, the error is at most twice torch's."""
    exact = decoders.language(family, NAME).to("cuda", torch.bfloat16).float()
    expected, _ = decoders.run(exact, decoders.inputs("cuda", torch.bfloat16) | rounded())
    errors: list[float] = []
    for fused in (False, True):
        model = decoders.language(family, NAME).to("cuda", torch.bfloat16)
        if fused:
            apply_liger(model, "liger")
        found, _ = decoders.run(model, decoders.inputs("cuda", torch.bfloat16))
        errors.append(float((found.float() - expected).norm() / expected.norm()))
    assert errors[1] < 2 * errors[0] + 1e-3, errors


def rounded() -> dict[str, torch.Tensor]:
    given = decoders.inputs("cuda", torch.bfloat16)["inputs_embeds"]
    return {"inputs_embeds": given.detach().float().requires_grad_()}
