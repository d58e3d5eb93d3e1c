"""Choose a language model's attention: ours, or one of transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lapilli.model.attention.forward import NAME
from lapilli.model.errors import ModelError
from lapilli.model.transformers_internals import (
    check_attention,
    model_class_of,
    supported_attention,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["AUTO", "DECODERS", "Attention", "choose_attention"]

AUTO = "auto"
DECODERS = (
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox",
    "granite", "llama", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "opt", "phi",
    "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
"""Architectures whose results with our attention are compared with eager attention by a test."""


@dataclass(frozen=True)
class Attention:
    """The chosen attention.

    Attributes:
        name: `lapilli`, or transformers' name; `auto` if only the model's own code can resolve it.
        family: The architecture.
        supported: What the architecture can be built with.
    """

    name: str
    family: str
    supported: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One line for the user if the choice differs from that of most architectures."""
        if self.name == NAME or NAME in self.supported or not self.supported:
            return ""
        if self.name == "eager" and "sdpa" not in self.supported:
            return (
                f"attention: eager; {self.family} cannot be built with sdpa, only with "
                f"{', '.join(self.supported)} (language.attention)"
            )
        return (
            f"attention: {self.name}; {self.family} is none of the architectures that lapilli's "
            "own is tested with, so each forward reads the device once"
        )


def choose_attention(wanted: str, settings: PreTrainedConfig) -> Attention:
    """Resolve `language.attention` for an architecture, using transformers' own check.

    `auto` is ours where the architecture is one of `DECODERS`, else `sdpa`, else `eager`.

    Args:
        wanted: The setting.
        settings: The architecture's config.

    Raises:
        ModelError: Something that the architecture does not support, or that is not installed.
    """
    family = str(settings.model_type)
    model_class = model_class_of(settings)
    if model_class is None:  # code that came with the weights: loading it tells
        return Attention(wanted, family)
    supported = supported_attention(model_class)
    if family in DECODERS:
        supported = (*supported, NAME)
    if wanted == AUTO:
        name = next(name for name in (NAME, "sdpa", "eager") if name in supported)
        return Attention(name, family, supported)
    if wanted == NAME:  # transformers would take it for any architecture
        if NAME not in supported:
            raise ModelError(_refused(wanted, family, supported))
        return Attention(NAME, family, supported)
    try:
        found = check_attention(model_class, settings, wanted)
    except (ValueError, ImportError, AttributeError) as error:
        raise ModelError(_refused(wanted, family, supported, str(error))) from None
    return Attention(found, family, supported)


def _refused(wanted: str, family: str, supported: tuple[str, ...], error: str = "") -> str:
    reason = next(iter(error.strip().splitlines()), "")
    return (
        f"language.attention: {wanted!r} "
        + (
            f"cannot be used here ({reason})"
            if wanted in supported
            else f"is nothing {family} supports"
        )
        + f"; expected {AUTO}, or one of {', '.join(supported)}"
    )
