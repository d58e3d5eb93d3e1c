"""The shards that a step's samples lie in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.targets import TargetReader
from lapilli.data.io.atomic import ShardFacts

__all__ = ["StepShards"]


@dataclass(frozen=True)
class StepShards:
    """The shards that a run reads, by number: those of tokens, of pixels, of each task's targets.

    Attributes:
        dataset: What is trained on.
        readers: Its targets by task.
    """

    dataset: Dataset
    readers: Mapping[str, TargetReader]

    @property
    def all(self) -> list[ShardFacts]:
        """In the order of their numbers."""
        targets = [reader.facts.shards for reader in self.readers.values()]
        kinds = (self.dataset.manifest.tokens, self.dataset.facts.shards, *targets)
        return [shard for kind in kinds for shard in kind]

    def of(self, samples: NDArray[np.int64], named: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the shards that samples lie in, each once, sorted.

        Args:
            samples: int64 [n].
            named: int64 [m], samples of which the id alone is read.
        """
        tokens = {self.dataset.token_shard(int(one)) for one in (*samples, *named)}
        slots = [self.dataset.image_slots(int(one)) for one in samples]
        found = [np.fromiter(tokens, np.int64, len(tokens))]
        start = len(self.dataset.manifest.tokens)
        for facts in (self.dataset.facts, *(reader.facts for reader in self.readers.values())):
            found += [start + slot.astype(np.int64) // facts.images_per_shard for slot in slots]
            start += len(facts.shards)
        return np.unique(np.concatenate(found))

    def forget_maps(self) -> None:
        """Let go of the shards mapped so far, whose room on the disk they hold."""
        for one in (self.dataset, *self.readers.values()):
            one.forget_maps()
