"""The build's plan: records and verdicts and codecs to shard tasks. Pure but for the reading.

The plan alone decides every shard's bytes: which records, which images, in which order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lapilli.data.checks import read_entries
from lapilli.data.codecs import Codecs, resolve_codecs
from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.images import ImageSpec
from lapilli.data.manifest import FORMAT, digest
from lapilli.data.mounts import FolderMount, Located
from lapilli.data.record import Entry, Record, Verdict
from lapilli.data.templates import Template, get_template
from lapilli.data.tokenize import TokenizerFacts, load_tokenizer, tokenizer_facts

__all__ = ["BuildPlan", "ImageTask", "TokenTask", "plan_build", "quarantine_error"]


@dataclass(frozen=True)
class ImageTask:
    """One image shard: decode these files below `root`, in this order."""

    name: str
    root: str
    image_ids: tuple[str, ...]
    spec: ImageSpec
    codecs: Codecs


@dataclass(frozen=True)
class TokenTask:
    """One token shard: tokenise these records, in this order.

    `image_ids` are those of the records' images, resolved; `fingerprint` is that of the tokenizer
    the driver loaded from the same name.
    """

    name: str
    records: tuple[Record, ...]
    image_ids: tuple[tuple[str, ...], ...]
    tokenizer: str
    fingerprint: str
    template: Template


@dataclass(frozen=True)
class BuildPlan:
    """Everything known before the first pixel is decoded.

    Attributes:
        entries: Every element of every source with its verdict so far, in order.
        image_ids: The distinct images of the records still kept; their place is their slot.
        slots: Slot by image id.
        entry_images: Image ids of each entry, () for one not kept.
        repairs: How many keys were mended, by kind.
        tokenizer: Facts of the tokenizer.
        template: The template.
        codecs: Codecs by view.
        digests: Digest of each input and setting, for noticing what changed.
    """

    config: BuildConfig
    entries: list[Entry]
    image_ids: list[str]
    slots: dict[str, int]
    entry_images: list[tuple[str, ...]]
    repairs: dict[str, int]
    tokenizer: TokenizerFacts
    template: Template
    codecs: dict[str, Codecs]
    digests: dict[str, str]

    def images_per_shard(self, view: str) -> int:
        """How many images of a view fit into `shard_bytes`."""
        return max(1, self.config.shard_bytes // _pixel_bytes(self.config.views[view]))

    def pixel_bytes(self) -> int:
        """Bytes of all pixels of all views: the disk the build needs, text aside."""
        return sum(_pixel_bytes(spec) for spec in self.config.views.values()) * len(self.image_ids)

    def image_tasks(self) -> list[ImageTask]:
        """The image shards of every view."""
        return [
            ImageTask(
                f"images/{view}/{number:05d}.arrow", self.config.root, ids, spec, self.codecs[view]
            )
            for view, spec in self.config.views.items()
            for number, ids in enumerate(_cut(self.image_ids, self.images_per_shard(view)))
        ]

    def token_tasks(self) -> list[TokenTask]:
        """The token shards; an entry quarantined before decoding is in none."""
        kept = [
            (entry.record, images)
            for entry, images in zip(self.entries, self.entry_images, strict=True)
            if entry.verdict.kept and entry.record is not None
        ]
        folder = f"tokens/{digest([self.tokenizer.fingerprint, asdict(self.template)])[:12]}"
        return [
            TokenTask(
                f"{folder}/{number:05d}.arrow",
                tuple(record for record, _ in rows),
                tuple(images for _, images in rows),
                self.config.tokenizer,
                self.tokenizer.fingerprint,
                self.template,
            )
            for number, rows in enumerate(_cut(kept, self.config.records_per_shard))
        ]


def _pixel_bytes(spec: ImageSpec) -> int:
    return spec.size * spec.size * 3


def _cut(items: list[Any], size: int) -> list[tuple[Any, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def plan_build(config: BuildConfig) -> BuildPlan:
    """Read and check every source, find every image, fix tokenizer, template and codecs.

    Raises:
        DataError: A folder, file, tokenizer or template that is missing or wrong; nothing kept;
            more quarantined than `max_quarantined`.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"root: folder {root} does not exist; pass --root with the data's folder")
    template = get_template(config.template)
    tokenizer = tokenizer_facts(load_tokenizer(config.tokenizer))
    codecs = {view: resolve_codecs(spec.resizer) for view, spec in config.views.items()}
    entries: list[Entry] = []
    entry_images: list[tuple[str, ...]] = []
    located: dict[str, Located] = {}
    repairs: Counter[str] = Counter()
    for source in config.sources:
        mount = FolderMount(root, source.images, source.aliases)
        for entry in read_entries(source, root):
            entry_images.append(_locate_all(entry, mount, located))
            entries.append(entry)
        repairs.update(mount.repairs)
    check_quarantined(entries, config.max_quarantined)
    digests = _digests(config, entries, located, tokenizer, template, codecs)
    return BuildPlan(
        config, entries, list(located), {image_id: i for i, image_id in enumerate(located)},
        entry_images, dict(repairs), tokenizer, template, codecs, digests,
    )  # fmt: skip


def _locate_all(entry: Entry, mount: FolderMount, located: dict[str, Located]) -> tuple[str, ...]:
    """Resolve an entry's images; one that cannot be found is the entry's verdict."""
    if entry.record is None or not entry.verdict.kept:
        return ()
    found: list[Located] = []
    for key in entry.record.images:
        place = mount.locate(key)
        if isinstance(place, Verdict):
            entry.verdict = place
            return ()
        found.append(place)
    for place in found:
        located.setdefault(place.image_id, place)
    return tuple(place.image_id for place in found)


def check_quarantined(entries: Iterable[Entry], most: float) -> None:
    """Stop a build that goes wrong.

    Raises:
        DataError: Nothing is kept, or more than the share `most` is quarantined; names the first.
    """
    listed = list(entries)
    bad = [entry for entry in listed if not entry.verdict.kept]
    if not listed:
        raise DataError("sources: no record at all; expected at least one in the annotation files")
    if len(bad) == len(listed):
        raise quarantine_error(bad, len(listed), "nothing is kept")
    if len(bad) > most * len(listed):
        raise quarantine_error(bad, len(listed), f"over max_quarantined {most:g}")


def quarantine_error(bad: list[Entry], total: int, why: str) -> DataError:
    """One line with the counts by reason and the first record of the commonest."""
    reasons = Counter(str(entry.verdict.reason) for entry in bad).most_common()
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    first = next(entry for entry in bad if str(entry.verdict.reason) == reasons[0][0])
    return DataError(
        f"{len(bad)} of {total} records quarantined, {why}: {counts}; first {first.sample_id}: "
        f"{first.verdict.detail}; mend the input or raise --max_quarantined"
    )


def _digests(
    config: BuildConfig,
    entries: list[Entry],
    located: dict[str, Located],
    tokenizer: TokenizerFacts,
    template: Template,
    codecs: dict[str, Codecs],
) -> dict[str, str]:
    """One digest a thing that decides bytes, so that a change can be named."""
    digests = {
        "format": str(FORMAT),
        "tokenizer": digest(tokenizer.fingerprint),
        "template": digest(asdict(template)),
        "views": digest({name: asdict(spec) for name, spec in config.views.items()}),
        "codecs": digest({name: asdict(value) for name, value in codecs.items()}),
        "records_per_shard": str(config.records_per_shard),
        "shard_bytes": str(config.shard_bytes),
        "images": digest([[i.image_id, i.size, i.mtime_ns] for i in located.values()]),
    }
    for source in config.sources:
        rows = [[e.sample_id, e.verdict.reason, e.raw] for e in entries if e.source == source.name]
        digests[f"source {source.name}"] = digest([asdict(source), rows])
    return digests
