"""Which keys a query sees, from positions alone.

Shape suffix legend: Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["visible", "visible_square"]


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None = None) -> Tensor:
    """Whether each query sees each key; a pure function of device tensors, which are not read back.

    Args:
        query_positions: int64 [..., Q], places in the row.
        key_positions: int64 [..., K].
        window: Newest keys that a query sees, its own among them; None for all before it.

    Returns:
        bool [..., Q, K].
    """
    distances = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    seen = distances >= 0
    return seen if window is None else seen & (distances < window)


def visible_square(length: int, window: int | None, device: torch.device) -> Tensor:
    """`visible` for a row of `length` tokens whose padding stands on the right: bool [Q, K]."""
    places = torch.arange(length, device=device)
    return visible(places, places, window)
