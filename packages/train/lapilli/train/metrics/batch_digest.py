"""Digest the sample ids of a global batch in ten hexadecimal digits.

Every worker adds up what it really trained on; the sums ride in the all-reduce of the loss. They do
not depend on the number of workers, and a sample lost or taken twice changes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

__all__ = ["LANES", "lanes_text", "sample_lanes"]

LANES, BITS = 4, 10  # sums of up to 16,384 samples are whole numbers that fp32 holds exactly


def sample_lanes(batches: Iterable[Iterable[str]]) -> list[float]:
    """Sums over samples of the first 40 bits of their ids' SHA-256, cut into lanes of 10 bits.

    Args:
        batches: Sample ids by micro-batch; the empty id of an empty slot counts nothing.
    """
    sums = [0] * LANES
    for sample_id in (name for batch in batches for name in batch if name):
        bits = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:5], "big")
        for lane in range(LANES):
            sums[lane] += bits >> (lane * BITS) & (1 << BITS) - 1
    return [float(value) for value in sums]


def lanes_text(sums: Sequence[float]) -> str:
    """The global batch's digest from the sums over all workers."""
    lanes = (int(value) % (1 << BITS) << (lane * BITS) for lane, value in enumerate(sums))
    return f"{sum(lanes):010x}"
