"""What a model is made of: tower, projector, language model. Read from a recipe's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lapilli.model.errors import ModelError

__all__ = ["LanguageConfig", "ModelConfig", "Part", "VisionConfig"]

Part = Literal["vision", "projector", "language"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    Attributes:
        tower: Name in `lapilli.model.vision.TOWERS`, or `package.module:name`.
        pretrained: Hub name or folder with weights; empty for random weights of `settings`.
        settings: Settings of the tower's transformers config, when there are no weights.
        layer: Which hidden state is taken, as LLaVA counts (-2: before the last layer). Layers
            after it are not built.
        mean: Per channel, subtracted from pixels in 0 to 1.
        std: Per channel, what is then divided by.
    """

    tower: str = "clip"
    pretrained: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    layer: int = -2
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


@dataclass(frozen=True)
class LanguageConfig:
    """The language model: any decoder of transformers that takes `inputs_embeds`.

    Attributes:
        model_type: transformers' name of the architecture, when there are no weights.
        pretrained: Hub name or folder with weights; empty for random weights of `settings`.
        settings: Settings of the transformers config, when there are no weights.
        attention: transformers' attention implementation.
    """

    model_type: str = "llama"
    pretrained: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    attention: str = "sdpa"


@dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    Attributes:
        vision: The tower.
        language: The language model.
        projector: `linear`, `mlpNx_gelu`, `identity`, or `package.module:name`.
        trainable: Parts that learn; the others are frozen.
        merge: How image features are put among the text's embeddings (`lapilli.model.merge`).
        loss: How the head's cross-entropy is computed (`lapilli.model.loss.choose_loss`).
        head_chunk: Trained positions the head works on at once.
        seed: Seed of random weights.
    """

    vision: VisionConfig
    language: LanguageConfig
    projector: str = "mlp2x_gelu"
    trainable: tuple[Part, ...] = ("projector", "language")
    merge: Literal["torch", "triton"] = "torch"
    loss: Literal["auto", "torch", "liger"] = "auto"
    head_chunk: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if not self.trainable:
            raise ModelError("trainable: empty; expected some of vision, projector, language")
        if self.head_chunk < 1:
            raise ModelError(f"head_chunk: {self.head_chunk}; expected at least 1")
