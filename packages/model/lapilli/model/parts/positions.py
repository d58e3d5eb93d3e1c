"""Find a language model's number of positions and whether it can exceed them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lapilli.model.parts.qwen1 import SOURCE

__all__ = ["Positions", "positions_of"]

_TABLE = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")


@dataclass(frozen=True)
class Positions:
    """The positions of a language model.

    Attributes:
        limit: Number of positions the model was made for.
        is_fixed: The model looks each position up in a table of `limit` rows (GPT-2, OPT, GPT-J),
            so that a longer sequence cannot be computed; or beyond them it computes what is not
            implemented (Qwen-1's log-n attention and dynamic NTK). Otherwise (rotary) it can,
            untrained.
    """

    limit: int
    is_fixed: bool


def positions_of(language: nn.Module) -> Positions | None:
    """The positions of a causal language model of transformers; None if it has no bound."""
    model: Any = language
    config = model.config
    if getattr(config, "model_type", "") == "mpt":  # ALiBi, whose bias has one size
        return Positions(int(config.max_seq_len), is_fixed=True)
    limit: object = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    if getattr(config, SOURCE, "") == "qwen" or _has_table(language, limit):
        return Positions(limit, is_fixed=True)
    rope: object = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or not rope:
        return None if getattr(config, "alibi", False) else Positions(limit, is_fixed=False)
    return Positions(max(limit, *_scaled(cast("dict[str, Any]", rope), limit)), is_fixed=False)


def _has_table(language: nn.Module, limit: int) -> bool:
    """An embedding of positions, or a table of their sines that is not made longer on demand."""
    for path, module in language.named_modules():
        name = path.rpartition(".")[2]
        is_learnt = isinstance(module, nn.Embedding) and module.num_embeddings >= limit
        if is_learnt and _TABLE.search(name):
            return True
        for buffer_name, buffer in module.named_buffers(recurse=False):
            is_table = buffer.dim() == 2 and buffer.shape[0] == limit
            if is_table and _TABLE.search(buffer_name) and buffer.is_floating_point():
                return True
    return False


def _scaled(rope: dict[str, Any], limit: int) -> list[int]:
    """The limit under each kind of rotary scaling there is; some families have one a layer type."""
    nested = [cast("dict[str, Any]", one) for one in rope.values() if isinstance(one, dict)]
    found = [limit]
    for one in nested or [rope]:
        original = one.get("original_max_position_embeddings") or limit
        found.append(int(float(one.get("factor") or 1.0) * original))
    return found
