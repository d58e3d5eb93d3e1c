"""Describe every shard of a plan: a task to build, or the facts of one that stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from lapilli.data.config import BuildConfig, TargetConfig
from lapilli.data.errors import DataError
from lapilli.data.images.codecs import Codecs
from lapilli.data.images.encodings import ORIGINAL, Encoding
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.access import cannot_read
from lapilli.data.io.atomic import ShardFacts, sha256_file
from lapilli.data.io.remote_path import open_output
from lapilli.data.planning.build_plan import TargetPlan, ViewPlan
from lapilli.data.planning.incremental import TokenGroup, keep_image_shards
from lapilli.data.planning.parts.entries import Entries
from lapilli.data.planning.parts.entry_views import EntryImages, PackedRecords
from lapilli.data.planning.parts.image_slots import ImageSlots, SlotPlaces
from lapilli.data.planning.shard_task import RAW, ImageTask, TargetTask, TokenTask, writer_version
from lapilli.data.shards.manifest import digest
from lapilli.data.text.encode import TokenizerFacts
from lapilli.data.text.templates import Template

__all__ = ["describe_target", "describe_tokens", "describe_view", "target_spec"]

ORIGINALS_PER_SHARD = 512
COMPARED = 64  # images of a view of mode `fast` that are made exactly too: a second of work


def describe_view(
    view: str, spec: ImageSpec, codecs: Codecs, slots: ImageSlots, config: BuildConfig
) -> ViewPlan:
    """Cut a view into shards. Reads the shards of the dataset in the output that it may keep."""
    encoding = Encoding(ORIGINAL) if view == ORIGINAL else config.encodings.get(view, RAW)
    size = _images_per_shard(view, spec, slots, config.shard_bytes)
    most = COMPARED if spec.mode == "fast" else 0
    starts = range(0, len(slots), size)
    planned = ViewPlan(
        spec=spec,
        codecs=codecs,
        encoding=encoding,
        images_per_shard=size,
        compared=tuple(max(0, most - start) for start in starts),
    )
    writer = writer_version()
    kept = _kept_shards(view, planned, slots, writer, config.output)
    made = [writer, spec.facts(), asdict(codecs), encoding.describe()]
    shards: list[ImageTask | ShardFacts] = []
    for number, (start, compared) in enumerate(zip(starts, planned.compared, strict=True)):
        part = slots[start : start + size]
        named = [(name, stamp.hex()) for name, stamp in part]
        if number in kept:
            shards.append(kept[number])
            continue
        mark = digest([*made, named, *([compared] if compared else [])])[:12]
        task = ImageTask(
            name=f"images/{view}/{number:05d}-{mark}.arrow",
            writer=writer,
            root=config.root,
            images=SlotPlaces(slots, start, start + len(part)),
            spec=spec,
            codecs=codecs,
            encoding=encoding,
            compared=compared,
        )
        shards.append(task)
    return replace(planned, shards=tuple(shards))


def _images_per_shard(view: str, spec: ImageSpec, slots: ImageSlots, shard_bytes: int) -> int:
    """How many images of a view fit into a shard; of source bytes on average."""
    if view != ORIGINAL:
        return max(1, shard_bytes // (spec.size * spec.size * 3))
    if slots.previous is not None and view in slots.previous.manifest.views:
        return slots.previous.manifest.views[view].images_per_shard  # sizes differ, slots stay
    mean = max(1, slots.table.source_bytes // max(1, len(slots.table)))
    return max(1, min(ORIGINALS_PER_SHARD, shard_bytes // mean))


def _kept_shards(
    view: str, planned: ViewPlan, slots: ImageSlots, writer: str, output: str
) -> dict[int, ShardFacts]:
    """By number, the shards that stay though an image of theirs has no more use.

    None of a view that a build now would make in another way.
    """
    before = slots.previous.manifest.views.get(view) if slots.previous else None
    if slots.previous is None or before is None:
        return {}
    is_same = (
        slots.previous.manifest.plan.get("writer") == writer
        and before.images_per_shard == planned.images_per_shard
        and digest(before.spec) == digest(planned.spec.facts())
        and digest(before.codecs) == digest(asdict(planned.codecs))
        and before.encoding.get("name") == planned.encoding.describe()
    )
    if not is_same:
        return {}
    return keep_image_shards(open_output(output), slots, slots.previous, before)


def describe_tokens(
    groups: Iterable[TokenGroup],
    entries: Entries,
    folder: str,
    config: BuildConfig,
    tokenizer: TokenizerFacts,
    template: Template,
) -> tuple[TokenTask | ShardFacts, ...]:
    """The token shards of these groups, in order.

    Args:
        groups: The rows of each shard.
        entries: The entries; the groups count those that are kept.
        folder: Where the shards lie below the output.
        config: The settings.
        tokenizer: Facts of the tokenizer.
        template: The template.
    """
    writer = writer_version()
    shards: list[TokenTask | ShardFacts] = []
    for group in groups:
        if group.facts is not None:
            shards.append(group.facts)
            continue
        places = group.kept
        if isinstance(places, range):  # a view, and no copy of the rows
            rows = entries.kept[places.start : places.stop]
        else:
            rows = entries.kept[[place for place in places if place is not None]]
        mark = digest([(name, stamp.hex()) for name, stamp in group.rows])[:12]
        task = TokenTask(
            name=f"{folder}/{group.number:05d}-{mark}.arrow",
            writer=writer,
            packed=PackedRecords(entries, rows),
            image_ids=EntryImages(entries, rows),
            tokenizer=config.tokenizer,
            fingerprint=tokenizer.fingerprint,
            template=template,
            compat=config.compat,
            max_text_length=config.max_text_length,
        )
        shards.append(task)
    return tuple(shards)


# Settings that decide what a teacher gives of an image; the others say how that is stored and made.
TEACHING = ("settings", "size", "aspect", "rows", "width", "pool")


def target_spec(target: TargetConfig) -> ImageSpec:
    """How an image becomes what the teacher is given, by Pillow as its own code does it."""
    return ImageSpec(size=target.size, fill=(0, 0, 0), aspect=target.aspect, resizer="pillow")


def describe_target(
    name: str, target: TargetConfig, codecs: Codecs, slots: ImageSlots, config: BuildConfig
) -> TargetPlan:
    """Cut a teacher's features into shards.

    Reads the teacher's weights for their digest, and the shards of the dataset in the output that
    it may keep.

    Raises:
        DataError: Weights that cannot be read.
    """
    folder = Path(target.pretrained)
    if target.pretrained and folder.is_dir():
        target = replace(target, pretrained=str(folder.resolve()))
    spec, size = target_spec(target), max(1, config.shard_bytes // target.image_bytes)
    writer, weights = writer_version(), _weights(target)
    made = digest([writer, spec.facts(), asdict(codecs), target.facts() | {"pretrained": weights}])
    kept: Mapping[int, ShardFacts] = {}
    before = slots.previous.manifest.targets.get(name) if slots.previous else None
    if slots.previous and before and (before.made, before.images_per_shard) == (made, size):
        output = open_output(config.output)
        kept = keep_image_shards(output, slots, slots.previous, before)
    shards: list[TargetTask | ShardFacts] = []
    for number, start in enumerate(range(0, len(slots), size)):
        part = slots[start : start + size]
        mark = digest([made, [(image, stamp.hex()) for image, stamp in part]])[:12]
        task = TargetTask(
            name=f"targets/{name}/{number:05d}-{mark}.arrow",
            writer=writer,
            root=config.root,
            images=SlotPlaces(slots, start, start + len(part)),
            spec=spec,
            codecs=codecs,
            target=target,
        )
        shards.append(kept.get(number, task))
    chosen = {name: getattr(target, name) for name in TEACHING}
    return TargetPlan(
        target=target, made=made, images_per_shard=size, shards=tuple(shards),
        weights=weights if weights == target.pretrained else f"SHA-256 {weights[:12]}",
        settings=digest(chosen),
    )  # fmt: skip


def _weights(target: TargetConfig) -> str:
    """What tells the weights from others: a folder may lie elsewhere, its files count."""
    folder = Path(target.pretrained)
    if not target.pretrained or not folder.is_dir():
        return target.pretrained
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return digest([(path.name, sha256_file(path)) for path in files])
    except OSError as error:
        raise DataError(cannot_read(error.filename or folder, error)) from None
