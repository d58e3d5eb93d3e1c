"""Liger's RMSNorm, rotary embedding and gated MLP in a decoder that is built already.

Only this model's modules are changed: Liger's own patching also replaces functions and classes of
transformers, and with them every other model of the process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

from torch import Tensor, nn

from lapilli.model.errors import ModelError
from lapilli.model.transformers_internals import rotary_function, with_rotary_function

__all__ = ["FAMILIES", "GATES", "apply_liger"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAMILIES: dict[str, tuple[float, str]] = {
    **dict.fromkeys(
        (
            "granite", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3",
            "smollm3",
        ),
        (0.0, "llama"),
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), (1.0, "gemma")),
}  # fmt: skip
"""What a family's norm adds to its weight, and where it casts, by Liger's name of it."""

GATES = {
    "silu": "LigerSiLUMulFunction", "swish": "LigerSiLUMulFunction",
    "gelu_pytorch_tanh": "LigerGELUMulFunction",
}  # fmt: skip
Way = Literal["auto", "liger"]


def apply_liger(language: Any, way: Way) -> int:
    """Let a decoder's norms, rotary embeddings and gated MLPs run Liger's kernels.

    Which runs is decided by the device of what they are given. Adapters, 4-bit layers and gradient
    checkpointing go on as before: the linear layers are called as they were.

    Args:
        language: A causal language model of one of `FAMILIES`.
        way: What runs on other devices than CUDA: `auto` for torch, `liger` for an error.

    Returns:
        How many modules were changed.
    """
    offset, casting = FAMILIES[language.config.model_type]
    config = language.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    changed = 0
    for module in language.get_decoder().modules():
        forward: Callable[..., Any] | None = None
        if type(module).__name__.endswith("RMSNorm"):
            forward = _norm(module, offset, casting, way)
        elif hasattr(module, "down_proj") and activation in GATES:
            forward = _mlp(module, GATES[activation], way)
        elif rotary_function(module) is not None:
            forward = _attention(module, way)
        if forward is not None:
            # bound, so that a copy of the model calls its own weights
            module.forward = MethodType(forward, module)
            changed += 1
    return changed


def _runs_liger(given: Tensor, way: Way) -> bool:
    if given.is_cuda or INTERPRETED:
        return True
    if way == "liger":
        raise ModelError(
            f"model.kernels: liger needs a CUDA device, the tensors are on {given.device.type}; "
            "set model.kernels: auto"
        )
    return False


def _liger(name: str) -> Any:
    return getattr(importlib.import_module("liger_kernel.ops"), name)


def _norm(module: Any, offset: float, casting: str, way: Way) -> Callable[..., Any]:
    plain = type(module).forward
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _runs_liger(hidden_states, way):
            return plain(self, hidden_states)
        # its gradient is not written over the output's, which a residual may still need
        function = _liger("LigerRMSNormFunction")
        return function.apply(hidden_states, self.weight, eps, offset, casting, False, None)

    return forward


def _mlp(module: Any, gate: str, way: Way) -> Callable[..., Any] | None:
    plain = type(module).forward
    is_joined = hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Module)
    if not is_joined and not (hasattr(module, "gate_proj") and hasattr(module, "up_proj")):
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _runs_liger(x, way):
            return plain(self, x)
        if is_joined:
            gated, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gated, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_liger(gate).apply(gated, up))

    return forward


def _attention(module: Any, way: Way) -> Callable[..., Any]:
    plain = rotary_function(module)
    assert plain is not None

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not _runs_liger(q, way):
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return _liger("LigerRopeFunction").apply(q, k, cos, sin, None, unsqueeze_dim)

    return with_rotary_function(module, rotate)
