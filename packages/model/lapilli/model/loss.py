"""Cross-entropy on the trained positions only, as a sum: the step divides by the global count.

Shape suffix legend: B rows, S tokens, D hidden size, V vocabulary, P trained positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["trained_loss"]

IGNORE_INDEX = -100


def trained_loss(
    hidden: Tensor,
    positions: Tensor,
    targets: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int,
) -> Tensor:
    """Sum of the cross-entropies of the next token at the trained positions.

    No logit is computed for an image slot, a question or padding. The head works on `chunk`
    positions at a time and computes their logits again in backward, so these take chunk x V and
    not P x V.

    Args:
        hidden: [B, S, D], the decoder's output after its last norm.
        positions: int64 [P], flattened positions in B x S.
        targets: int64 [P], the token that follows; -100 weighs nothing.
        head: [V, D], the output embedding.
        bias: [V], its bias, if it has one.
        chunk: Positions at once.

    Returns:
        fp32 scalar.
    """
    hidden_PD = hidden.flatten(0, 1).index_select(0, positions)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part_PD, part_P in zip(hidden_PD.split(chunk), targets.split(chunk), strict=True):
        part: Any = checkpoint(_part_loss, part_PD, part_P, head, bias, use_reentrant=False)
        total = total + part
    return total


def _part_loss(hidden_PD: Tensor, targets_P: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    logits_PV = torch.nn.functional.linear(hidden_PD, head, bias).float()
    return torch.nn.functional.cross_entropy(
        logits_PV, targets_P, ignore_index=IGNORE_INDEX, reduction="sum"
    )
