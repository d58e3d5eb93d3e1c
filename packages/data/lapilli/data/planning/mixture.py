"""Split off held-out records and compute how often each record occurs in an epoch.

Pure. Draws come from `draw` of a record's name, not of its position, so they do not change when
records are added, and a smaller share is a subset of a larger one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lapilli.data.config import MixtureConfig
from lapilli.data.errors import DataError
from lapilli.data.seeded import draw
from lapilli.data.shards.schemas import HELD_OUT, TRAIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Blend", "Pool", "blend", "check_sources", "num_held_out"]


@dataclass(frozen=True)
class Pool:
    """The records there are to choose from, n of them.

    Attributes:
        sample_ids: Their names.
        sources: int64 [n], the source of each, by its place in the recipe.
        images: The image ids of each.
        tokens: int64 [n], text tokens of each.
        image_counts: int64 [n], images of each, where they are known without `images`.
    """

    sample_ids: Sequence[str]
    sources: NDArray[np.int64]
    images: Sequence[Sequence[str]]
    tokens: NDArray[np.int64]
    image_counts: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Blend:
    """What becomes of each record of a pool.

    Attributes:
        held_out: Bool [n].
        repeats: int32 [n], how often a record occurs in an epoch of its split; 1 if held out.
        facts: For the manifest: by source, records kept, held out and used, and actual shares.
    """

    held_out: NDArray[np.bool_]
    repeats: NDArray[np.int32]
    facts: dict[str, Any]

    @property
    def splits(self) -> pa.Array:
        """String [n], the name of each record's split."""
        return pa.array([TRAIN, HELD_OUT]).take(pa.array(self.held_out.astype(np.int8)))


def check_sources(config: MixtureConfig, kept: Mapping[str, int]) -> None:
    """Stop where a source that the mixture asks for has nothing to give.

    Args:
        config: The mixture.
        kept: Records kept so far, by source.

    Raises:
        DataError: Names the source.
    """
    asked = {**config.epochs, **config.counts, **config.weights}
    empty = next((name for name, much in asked.items() if much > 0 and not kept.get(name)), None)
    if empty is not None:
        raise _nothing_in(empty)


def num_held_out(config: MixtureConfig, kept: int) -> int:
    """Records that are held out, of so many that are kept.

    Raises:
        DataError: All of them or more.
    """
    asked = config.held_out
    found = round(asked * kept) if asked < 1 else int(asked)
    if found and found >= kept:
        raise DataError(
            f"mixture.held_out: {asked:g} of {kept} kept records; expected fewer, so that some "
            "are left to train on"
        )
    return found


def blend(pool: Pool, config: MixtureConfig, names: Sequence[str]) -> Blend:
    """Hold out, then give each source its part of the rest.

    Args:
        pool: The kept records.
        config: The mixture.
        names: The sources in the recipe's order.

    Raises:
        DataError: A source has nothing to give, or nothing is left to train on.
    """
    held = _hold_out(pool, config)
    images = pool.image_counts
    if images is None:
        images = np.array([len(ids) for ids in pool.images], dtype=np.int64)
    tokens = pool.tokens + images * config.image_tokens
    sizes = tokens if config.unit == "tokens" else np.ones_like(tokens)
    source = pool.sources
    rows = [np.flatnonzero((source == number) & ~held) for number in range(len(names))]
    there = {name: int(sizes[own].sum()) for name, own in zip(names, rows, strict=True)}
    targets = _targets(config, there)
    repeats = held.astype(np.int32)
    for name, own in zip(names, rows, strict=True):
        repeats[own] = _repeats(pool, own, sizes[own], targets[name], config.seed)
    if not repeats[~held].any():
        raise DataError("mixture: no record is left to train on; lower held_out, raise the shares")
    facts = _facts(config, names, source, held, repeats, tokens)
    return Blend(held, repeats, facts)


def _targets(config: MixtureConfig, there: Mapping[str, int]) -> dict[str, int]:
    """How much of each source, in the mixture's unit; `there` is one epoch of each."""
    most = {name: config.epochs.get(name, 1.0) * size for name, size in there.items()}
    if not config.weights:
        wanted = {name: config.counts.get(name, round(size)) for name, size in most.items()}
    else:
        whole = sum(config.weights.values())
        shares = {name: weight / whole for name, weight in config.weights.items() if weight > 0}
        # The largest blend in which no source occurs more often than its epochs.
        total = config.total or int(min(most[name] / share for name, share in shares.items()))
        wanted = dict.fromkeys(there, 0) | _divide(total, shares)
    for name, much in wanted.items():
        if much and not there[name]:
            raise _nothing_in(name)
    return wanted


def _divide(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `total`, each less than 1 off its share of it."""
    parts = {name: int(total * share) for name, share in shares.items()}
    rest = sorted(shares, key=lambda name: parts[name] - total * shares[name])
    for name in rest[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _repeats(
    pool: Pool, own: NDArray[np.int64], sizes: NDArray[np.int64], target: int, seed: int
) -> NDArray[np.int32]:
    """int32 [len(own)]: as many whole epochs as fit, and of the rest those drawn first.

    By records the sum is the target; by tokens it is the nearest that the drawn order gives, off
    by at most half of its longest record.
    """
    if not target:
        return np.zeros(len(own), np.int32)
    whole, rest = divmod(target, int(sizes.sum()))
    repeats = np.full(len(own), whole, np.int32)
    if rest:
        names = map(pool.sample_ids.__getitem__, own.tolist())
        drawn = np.fromiter((draw(seed, "blend", name) for name in names), np.uint64, len(own))
        order = np.argsort(drawn, kind="stable")
        reached = np.concatenate([[0], np.cumsum(sizes[order])])
        repeats[order[: int(np.abs(reached - rest).argmin())]] += 1
    return repeats


def _hold_out(pool: Pool, config: MixtureConfig) -> NDArray[np.bool_]:
    """Bool [n]: the groups of records drawn first, as long as they fit into `held_out`."""
    number = len(pool.sample_ids)
    left = num_held_out(config, number)
    if not left:
        return np.zeros(number, np.bool_)
    groups = _groups(pool)
    chosen: set[str] = set()
    counts: Counter[str] = Counter(groups)
    for group in sorted(counts, key=lambda name: draw(config.seed, "held out", name)):
        if counts[group] <= left:
            chosen.add(group)
            left -= counts[group]
        if not left:
            break
    return np.array([group in chosen for group in groups], np.bool_)


def _groups(pool: Pool) -> list[str]:
    """A name for each record, the same for records that share an image, also through others.

    It is the first of the group's image ids in the alphabet, or a record's own id without images.
    """
    parents: dict[str, str] = {}

    def top(name: str) -> str:
        while (above := parents.setdefault(name, name)) != name:
            parents[name] = parents[above]
            name = above
        return name

    for images in pool.images:
        for other in images[1:]:
            first, second = sorted((top(images[0]), top(other)))
            parents[second] = first
    return [
        f"image {top(images[0])}" if images else f"record {sample_id}"
        for sample_id, images in zip(pool.sample_ids, pool.images, strict=True)
    ]


def _facts(
    config: MixtureConfig,
    names: Sequence[str],
    source: NDArray[np.int64],
    held: NDArray[np.bool_],
    repeats: NDArray[np.int32],
    tokens: NDArray[np.int64],
) -> dict[str, Any]:
    """The resulting blend. `share` is in the mixture's unit, `epochs` in records."""
    used = np.where(held, 0, repeats).astype(np.int64)
    by_source: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        own = source == number
        trained = int((own & ~held).sum())
        by_source[name] = {
            "kept": int(own.sum()),
            "held_out": int((own & held).sum()),
            "used": int((own & (used > 0)).sum()),
            "records": int(used[own].sum()),
            "tokens": int((used * tokens)[own].sum()),
            "epochs": int(used[own].sum()) / trained if trained else 0.0,
        }
    total = sum(facts[config.unit] for facts in by_source.values())
    for facts in by_source.values():
        facts["share"] = facts[config.unit] / total if total else 0.0
    return {
        "unit": config.unit,
        "records": int(used.sum()),
        "tokens": int((used * tokens).sum()),
        "held_out": int(held.sum()),
        "sources": by_source,
    }


def _nothing_in(name: str) -> DataError:
    return DataError(
        f"mixture: no record of source {name} is kept and free to train on; expected at least "
        "one; fix the source or remove its share"
    )
