"""Cut a global batch into micro-batches of at most so many tokens, padding among them.

A micro-batch has as many rows as its longest allows: short ones fill a device as well. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["budget_chunks"]

SHARES = 256  # of the budget that an even cut is sought among


def budget_chunks(
    lengths: NDArray[np.int64], limits: NDArray[np.int64], world_size: int
) -> list[list[NDArray[np.int64]]]:
    """Share rows among ranks in as few micro-steps as their limits allow, filled evenly.

    As in `assign`, micro-step k of all ranks holds neighbours of the rows sorted by length, the
    longest first, and the ranks take turns in having the longer ones.

    Args:
        lengths: int64 [n], tokens of the global batch's rows.
        limits: int64 [n], rows that a micro-batch may have of which this one is the longest, at
            least 1; never fewer for a shorter row.
        world_size: Ranks.

    Returns:
        By rank and micro-step, places in `lengths`; every rank has as many micro-steps, of which
        the last may be empty.
    """
    order = np.argsort(-lengths, kind="stable")
    most = limits[order]
    micro_steps = max(1, -(-len(_cut(most)) // world_size))
    low, high = 0, SHARES  # the least share of every limit under which no micro-step is added
    while low + 1 < high:
        middle = (low + high) // 2
        fits = len(_cut(most * middle // SHARES)) <= micro_steps * world_size
        low, high = (low, middle) if fits else (middle, high)
    chunks = np.split(order, np.cumsum(_cut(most * high // SHARES)))[:-1]
    chunks += [order[:0]] * (micro_steps * world_size - len(chunks))
    steps = [chunks[k * world_size : (k + 1) * world_size] for k in range(micro_steps)]
    return [[s[rank if k % 2 == 0 else -1 - rank] for k, s in enumerate(steps)]
            for rank in range(world_size)]  # fmt: skip


def _cut(limits: NDArray[np.int64]) -> list[int]:
    """Rows of each micro-batch, each as large as the limit of its first row, at least 1."""
    sizes: list[int] = []
    first, count = 0, len(limits)
    while first < count:
        sizes.append(min(max(1, int(limits[first])), count - first))
        first += sizes[-1]
    return sizes
