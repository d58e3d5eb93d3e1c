"""Deterministic pseudo-random draws from (seed, name), independent of machine and order."""

from __future__ import annotations

import hashlib

__all__ = ["draw"]


def draw(seed: int, *names: str) -> int:
    """A number of 64 bits drawn by `seed` for `names`; equal names draw equal numbers.

    A name's number does not depend on what else is drawn, so a choice made by it stays when
    records are added around it.
    """
    text = "\0".join((str(seed), *names)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
