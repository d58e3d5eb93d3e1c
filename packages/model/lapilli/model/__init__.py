"""lapilli.model: vision-language models and their merge. Never imports ray."""

from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from lapilli.model.errors import ModelError
from lapilli.model.generate import generate_greedy
from lapilli.model.loss import trained_loss
from lapilli.model.merging import merge
from lapilli.model.parts.trainable import freeze, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model

__all__ = [
    "LanguageConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelError",
    "VisionConfig",
    "VisionLanguageModel",
    "build_model",
    "freeze",
    "generate_greedy",
    "merge",
    "trainable_parameters",
    "trained_loss",
]
