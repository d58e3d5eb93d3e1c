"""lapilli.model: vision-language models and their merge. Never imports ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapilli.model.attention.backend import attention_kernel
    from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
    from lapilli.model.errors import ModelError
    from lapilli.model.generate import generate_greedy
    from lapilli.model.kernels.choice import choose_kernels
    from lapilli.model.loss import trained_loss
    from lapilli.model.merging import merge
    from lapilli.model.parts.trainable import freeze, trainable_parameters
    from lapilli.model.parts.vision import Tower
    from lapilli.model.vlm import VisionLanguageModel, build_model

__all__ = [
    "LanguageConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelError",
    "Tower",
    "VisionConfig",
    "VisionLanguageModel",
    "attention_kernel",
    "build_model",
    "choose_kernels",
    "freeze",
    "generate_greedy",
    "merge",
    "trainable_parameters",
    "trained_loss",
]

_MODULES = {
    "LanguageConfig": "config",
    "LoraConfig": "config",
    "ModelConfig": "config",
    "ModelError": "errors",
    "Tower": "parts.vision",
    "VisionConfig": "config",
    "VisionLanguageModel": "vlm",
    "attention_kernel": "attention.backend",
    "build_model": "vlm",
    "choose_kernels": "kernels.choice",
    "freeze": "parts.trainable",
    "generate_greedy": "generate",
    "merge": "merging",
    "trainable_parameters": "parts.trainable",
    "trained_loss": "loss",
}


def __getattr__(name: str) -> Any:
    """A public name, whose module is imported when the name is first used: torch takes a second."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
