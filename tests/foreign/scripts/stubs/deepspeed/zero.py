"""The one context that LLaVA enters; on one process there is nothing to gather."""

from __future__ import annotations

from contextlib import nullcontext


def GatheredParameters(*arguments: object, **settings: object) -> nullcontext[None]:
    """Nothing is shared out."""
    del arguments, settings
    return nullcontext()
