"""The language model: a decoder of transformers that takes `inputs_embeds`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.pretrained import check_settings, one_line

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

    kind: dict[str, Any] = {"attn_implementation": config.attention, "dtype": torch.float32}
    if config.pretrained:
        with one_line(
            f"language.pretrained: {config.pretrained!r} cannot be loaded; expected a hub name or "
            "a folder with a causal language model in safetensors"
        ):
            loaded = AutoModelForCausalLM.from_pretrained(
                config.pretrained, use_safetensors=True, **kind
            )
        return _check_head(loaded)
    with one_line(f"language.model_type: {config.model_type!r} is no architecture of transformers"):
        defaults = AutoConfig.for_model(config.model_type)
    check_settings("language.settings", config.settings, defaults)
    with one_line(f"language.settings: no {config.model_type} can be built of them"):
        settings = AutoConfig.for_model(config.model_type, **config.settings)
        return _check_head(AutoModelForCausalLM.from_config(settings, **kind))


def _check_head(model: PreTrainedModel) -> PreTrainedModel:
    """Refuse a model that does more to its logits than a linear layer: the loss would not."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"language: {type(model).__name__} has {name}, which the loss does not apply yet; "
                "choose another language model"
            )
    return model
