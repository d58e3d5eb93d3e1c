"""Choose transformers' attention implementation for a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lapilli.model.errors import ModelError
from lapilli.model.transformers_internals import (
    check_attention,
    model_class_of,
    supported_attention,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["AUTO", "Attention", "choose_attention"]

AUTO = "auto"


@dataclass(frozen=True)
class Attention:
    """What was chosen.

    Attributes:
        name: transformers' name of it; `auto` where only the model's own code can tell.
        family: The architecture.
        supported: What the architecture can be built with.
    """

    name: str
    family: str
    supported: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One line for the person who waits, where it is not what most architectures get."""
        if self.name == "sdpa" or "sdpa" in self.supported or not self.supported:
            return ""
        return (
            f"attention: {self.name}; {self.family} cannot be built with sdpa, only with "
            f"{', '.join(self.supported)} (language.attention)"
        )


def choose_attention(wanted: str, settings: PreTrainedConfig) -> Attention:
    """What `language.attention` stands for with an architecture; its own check is asked.

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
    if wanted == AUTO:
        return Attention("sdpa" if "sdpa" in supported else "eager", family, supported)
    try:
        found = check_attention(model_class, settings, wanted)
    except (ValueError, ImportError, AttributeError) as error:
        is_known = wanted in supported
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"language.attention: {wanted!r} "
            + (f"cannot be used here ({reason})" if is_known else f"is nothing {family} supports")
            + f"; expected {AUTO}, or one of {', '.join(supported)}"
        ) from None
    return Attention(found, family, supported)
