"""Tell which of torch's attention kernels a model's attention runs, without running a step."""

from __future__ import annotations

from typing import Any

import torch

from lapilli.model.attention.forward import NAME, shares_keys
from lapilli.model.attention.masks import visible_square
from lapilli.model.torch_internals import fused_attention_choice
from lapilli.model.transformers_internals import attention_of

__all__ = ["attention_kernel", "sdpa_backend"]


def attention_kernel(language: Any, length: int, dtype: torch.dtype, device: torch.device) -> str:
    """Name a language model's attention and the kernels that run it.

    Args:
        language: A causal language model of transformers.
        length: Tokens of a row.
        dtype: The dtype of the computation.
        device: Where.

    Returns:
        For example `lapilli (flash_attention)`; with a second kernel for the layers that have a
        sliding window shorter than the row. Attention that is not torch's is named without kernels.
    """
    name, config = attention_of(language), language.config
    heads = int(config.num_attention_heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if name == "eager" or getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} (all scores)"
    if name not in (NAME, "sdpa"):
        return name
    window = getattr(config, "sliding_window", None)
    kinds = {*(getattr(config, "layer_types", None) or ())}
    windows: list[int | None] = [None]
    if window is not None and window < length:
        windows = [window] if kinds <= {"sliding_attention"} else [None, window]
    found = [
        sdpa_backend((1, heads, length, size), (1, keys, length, size), dtype, device, window=one)
        for one in windows
    ]
    return f"{name} ({', '.join(dict.fromkeys(found))})"


def sdpa_backend(
    query: tuple[int, int, int, int],
    key: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    window: int | None = None,
    dropout: float = 0.0,
) -> str:
    """The kernel that torch takes for our attention, by torch's own choice.

    Empty tensors of one row are allocated to ask torch, and freed.

    Args:
        query: [B, H, S, E].
        key: [B, H / groups, S, E], of values too.
        dtype: Of all three.
        device: Of all three.
        window: Newest keys that a query sees; None for all before it.
        dropout: Share of the weights that is dropped.

    Returns:
        `flash_attention`, `efficient_attention`, `cudnn_attention`, or `math`, which is no fused
        kernel and holds all scores.
    """
    rows = [
        torch.empty((1, *shape[1:]), dtype=dtype, device=device, requires_grad=True)
        for shape in (query, key)
    ]
    masked = window is not None and window < query[2]
    seen = visible_square(query[2], window, device) if masked else None
    shares = query[1] > key[1] and shares_keys(rows[0], rows[1], seen)
    asked = rows[0], rows[1] if shares else rows[0]
    return fused_attention_choice(*asked, seen, dropout, shares=shares)
