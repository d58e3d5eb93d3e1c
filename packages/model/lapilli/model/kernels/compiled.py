"""Compile the layers of decoder and tower one by one with `torch.compile`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lapilli.model.config import ModelConfig

__all__ = ["compile_blocks", "uncompiled"]


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Let each layer of a model's decoder and tower run compiled from its first call on.

    A layer is one graph. Layers of one kind share it, and its shapes are dynamic, so that a run's
    lengths do not each compile anew. With gradient checkpointing the recomputation is compiled too.

    Args:
        model: A `VisionLanguageModel`, with its adapters.
        backend: Of `torch.compile`.

    Returns:
        How many layers were changed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=True)
    return len(layers)


def uncompiled(config: ModelConfig) -> AbstractContextManager[object]:
    """Run layers without compilation: a key cache grows by one token a call."""
    if config.compile == "none":
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
