"""A mixture's worth of conversations from a seed: 665,298 records like LLaVA-1.5's.

How many records each kind has is published with the mixture; how many rounds they have and how
long they are is modelled here, by geometric draws around a mean. The words are a chain over
CPython's own documentation (`pydoc_data.topics`): each follows the one before it as it does there,
so that word frequencies are those of English with some code in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics  # type: ignore[import-untyped]

from lapilli.data.record import ImagePart, Part, Record, TextPart, Turn

__all__ = ["KINDS", "Kind", "conversations"]

CHAIN = 1_000_000  # words to cut conversations from


@dataclass(frozen=True)
class Kind:
    """One part of the mixture; rounds and words are means."""

    name: str
    records: int
    rounds: int
    question: int
    answer: int
    has_image: bool = True


KINDS = (
    Kind(name="llava conversation", records=57_829, rounds=4, question=11, answer=25),
    Kind(name="llava detail", records=23_240, rounds=1, question=12, answer=100),
    Kind(name="llava complex", records=76_643, rounds=1, question=18, answer=110),
    Kind(name="sharegpt", records=40_688, rounds=4, question=40, answer=180, has_image=False),
    Kind(name="vqav2", records=82_783, rounds=5, question=8, answer=1),
    Kind(name="gqa", records=72_140, rounds=13, question=9, answer=1),
    Kind(name="okvqa", records=8_998, rounds=1, question=18, answer=1),
    Kind(name="ocrvqa", records=80_000, rounds=5, question=10, answer=4),
    Kind(name="aokvqa", records=66_160, rounds=1, question=35, answer=1),
    Kind(name="textcaps", records=21_953, rounds=1, question=25, answer=11),
    Kind(name="refcoco", records=48_447, rounds=6, question=18, answer=8),
    Kind(name="vg", records=86_417, rounds=8, question=18, answer=6),
)


def conversations(count: int, seed: int) -> Iterator[Record]:
    """`count` records, their kinds drawn in the mixture's proportions; the same for a seed."""
    rng = random.Random(seed)
    words = _chain(rng)
    kinds = rng.choices(KINDS, [kind.records for kind in KINDS], k=count)
    for number, kind in enumerate(kinds):
        turns: list[Turn] = []
        for place in range(_around(rng, kind.rounds)):
            asked: list[Part] = [TextPart(f"{_cut(rng, words, kind.question)}?")]
            if kind.has_image and place == 0:
                asked = [ImagePart(0), TextPart("\n"), *asked]
            turns.append(Turn("user", tuple(asked)))
            turns.append(Turn("assistant", (TextPart(f"{_cut(rng, words, kind.answer)}."),)))
        images = (f"{number}.jpg",) * kind.has_image
        yield Record(
            record_id=str(number),
            sample_id=f"corpus/{number}",
            source="corpus",
            turns=tuple(turns),
            images=images,
        )


def _around(rng: random.Random, mean: int) -> int:
    """A geometric draw of 1 or more, with that mean, at most ten times it."""
    return 1 if mean == 1 else min(10 * mean, 1 + int(rng.expovariate(1 / (mean - 0.5))))


def _cut(rng: random.Random, words: list[str], mean: int) -> str:
    length = _around(rng, mean)
    start = rng.randrange(len(words) - length)
    return " ".join(words[start : start + length])


def _chain(rng: random.Random) -> list[str]:
    """A random walk over the documentation's words."""
    documentation: dict[str, str] = topics
    text = " ".join(documentation[name] for name in sorted(documentation)).split()
    followers: dict[str, list[str]] = {}
    for word, follower in zip(text, [*text[1:], text[0]], strict=True):
        followers.setdefault(word, []).append(follower)
    walk = [text[0]]
    while len(walk) < CHAIN:
        walk.append(rng.choice(followers[walk[-1]]))
    return walk
