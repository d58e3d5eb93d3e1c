"""Rows that hold several samples which do not see each other: trees of branches behind a prefix.

Shape suffix legend: B rows, S tokens of a row (Q as queries, K as keys).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lapilli.model.errors import ModelError

__all__ = ["NAME", "Trees", "check_trees", "mask_count"]

NAME = "lapilli"  # of the attention that honours them


class Trees:
    """Which keys each query of a batch sees; made once a forward, and never read by the host.

    A query sees a key iff the key is not later in the row, of the same tree, and of branch 0 (the
    tree's shared prefix) or of the query's own branch. A sliding window counts positions, which go
    on from the prefix in every branch.
    """

    def __init__(self, tree_ids: Tensor, branch_ids: Tensor, position_ids: Tensor) -> None:
        """Remember the ids.

        Args:
            tree_ids: int32 [B, S]; 0 is padding.
            branch_ids: int32 [B, S]; 0 is a tree's shared prefix, or all of a tree without one.
            position_ids: int64 [B, S], each sample's own.
        """
        self.tree_ids, self.branch_ids, self.position_ids = tree_ids, branch_ids, position_ids
        self._seen: dict[int | None, Tensor] = {}
        self._biases: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self._blocks: dict[int | None, Any] = {}

    def on_positions(self) -> Tensor:
        """The position ids, with the trees on them: some layers hand on nothing else."""
        carrier: Any = self.position_ids.view_as(self.position_ids)  # of its own: no cycle
        carrier.trees = self
        return carrier

    def seen(self, window: int | None = None) -> Tensor:
        """Bool [B, 1, Q, K]; every query sees at least itself, padding too.

        Args:
            window: Newest positions that a query sees, its own among them; None for all.
        """
        if window not in self._seen:
            self._seen[window] = self._compare(window)
        return self._seen[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, Q, K] to be added to scores: 0 where a query sees a key, else -inf.

        Of one static shape. All layers share it; of a boolean mask torch makes one a layer, and
        keeps it for backward.

        Args:
            window: As for `seen`.
            dtype: Of the queries.
        """
        key = window, dtype
        if key not in self._biases:
            seen = self._compare(window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._biases[key] = bias.masked_fill_(~seen, -torch.inf)
        return self._biases[key]

    def _compare(self, window: int | None) -> Tensor:
        trees, branches, positions = self.tree_ids, self.branch_ids, self.position_ids
        keys = branches.unsqueeze(1)
        seen_BQK = (keys == 0) | (keys == branches.unsqueeze(2))
        seen_BQK &= trees.unsqueeze(1) == trees.unsqueeze(2)
        places = torch.arange(trees.shape[1], device=trees.device)
        seen_BQK &= places.unsqueeze(0) <= places.unsqueeze(1)
        if window is not None:
            seen_BQK &= positions.unsqueeze(2) - positions.unsqueeze(1) < window
        return seen_BQK.unsqueeze(1)

    def blocks(self, window: int | None = None) -> Any:
        """The same as a `BlockMask` of torch's FlexAttention: [B, 1, Q, K], whole blocks skipped.

        Args:
            window: As for `seen`.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._blocks:
            trees, branches, positions = self.tree_ids, self.branch_ids, self.position_ids

            def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                del head
                branch = branches[row, key]
                seen = (query >= key) & (trees[row, query] == trees[row, key])
                seen &= (branch == 0) | (branch == branches[row, query])
                if window is not None:
                    seen &= positions[row, query] - positions[row, key] < window
                return seen

            rows, length = trees.shape
            self._blocks[window] = create_block_mask(
                is_seen, rows, None, length, length, device=trees.device
            )
        return self._blocks[window]


def check_trees(attention: str) -> None:
    """Refuse rows of several samples to a decoder that would let them see each other.

    Args:
        attention: What it was built with.

    Raises:
        ModelError: It cannot have them.
    """
    if attention != NAME:
        raise ModelError(
            f"share_images, pack: language.attention is {attention}, under which samples of a row "
            f"would see each other; set language.attention: {NAME}, or turn both off"
        )


def mask_count(settings: Any, length: int) -> int:
    """Dense masks that a decoder's layers need among them: one a window, one for all keys.

    Args:
        settings: The decoder's config.
        length: Tokens of a row; a window as long masks nothing of its own.
    """
    window = getattr(settings, "sliding_window", None)
    kinds = {*(getattr(settings, "layer_types", None) or ())}
    if window is None or window >= length or kinds <= {"sliding_attention"}:
        return 1
    return 2
