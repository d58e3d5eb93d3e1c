"""What a build is told: sources, mixture and settings. Read from a recipe's YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lapilli.data.errors import DataError
from lapilli.data.images import ImageSpec

__all__ = ["BuildConfig", "SourceConfig"]

# Names become folders, and sample ids are split at their first slash.
NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class SourceConfig:
    """One annotation file and where its images are.

    Attributes:
        name: The source's name in every report, and the first half of its sample ids.
        annotations: Annotation file, relative to the root.
        images: Folder of the images, relative to the root; the keys of the file start there.
        format: Name of a reader in `lapilli.data.sources.SOURCES`, or `package.module:name`.
        aliases: Folder names spelt otherwise in the file than on disk (`{text_vqa: textvqa}`).
    """

    name: str
    annotations: str
    images: str = "."
    format: str = "llava"
    aliases: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        _check_name("sources.name", self.name)


@dataclass(frozen=True)
class BuildConfig:
    """All that decides a dataset's bytes, and where to read and write.

    Attributes:
        root: Folder that holds annotations and images.
        output: Folder of the dataset to write.
        sources: The annotation files, in the order of the dataset.
        tokenizer: Hub name or folder of a tokenizer.
        template: Name of a conversation template, or a YAML file with one.
        views: How images are made square, by name; a tower reads one of them.
        compat: "llava" treats records, texts and pixels as LLaVA does, its mistakes included.
        max_text_length: Ids kept of a record, an image counted as one; 0 keeps all. With `compat:
            llava` 0 stands for 2048, as in LLaVA's scripts.
        max_quarantined: Largest share of records that may be quarantined, 0 to 1. Decides no byte.
        records_per_shard: Records in a token shard.
        shard_bytes: Largest size of an image shard's pixels, in bytes.
        workers: Shards built at the same time; 0 takes every core Ray has. Decides no byte.
    """

    root: str
    output: str
    sources: list[SourceConfig]
    tokenizer: str
    template: str
    views: dict[str, ImageSpec]
    compat: Literal["llava"] | None = None
    max_text_length: int = 0
    max_quarantined: float = 0.01
    records_per_shard: int = 8192
    shard_bytes: int = 64 * 2**20
    workers: int = 0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if not self.sources:
            raise DataError("sources: empty; expected at least one {name, annotations, images}")
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"sources: name {repeated[0]!r} is used twice; give each its own")
        if not self.views:
            raise DataError("views: empty; expected at least one, e.g. clip336: {size: 336, ...}")
        for view in self.views:
            _check_name("views", view)
        if not 0.0 <= self.max_quarantined <= 1.0:
            raise DataError(
                f"max_quarantined: {self.max_quarantined}; expected a share from 0 to 1, "
                "e.g. 0.01 for one record in a hundred"
            )
        for name in ("records_per_shard", "shard_bytes"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}: {getattr(self, name)}; expected at least 1")
        if self.max_text_length < 0:
            raise DataError(
                f"max_text_length: {self.max_text_length}; expected 0 (all of it) or more"
            )
        if self.workers < 0:
            raise DataError(f"workers: {self.workers}; expected 0 (every core) or more")


def _check_name(field_name: str, name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise DataError(
            f"{field_name}: {name!r}; expected letters, digits, '.', '_', '+' and '-' only, the "
            "first a letter or digit; rename it"
        )
