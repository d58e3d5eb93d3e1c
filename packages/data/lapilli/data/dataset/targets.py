"""Read teachers' features of a dataset by image slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lapilli.data.dataset.dataset import MOST_MAPS, Dataset, binary_column, check_sizes, held_files
from lapilli.data.errors import DataError
from lapilli.data.shards.files import open_table
from lapilli.data.shards.manifest import Manifest, TargetFacts
from lapilli.data.shards.schemas import OK, TARGET_SCHEMA
from lapilli.data.shards.target_rows import stored_rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["TargetReader", "open_targets", "require_target"]


@dataclass(frozen=True)
class TargetReader:
    """One teacher's features.

    Attributes:
        dataset: Their dataset.
        name: Their name there.
    """

    dataset: Dataset
    name: str

    @property
    def facts(self) -> TargetFacts:
        """What the manifest says of them."""
        return self.dataset.manifest.targets[self.name]

    @cached_property
    def _tables(self) -> Callable[[int], Any]:
        return lru_cache(MOST_MAPS)(self._open)

    def _open(self, number: int) -> tuple[Any, Any, Any]:
        facts = self.facts.shards[number]
        with held_files(self.dataset.path, self.dataset.mirror, facts) as folder:
            table = open_table(folder, facts, TARGET_SCHEMA)
        is_there = np.array([status == OK for status in table["status"].to_pylist()], np.bool_)
        return is_there, binary_column(table, "features"), binary_column(table, "scales")

    def forget_maps(self) -> None:
        """As `Dataset.forget_maps`."""
        self.__dict__.pop("_tables", None)

    def read(
        self, slot: int
    ) -> tuple[NDArray[np.int8] | NDArray[np.uint16], NDArray[np.float32]] | None:
        """What is stored of an image: numbers [rows, width], and scales fp32 [rows].

        Views into the memory map. None for an image of which the teacher gave nothing.

        Raises:
            DataError: A row of another size than the manifest says.
        """
        number, row = divmod(slot, self.facts.images_per_shard)
        is_there, features, scales = self._tables(number)
        if not is_there[row]:
            return None
        found = [values[offsets[row] : offsets[row + 1]] for offsets, values in (features, scales)]
        try:
            return stored_rows(found[0], found[1], self.facts.rows, self.facts.width)
        except ValueError as error:
            raise DataError(
                f"{self.dataset.path / self.facts.shards[number].path}: row {row} has {error}; run "
                "preprocess again, it rebuilds it"
            ) from None


def require_target(manifest: Manifest, path: Path, name: str) -> None:
    """Reject a name that a dataset has no features under.

    Raises:
        DataError: Says which it has.
    """
    if name not in manifest.targets:
        has = ", ".join(manifest.targets) or "none"
        raise DataError(
            f"targets: {name!r} is not in {path}, which has {has}; preprocess with "
            f"--incremental and targets.{name}"
        )


def open_targets(dataset: Dataset, name: str) -> TargetReader:
    """A teacher's features of a dataset.

    Raises:
        DataError: It has none of this name, not of every image, or a file is missing or cut.
    """
    require_target(dataset.manifest, dataset.path, name)
    shards = dataset.manifest.targets[name].shards
    counts = [sum(shard.rows for shard in kind) for kind in (shards, dataset.facts.shards)]
    if counts[0] != counts[1]:
        raise DataError(
            f"targets: {name!r} of {dataset.path} has {counts[0]} rows for {counts[1]} images; "
            "preprocess again into another --output"
        )
    if dataset.mirror:
        dataset.mirror.check_sizes(shards)
    else:
        check_sizes(dataset.path, shards)
    return TargetReader(dataset, name)
