"""Describe a build before its first pixel is decoded: verdicts, and every shard in order.

A plan is a value: nothing in it opens a file or computes a shard's description again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from lapilli.data.config import BuildConfig, TargetConfig
from lapilli.data.images.codecs import Codecs
from lapilli.data.images.encodings import Encoding
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.planning.incremental import Previous, TokenGroup
from lapilli.data.planning.parts.entries import Entries
from lapilli.data.planning.parts.entry_views import PackedRecords
from lapilli.data.planning.parts.image_slots import ImageSlots
from lapilli.data.planning.shard_task import ImageTask, TargetTask, Task, TokenTask
from lapilli.data.sources.tally import Tally
from lapilli.data.text.encode import TokenizerFacts
from lapilli.data.text.templates import Template

__all__ = ["BuildPlan", "TargetPlan", "ViewPlan"]


@dataclass(frozen=True)
class ViewPlan:
    """One view of a build.

    Attributes:
        spec: How its images are made square.
        codecs: What decodes and resizes them.
        encoding: How its pixels are stored.
        images_per_shard: Images of each shard but the last.
        compared: By shard, of how many images the error of mode `fast` is measured.
        shards: In order: the shards to build, and the facts of those that stay as they are.
    """

    spec: ImageSpec
    codecs: Codecs
    encoding: Encoding
    images_per_shard: int
    compared: tuple[int, ...]
    shards: tuple[ImageTask | ShardFacts, ...] = ()

    def tasks(self) -> Iterator[ImageTask]:
        """The shards that are to be there, finished or not."""
        return (shard for shard in self.shards if isinstance(shard, ImageTask))


@dataclass(frozen=True)
class TargetPlan:
    """A teacher's features of a build.

    Attributes:
        target: Its settings; a folder of weights is absolute.
        made: Digest of all that decides its features, but the images.
        images_per_shard: Images of each shard but the last.
        shards: In order, as those of a view.
        weights: `TargetFacts.weights`, of a hub name without its revision.
        settings: `TargetFacts.settings`.
    """

    target: TargetConfig
    made: str
    images_per_shard: int
    shards: tuple[TargetTask | ShardFacts, ...]
    weights: str
    settings: str

    def tasks(self) -> Iterator[TargetTask]:
        """The shards that are to be there, finished or not."""
        return (shard for shard in self.shards if isinstance(shard, TargetTask))


@dataclass(frozen=True)
class BuildPlan:
    """Everything known before the first pixel is decoded.

    Attributes:
        config: The settings. `root` and a tokenizer's folder are absolute: workers stand elsewhere.
        entries: Every element of every source with its verdict so far, in order.
        slots: The distinct images of the records still kept, by slot.
        repairs: How many keys were mended, by kind.
        repaired: Every key that was mended, with the file it is read from; see `REPAIRS_SCHEMA`.
        tallies: By source, the fields that nothing reads and the members of archives.
        tokenizer: Facts of the tokenizer.
        template: The template.
        views: Every view to make, `original` among them if it is.
        targets: Every teacher's features to make.
        token_groups: The rows of each token shard.
        token_shards: In the order of their groups: the shards to build, and the facts of those that
            stay as they are. An entry quarantined before decoding is in none that is built.
        previous: The dataset that the output holds, if there is one.
        digests: Each input and setting, as short text or a digest, for naming what changed.
    """

    config: BuildConfig
    entries: Entries
    slots: ImageSlots
    repairs: dict[str, int]
    repaired: pa.Table
    tallies: dict[str, Tally]
    tokenizer: TokenizerFacts
    template: Template
    views: dict[str, ViewPlan]
    targets: dict[str, TargetPlan]
    token_groups: list[TokenGroup]
    token_shards: tuple[TokenTask | ShardFacts, ...]
    previous: Previous | None
    digests: dict[str, str]

    @property
    def image_ids(self) -> list[str]:
        """The identities of the images in use, by slot."""
        return self.slots.used_names().to_pylist()

    def token_tasks(self) -> list[TokenTask]:
        """The token shards that are to be there, finished or not."""
        return [shard for shard in self.token_shards if isinstance(shard, TokenTask)]

    def image_tasks(self) -> list[ImageTask]:
        """The image shards of every view that are to be there, finished or not."""
        return [task for view in self.views.values() for task in view.tasks()]

    def target_tasks(self) -> list[TargetTask]:
        """The shards of every teacher that are to be there, finished or not."""
        return [task for target in self.targets.values() for task in target.tasks()]

    def tasks(self) -> list[Task]:
        """Every shard that is to be there, finished or not."""
        return [*self.token_tasks(), *self.image_tasks(), *self.target_tasks()]

    def kept_packed(self) -> PackedRecords:
        """The kept records, packed; `TokenGroup.kept` counts them."""
        return PackedRecords(self.entries, self.entries.kept)
