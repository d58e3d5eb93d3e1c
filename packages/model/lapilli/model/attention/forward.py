"""The attention that transformers' decoders call by our name.

transformers builds no mask for an attention name that its mask interface does not know, and so does
not inspect the positions for packed sequences, which would read the device in every forward.
Causality and sliding windows are applied here instead, and soft-capping, which torch's fused
attention lacks.

Shape suffix legend: B rows, H heads, Q queries, K keys, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.model.attention.masks import visible_square
from lapilli.model.attention.trees import NAME, Trees
from lapilli.model.errors import ModelError
from lapilli.model.transformers_internals import attention_of, supported_attention

__all__ = [
    "NAME",
    "attend",
    "holds_all_scores",
    "refuse_masks",
    "register",
    "shares_keys",
    "with_masks",
]

# What transformers hands through that does not change what is computed here: rows are whole, and
# positions count from 0 in each.
WITHOUT_EFFECT = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "return_dict", "position_embeddings", "output_router_logits",
    }
)  # fmt: skip
WIDEST_GROUPED = 256  # of a head, for kernels that share keys and values among heads


def register() -> None:
    """Register the attention with transformers under its name. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def refuse_masks(language: Any) -> None:
    """Refuse masks of padding to a model that was built with our attention, which drops them.

    Args:
        language: A causal language model of transformers.
    """
    language.get_decoder().register_forward_pre_hook(_refuse_mask, with_kwargs=True)


def _refuse_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args
    if kwargs.get("attention_mask") is not None and attention_of(module) == NAME:
        raise ModelError(
            f"language.attention: {NAME} takes no attention_mask, rows are padded on the right; "
            "call the model inside lapilli.model.attention.forward.with_masks, or set sdpa"
        )


def holds_all_scores(language: Any) -> bool:
    """Whether a language model's attention computes the scores of all pairs, and keeps them."""
    chosen = attention_of(language)
    capped = getattr(language.config, "attn_logit_softcapping", None) is not None
    return chosen == "eager" or (chosen == NAME and capped)


@contextmanager
def with_masks(language: Any) -> Generator[None]:
    """Let a language model use transformers' own attention, with masks and a cache of keys.

    Generation pads on the left and asks for one token at a time. A model that was built with
    another attention than ours is left as it is.
    """
    if attention_of(language) != NAME:
        yield
        return
    supported = supported_attention(type(language))
    language.set_attn_implementation("sdpa" if "sdpa" in supported else "eager")
    try:
        yield
    finally:
        language.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    trees: Trees | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention of rows padded on the right, each one sample or several (`trees`).

    Several samples run through a dense mask of one static shape, which a CPU and an HPU take, on
    CUDA through FlexAttention, which skips what no query sees.

    Args:
        module: The layer's attention module.
        query: [B, H, Q, E].
        key: [B, H / groups, K, E], K = Q.
        value: [B, H / groups, K, E].
        attention_mask: None.
        dropout: Share of the weights that is dropped.
        scaling: Multiplies the products; None for 1 / sqrt(E).
        is_causal: True; None for what the module says.
        sliding_window: Newest keys that a query sees, its own among them.
        softcap: Scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118).
        trees: The samples of each row; None for one a row.
        unused: Other arguments that transformers passes to an attention.

    Returns:
        [B, Q, H, E], and no weights.

    Raises:
        ModelError: An argument that would change the result and is not supported.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    _check(query, key, attention_mask, is_causal=causal, unused=unused)
    trees = trees or getattr(unused.get("position_ids"), "trees", None)
    length = query.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    groups = query.shape[1] // key.shape[1]
    if softcap is not None:
        seen = visible_square(length, window, query.device) if trees is None else trees.seen(window)
        result = _capped(query, key, value, groups, dropout, scaling, seen, softcap)
        return result.transpose(1, 2).contiguous(), None
    if trees is not None and query.device.type == "cuda" and not dropout:
        return _flex(query, key, value, scaling, trees.blocks(window)), None
    seen = _seen(length, window, trees, query)
    shares = groups > 1 and shares_keys(query, value, seen)
    if groups > 1 and not shares:
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    result = nn.functional.scaled_dot_product_attention(
        query, key, value, seen,
        dropout_p=dropout, is_causal=seen is None, scale=scaling, enable_gqa=shares,
    )  # fmt: skip
    return result.transpose(1, 2).contiguous(), None


def _seen(length: int, window: int | None, trees: Trees | None, query: Tensor) -> Tensor | None:
    """What a query sees, bool or to be added, for all heads; None where that is all before it."""
    if trees is not None:
        return trees.bias(window, query.dtype)
    return None if window is None else visible_square(length, window, query.device)


def _flex(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, blocks: Any) -> Tensor:
    """[B, Q, H, E] by torch's FlexAttention, compiled once for all layers of a shape."""
    result = flex_attention()(
        query, key, value, block_mask=blocks, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return result.transpose(1, 2).contiguous()


@cache
def flex_attention() -> Callable[..., Tensor]:
    """Torch's FlexAttention, compiled; without compiling it would hold all scores."""
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=False)


def shares_keys(query: Tensor, value: Tensor, seen: Tensor | None) -> bool:
    """Whether a fused kernel takes fewer heads of keys than of queries; else they are repeated.

    On CUDA flash and cuDNN do, which take neither a mask nor fp32; torch's own fallback would hold
    all scores.
    """
    if seen is not None or query.shape[-1] != value.shape[-1] or query.shape[-1] > WIDEST_GROUPED:
        return False
    return query.device.type == "cpu" or query.dtype in (torch.bfloat16, torch.float16)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: int,
    dropout: float,
    scaling: float | None,
    seen: Tensor,
    softcap: float,
) -> Tensor:
    """[B, H, Q, E] through all scores, as no fused kernel of torch bounds them."""
    key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHQK = torch.matmul(query, key.transpose(2, 3)) * factor
    scores_BHQK = torch.tanh(scores_BHQK / softcap) * softcap
    scores_BHQK = scores_BHQK.masked_fill(~seen, -torch.inf)
    weights_BHQK = torch.softmax(scores_BHQK, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(nn.functional.dropout(weights_BHQK, dropout), value)


def _check(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool,
    unused: dict[str, Any],
) -> None:
    unknown = sorted(
        name for name, given in unused.items() if given is not None and name not in WITHOUT_EFFECT
    )
    if attention_mask is not None:
        unknown.append("attention_mask")
    if not is_causal:
        unknown.append("attention to later tokens")
    if query.shape[2] != key.shape[2]:
        unknown.append("a cache of keys")
    if unknown:
        raise ModelError(
            f"language.attention: {NAME} does not know {', '.join(unknown)}; set sdpa or eager"
        )
