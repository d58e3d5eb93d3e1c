"""The language model: a decoder of transformers that takes `inputs_embeds`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_language"]


def build_language(config: LanguageConfig) -> PreTrainedModel:
    """A causal language model, with weights or with random ones, in fp32.

    Raises:
        ModelError: Unknown architecture, wrong settings, or weights that are not there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if config.pretrained:
            return AutoModelForCausalLM.from_pretrained(
                config.pretrained, attn_implementation=config.attention, dtype=torch.float32
            )
        settings = AutoConfig.for_model(config.model_type, **config.settings)
        return AutoModelForCausalLM.from_config(
            settings, attn_implementation=config.attention, dtype=torch.float32
        )
    except (OSError, ValueError, TypeError) as error:
        name = config.pretrained or config.model_type
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"language: {name!r} cannot be built ({reason}); expected a hub name, a folder with a "
            "causal language model, or a model_type of transformers with its settings"
        ) from None
