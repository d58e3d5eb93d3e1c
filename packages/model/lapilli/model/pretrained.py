"""What transformers' configs and weights have in common: errors as one line."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lapilli.model.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Loading", "check_settings", "one_line", "settings_text", "whole"]

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


def settings_text(settings: Mapping[str, Any]) -> str:
    """A recipe's settings in one line: `vocab_size 512, hidden_act gelu`."""
    return ", ".join(f"{name} {value!r}" for name, value in settings.items()) or "the defaults"


@contextmanager
def one_line(what: str) -> Generator[None]:
    """Turn whatever transformers raises at wrong settings or unreadable weights into one line.

    Its configs and models assert, index and divide by what they are given, so every exception
    counts, except a full memory and a `ModelError`, which says it already.

    Raises:
        ModelError: `what`, and the first line of the reason.
    """
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        if type(error) in (AssertionError, KeyError, IndexError, ZeroDivisionError) or not reason:
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        raise ModelError(f"{what} ({reason})") from None
