"""What transformers' configs and weights have in common: errors as one line."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

from lapilli.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Loading", "check_settings", "one_line", "whole"]

# What a language model's weights are loaded in: nothing, or what shares them among processes while
# they are read. A model must not know DeepSpeed, so the trainer brings it.
Loading: TypeAlias = Callable[[], AbstractContextManager[object]]
whole: Loading = nullcontext


def check_settings(name: str, settings: Mapping[str, Any], known: PreTrainedConfig) -> None:
    """Refuse a setting the architecture does not have; transformers would take it and ignore it.

    Args:
        name: The settings' full name in a recipe.
        settings: What the recipe gives.
        known: A config of the same class with its defaults.

    Raises:
        ModelError: Names the first unknown key.
    """
    unknown = sorted(set(settings) - set(known.to_dict()))
    if unknown:
        raise ModelError(
            f"{name}: {unknown[0]!r} is unknown; expected settings of {type(known).__name__}"
        )


@contextmanager
def one_line(what: str) -> Generator[None]:
    """Turn what transformers raises at wrong settings or absent weights into one line.

    Raises:
        ModelError: `what`, and the first line of the reason.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what} ({lines[0]})") from None
