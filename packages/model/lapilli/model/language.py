"""The language model: a decoder of transformers that takes `inputs_embeds`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lapilli.model.config import LanguageConfig
from lapilli.model.pretrained import Loading, check_settings, one_line, whole
from lapilli.model.quantize import check_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_language", "logit_scale", "logit_softcap", "text_scale"]


def build_language(
    config: LanguageConfig, dtype: torch.dtype = torch.float32, loading: Loading = whole
) -> PreTrainedModel:
    """A causal language model, with weights or with random ones.

    Weights go from the file into the model once, in `dtype`; there is no second copy. `loading`
    stands around it; random weights, which are made everywhere alike, it does not concern.

    Raises:
        ModelError: Unknown architecture, wrong settings, or weights that are not there.
    """
    kind: dict[str, Any] = {"attn_implementation": config.attention, "dtype": dtype}
    with loading() if config.pretrained else whole():
        model = _load(config, kind) if config.pretrained else _random(config, kind)
        if config.vocab_size > model.config.vocab_size:
            _grow(model, config.vocab_size)
    return model


def _load(config: LanguageConfig, kind: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if config.quantize != "none":
        check_quantization()  # before gigabytes are read
    with one_line(
        f"language.pretrained: {config.pretrained!r} cannot be loaded; expected a hub name or "
        "a folder with a causal language model in safetensors"
    ):
        return AutoModelForCausalLM.from_pretrained(
            config.pretrained,
            use_safetensors=None if config.allow_pickle else True,
            trust_remote_code=config.trust_remote_code,
            **kind,
        )


def _random(config: LanguageConfig, kind: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with one_line(f"language.model_type: {config.model_type!r} is no architecture of transformers"):
        defaults = AutoConfig.for_model(config.model_type)
    check_settings("language.settings", config.settings, defaults)
    with one_line(f"language.settings: no {config.model_type} can be built of them"):
        settings = AutoConfig.for_model(config.model_type, **config.settings)
        return AutoModelForCausalLM.from_config(settings, **kind)


def _grow(model: PreTrainedModel, rows: int) -> None:
    """Add rows to embedding and head, each the mean of the others.

    A mean begins like a known token; a random row would begin with a loss of its own
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    old = int(model.config.vocab_size)
    noted: Any = model
    noted.source_rows = old  # for `added_rows.source_rows`
    # What it draws for the rows is replaced below. How much differs under ZeRO-3, and what is drawn
    # after it (projector, adapters) must not.
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        both: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()
        for module in both:
            for value in module.parameters():
                value[old:] = value[:old].float().mean(0).to(value.dtype)


def logit_softcap(language: PreTrainedModel) -> float | None:
    """Gemma 2's bound on its logits."""
    cap = getattr(language.config, "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def logit_scale(language: PreTrainedModel) -> float:
    """What the logits are multiplied with: Cohere's `logit_scale`, one over Granite's divisor."""
    scale = getattr(language.config, "logit_scale", None)
    divisor = getattr(language.config, "logits_scaling", None)
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)


def text_scale(language: PreTrainedModel) -> torch.Tensor | float:
    """What the embedding module multiplies its rows with (Gemma's sqrt(D)), and images' not.

    Rounded as the module does it (in bf16 sqrt(3072) is 55.5), and never read back to the host.
    """
    module: Any = language.get_input_embeddings()
    scale = getattr(module, "embed_scale", 1.0)
    return scale.to(module.weight.dtype) if isinstance(scale, torch.Tensor) else float(scale)
