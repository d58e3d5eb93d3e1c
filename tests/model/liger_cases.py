"""Liger's kernels in our decoders against torch, on a GPU or under Triton's interpreter.

`test_liger.py` runs this file with TRITON_INTERPRET=1, `tests/gpu/test_liger.py` as it is.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.model.attention.forward import NAME, register
from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.kernels.liger import FAMILIES, INTERPRETED, apply_liger
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes, trainable_parameters
from lapilli.model.vlm import build_model
from tests.model import decoders, twins

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device or TRITON_INTERPRET=1"
)
register()
# Of one layer: its norms and the one behind it, an attention and an MLP.
CHANGED = {"gemma2": 7, "gemma3_text": 9, "qwen3": 7, "olmo2": 7, "olmo3": 7}


@triton.jit
def rsqrt(x: Any) -> Any:
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x: Any) -> Any:
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@pytest.fixture(autouse=True)
def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler does and Triton 3.7's interpreter does not: fp32 scalars, libdevice."""
    if not INTERPRETED:
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._implicit_cvt

    def converted(given: Any) -> Any:
        if not isinstance(given, float):
            return convert(given)
        handle = interpreter.TensorHandle(np.array([given], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", rsqrt)
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.geglu"), "tanh", tanh)


def inputs() -> dict[str, Any]:
    """Few tokens where each takes the interpreter a tenth of a second."""
    return decoders.inputs(DEVICE, shape=(1, 4) if INTERPRETED else (2, decoders.LENGTH))


def close(found: dict[str, Any], wanted: dict[str, Any], near: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        bound = near * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_torch_with_its_gradients(family: str) -> None:
    model, fused = (decoders.language(family, NAME, layers=1).to(DEVICE) for _ in range(2))
    assert apply_liger(fused, "liger") == CHANGED.get(family, 5)
    expected, wanted = decoders.run(model, inputs())
    found, gradients = decoders.run(fused, inputs())
    # on a card fp32 products of Triton and of torch are rounded in another order
    near = 1e-5 if DEVICE == "cpu" else 1e-4
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    close(gradients, wanted, near)


def test_a_copy_computes_with_its_own_weights_and_others_are_left_alone() -> None:
    fused, other = decoders.language("llama", NAME), decoders.language("llama", NAME)
    apply_liger(fused, "liger")
    copied = copy.deepcopy(fused)
    for layer in copied.model.layers:
        layer.input_layernorm.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    for model in (fused, copied, other):
        model.to(DEVICE)
    first, _ = decoders.run(fused, inputs())
    second, _ = decoders.run(copied, inputs())
    assert not torch.allclose(first, second, atol=1e-2)
    assert all("forward" not in vars(module) for module in other.modules())
    assert any("forward" in vars(module) for module in fused.modules())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.0)])
def test_a_whole_model_with_adapters_and_checkpointing(lora: LoraConfig | None) -> None:
    found: list[tuple[torch.Tensor, dict[str, Any]]] = []
    samples = twins.samples(7, (1,))
    batch = collate(samples, BatchShape(1, (16,), twins.TOKENS, 4), twins.SIDE)
    for kernels in ("torch", "auto"):
        language = LanguageConfig("qwen2", settings=decoders.settings("qwen2"))
        made = ModelConfig(
            VisionConfig(settings=twins.TOWER), language, trainable=("projector", "language"),
            lora=lora, kernels=kernels, merge="torch", head_chunk=4,
        )  # fmt: skip
        model = build_model(made)
        recompute_all(model)
        model.to(DEVICE)
        set_modes(model)
        loss = twins.forward(model, batch)
        loss.backward()
        gradients = {n: p.grad for n, p in trainable_parameters(model).items()}
        found.append((loss.detach(), gradients))
        patched = [m for m in model.language.modules() if "forward" in vars(m)]
        assert bool(patched) == (kernels == "auto")
    (plain, wanted), (fused, gradients) = found
    near = 1e-5 if DEVICE == "cpu" else 1e-4
    torch.testing.assert_close(fused, plain, rtol=near, atol=near)
    close(gradients, wanted, near)
