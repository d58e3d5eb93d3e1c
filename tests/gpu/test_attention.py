"""Our attention on a CUDA device: eager attention's results, no waiting, and the kernel it runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch

from lapilli.model.attention.backend import attention_kernel
from lapilli.model.attention.choice import DECODERS
from lapilli.model.attention.forward import NAME, attend, register
from lapilli.model.attention.trees import Trees
from tests.device_reads import device_reads
from tests.model import decoders
from tests.model.test_trees import ids_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
register()
NEAR = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@contextmanager
def never_waits() -> Generator[None]:
    """In mode `error` torch raises where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("family", DECODERS)
def test_equals_eager_attention(family: str, dtype: torch.dtype) -> None:
    """bf16 is compared with eager attention in fp32 on the same rounded weights and inputs."""
    eager = decoders.language(family, "eager").to("cuda", dtype).float()
    ours = decoders.language(family, NAME).to("cuda", dtype)
    given = decoders.inputs("cuda", dtype)
    exact = {**given, "inputs_embeds": given["inputs_embeds"].detach().float().requires_grad_()}
    expected, wanted = decoders.run(eager, exact)
    found, gradients = decoders.run(ours, given)
    near = NEAR[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=near)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # a gradient that is nothing but rounding is compared with the size of what made it
        size = max(float(gradient.abs().max()), 1.0)
        off = (gradients[name].float() - gradient).abs().max() / size
        assert off < 4 * NEAR[dtype], name


@pytest.mark.parametrize("family", DECODERS)
def test_forward_and_backward_never_wait(family: str) -> None:
    model = decoders.language(family, NAME).to("cuda", torch.bfloat16)
    decoders.run(model, decoders.inputs("cuda", torch.bfloat16))  # compiles, finds memory
    model.zero_grad()
    given = decoders.inputs("cuda", torch.bfloat16)
    with never_waits(), device_reads() as reads:
        decoders.run(model, given)
    assert reads == []


def test_a_planted_read_waits() -> None:
    model = decoders.language("llama", NAME).to("cuda")
    model.model.norm.register_forward_hook(lambda norm, *_: norm.weight.sum().item() and None)
    with never_waits(), pytest.raises(RuntimeError, match="synchronizing"):
        decoders.run(model, decoders.inputs("cuda"))


def test_long_rows_in_bf16_run_a_fused_kernel() -> None:
    model = decoders.language("llama", NAME)
    kernel = attention_kernel(model, 2048, torch.bfloat16, torch.device("cuda"))
    assert kernel in (f"{NAME} (flash_attention)", f"{NAME} (cudnn_attention)")
    windowed = decoders.language("mistral", NAME)
    kernel = attention_kernel(windowed, 2048, torch.bfloat16, torch.device("cuda"))
    assert "math" not in kernel


@pytest.mark.parametrize("window", [None, 100])
def test_rows_of_several_samples_have_the_gradients_of_the_dense_form(window: int | None) -> None:
    """FlexAttention on the device against the mask on the CPU, where it has no backward."""
    ids = ids_of(((300, (40, 60, 50)), (0, (80,)), (120, (7,))), padding=47)
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(1, heads, 704, 64, generator=generator) for heads in (4, 2, 2, 4)]
    found: dict[str, list[torch.Tensor]] = {}
    for device in ("cpu", "cuda"):
        given = [one.to(device).requires_grad_() for one in drawn[:3]]
        trees = Trees(*(one.to(device) for one in ids))
        result, _ = attend(
            torch.nn.Module(), given[0], given[1], given[2], None,
            sliding_window=window, trees=trees,
        )  # fmt: skip
        weights = drawn[3].transpose(1, 2).to(device) * (ids[0] > 0).to(device)[..., None, None]
        found[device] = [result, *torch.autograd.grad((result * weights).sum(), given)]
    for one, other in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)
