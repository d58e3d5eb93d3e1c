"""Build the language model: a transformers decoder that takes `inputs_embeds`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from lapilli.model.attention.choice import AUTO, choose_attention
from lapilli.model.attention.forward import refuse_masks, register
from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.parts.llava_folder import llava_decoder
from lapilli.model.parts.pretrained import (
    Loading,
    check_memory,
    check_readable,
    check_settings,
    one_line,
    settings_text,
    whole,
    without_report,
)
from lapilli.model.parts.quantized import check_quantization
from lapilli.model.parts.qwen1 import is_qwen1, qwen1_config, qwen1_weights, refuse_minicpm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "build_language", "grow_vocabulary", "language_settings", "logit_scale", "logit_softcap",
    "text_scale", "vocabulary_size",
]  # fmt: skip


NOT_LOADED = (
    "language.pretrained: {!r} cannot be loaded; expected a hub name or a folder with a causal "
    "language model in safetensors"
)


def build_language(
    config: LanguageConfig,
    dtype: torch.dtype = torch.float32,
    loading: Loading = whole,
    *,
    weights: bool = True,
) -> PreTrainedModel:
    """A causal language model, with weights or with random ones.

    Weights go from the file into the model once, in `dtype`; there is no second copy. `loading`
    stands around it; random weights, which are made everywhere alike, it does not concern.

    Args:
        config: The language model's settings.
        dtype: Of its weights.
        loading: Context manager around the reading of pretrained weights.
        weights: Whether pretrained weights are read; without, the model has their shapes and
            random numbers, and layers in 4 bits have the shapes alone.

    Raises:
        ModelError: Unknown architecture, wrong settings, or weights that are not there.
    """
    settings = language_settings(config)
    attention = choose_attention(config.attention, settings).name
    register()
    kind: dict[str, Any] = {
        "attn_implementation": None if attention == AUTO else attention, "dtype": dtype,
    }  # fmt: skip
    reads = weights and bool(config.pretrained)
    with loading() if reads else whole():
        build = _load if reads else _without_weights
        model = build(config, settings, kind)
        if config.vocab_size > model.config.vocab_size:
            grow_vocabulary(model, config.vocab_size)
    refuse_masks(model)
    return model


def language_settings(config: LanguageConfig) -> PreTrainedConfig:
    """Transformers' config of the language model, from the recipe or beside the weights.

    Raises:
        ModelError: Unknown architecture, wrong settings, or no config that can be read.
    """
    from transformers import AutoConfig

    if config.pretrained:
        with one_line(NOT_LOADED.format(config.pretrained)):
            check_readable(config.pretrained)
            if (of_llava := llava_decoder(config.pretrained)) is not None:
                return of_llava
            found = _config_file(config.pretrained)
            refuse_minicpm(f"language.pretrained: {config.pretrained}", found)
            if is_qwen1(found):
                return qwen1_config(f"language.pretrained: {config.pretrained}", found)
            return AutoConfig.from_pretrained(
                config.pretrained, trust_remote_code=config.trust_remote_code
            )
    with one_line(f"language.model_type: {config.model_type!r} is no architecture of transformers"):
        defaults = AutoConfig.for_model(config.model_type)
    check_settings("language.settings", config.settings, defaults)
    with one_line(
        f"language.settings: no {config.model_type} can be built of "
        f"{settings_text(config.settings)}"
    ):
        return AutoConfig.for_model(config.model_type, **config.settings)


def _config_file(name: str) -> dict[str, Any]:
    """The `config.json` of a folder or of a name on the hub."""
    from transformers import PreTrainedConfig

    found: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    return found


def vocabulary_size(config: LanguageConfig) -> int:
    """Ids that the model will know, from its config alone.

    Raises:
        ModelError: As `language_settings`.
    """
    own = int(language_settings(config).get_text_config().vocab_size)
    return max(own, config.vocab_size)


@contextmanager
def _naming_padding(field: str, settings: PreTrainedConfig) -> Generator[None]:
    """Report a padding token outside the vocabulary (Phi-3's is 32000), which torch asserts."""
    try:
        yield
    except AssertionError:
        text: Any = settings.get_text_config()
        padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if not isinstance(padding, int) or not isinstance(rows, int) or padding < rows:
            raise
        raise ModelError(
            f"{field}: pad_token_id {padding} is no row of vocab_size {rows}; set pad_token_id "
            f"to one of 0 to {rows - 1}, or vocab_size above {padding}"
        ) from None


def _load(
    config: LanguageConfig, settings: PreTrainedConfig, kind: dict[str, Any]
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    if config.quantize != "none":
        check_quantization()  # before gigabytes are read
    of_llava = llava_decoder(config.pretrained)
    if of_llava is not None:
        kind = {**kind, "config": of_llava}
    with (
        one_line(NOT_LOADED.format(config.pretrained)),
        _naming_padding("language.pretrained", settings),
        without_report() if of_llava is not None else nullcontext(),  # of the projector and tower
    ):
        if of_llava is None and is_qwen1(_config_file(config.pretrained)):
            weights = qwen1_weights(config.pretrained, settings, allow_pickle=config.allow_pickle)
            return Qwen2ForCausalLM.from_pretrained(
                None, config=settings, state_dict=weights, **kind
            )
        return AutoModelForCausalLM.from_pretrained(
            config.pretrained,
            use_safetensors=None if config.allow_pickle else True,
            trust_remote_code=config.trust_remote_code,
            **kind,
        )


def _without_weights(
    config: LanguageConfig, settings: PreTrainedConfig, kind: dict[str, Any]
) -> PreTrainedModel:
    """The model as its config has it, with random weights."""
    from transformers import AutoModelForCausalLM

    check_memory("language.settings", settings.get_text_config())
    field, what = "pretrained", f"a {settings.model_type} like {config.pretrained!r}"
    if not config.pretrained:
        field, what = "settings", f"{config.model_type} of {settings_text(config.settings)}"
    with (
        one_line(f"language.{field}: no {what} can be built"),
        _naming_padding(f"language.{field}", settings),
    ):
        model = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=config.trust_remote_code, **kind
        )
        model.tie_weights()  # which a caller's `no_init_weights` leaves out
    return model


def grow_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Add rows to embedding and head up to `rows`, each the mean of the others.

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
