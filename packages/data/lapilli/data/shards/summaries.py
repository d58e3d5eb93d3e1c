"""What a build's driver wants of shards: their facts and small columns, each asked for once.

The small columns lie beside each shard, in the file of its facts, so that a store is asked once a
shard; those of shards in a folder are read from the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import pyarrow as pa

from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.shards.files import (
    StoredShard,
    facts_name,
    finished_facts,
    open_table,
    stored_shard,
)

__all__ = ["OpenColumns", "Summaries"]

OpenColumns: TypeAlias = Callable[[ShardFacts, pa.Schema, Sequence[str]], pa.Table]
CALLS = 16  # to a store at the same time


class Summaries:
    """The facts and small columns of the shards in an output."""

    def __init__(self, output: Output) -> None:
        """Of the shards in this folder or store; nothing is looked at yet."""
        self.output = output
        self._stored: dict[str, StoredShard] = {}
        self.sizes: dict[str, int] = {}

    def look(self) -> None:
        """List the objects of a store, with their sizes; a folder's files are looked at one by one.

        Raises:
            DataError: The store cannot be listed.
        """
        if isinstance(self.output, RemotePath):
            self.sizes = self.output.sizes()

    def look_at(self, name: str) -> None:
        """Look at one shard of a store, without a listing.

        Raises:
            DataError: The store cannot be read.
        """
        if not isinstance(self.output, RemotePath):
            return
        found = stored_shard(self.output, name)
        size = (self.output / name).size if found is not None else None
        if found is not None and size is not None:
            self._stored[name], self.sizes[name] = found, size

    def fetch(self, names: Iterable[str]) -> None:
        """Read the facts of these shards from a store, one call each and several at a time.

        Raises:
            DataError: The store cannot be read.
        """
        if not isinstance(self.output, RemotePath):
            return
        there = [
            name
            for name in names
            if name not in self._stored and name in self.sizes and facts_name(name) in self.sizes
        ]
        with ThreadPoolExecutor(CALLS) as pool:
            for found in pool.map(lambda name: stored_shard(self.output, name), there):
                if found is not None:
                    self._stored[found.path] = found

    def keep(self, made: ShardFacts) -> ShardFacts:
        """Keep what a task gives of its shard, so that nothing is asked of it; its facts."""
        if not isinstance(made, StoredShard):
            return made
        if isinstance(self.output, RemotePath):
            self._stored[made.path] = made
        return made.facts

    def finished(self, name: str) -> ShardFacts | None:
        """The facts of a shard that is finished; None if it is missing or damaged.

        Those of a store are of the shards that were fetched.

        Raises:
            DataError: A file that cannot be read.
        """
        if not isinstance(self.output, RemotePath):
            return finished_facts(self.output, name)
        found = self._stored.get(name)
        whole = found is not None and found.bytes == self.sizes.get(name)
        return found.facts if found is not None and whole else None

    def table(self, facts: ShardFacts, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
        """Columns of a shard; see `open_table`.

        Raises:
            DataError: The shard is missing or damaged.
        """
        found = self._stored.get(facts.path)
        if found is not None and found == facts and (table := found.table(columns)) is not None:
            return table
        return open_table(self.output, facts, schema, columns)
