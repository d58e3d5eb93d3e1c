"""Plan a build: records, verdicts and codecs become shard tasks.

The plan alone decides every shard's bytes: which records, which images, in which order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.images.codecs import Codecs, resolve_codecs
from lapilli.data.images.encodings import ORIGINAL, Encoding
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.access import is_folder
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import open_output
from lapilli.data.mounts import Located
from lapilli.data.mounts.repairs import repairs_table
from lapilli.data.planning.incremental import (
    UNUSED_STAMP,
    Previous,
    Stamped,
    TokenGroup,
    arrange_slots,
    arrange_tokens,
    image_stamp,
    keep_image_shards,
    read_previous,
    row_stamp,
)
from lapilli.data.planning.located_entries import entries_of, locate_images, open_mount, take_back
from lapilli.data.planning.mixture import check_sources
from lapilli.data.planning.originals import Originals
from lapilli.data.planning.progress import paced
from lapilli.data.planning.rules import record_rules
from lapilli.data.planning.shard_task import RAW, ImageTask, Task, TokenTask, writer_version
from lapilli.data.record import (
    Entry,
    ImagePart,
    PackedEntry,
    Reason,
    Record,
    TextPart,
    Turn,
    Verdict,
    excerpt,
    unpack,
)
from lapilli.data.shards.manifest import FORMAT, digest
from lapilli.data.sources.tally import Tally
from lapilli.data.sources.validation import Rules
from lapilli.data.text.encode import (
    TokenizerFacts,
    bind_template,
    encode_batch,
    load_tokenizer,
    tokenizer_facts,
)
from lapilli.data.text.export_template import export_obstacle
from lapilli.data.text.llava_compat import encode_as_llava
from lapilli.data.text.templates import Template, get_template, template_facts
from lapilli.data.text.tokenizer import check_agreement

__all__ = [
    "BuildPlan",
    "ImageTask",
    "Task",
    "TokenTask",
    "check_quarantined",
    "plan_build",
    "quarantine_error",
    "source_bytes",
    "writer_version",
]

Item = TypeVar("Item")

VERIFIED = ImageSpec(1, (0, 0, 0), aspect="stretch")  # `original` is decoded, and not resized
ORIGINALS_PER_SHARD = 512
COMPARED = 64  # images of a view of mode `fast` that are made exactly too: a second of work


@dataclass(frozen=True)
class BuildPlan:
    """Everything known before the first pixel is decoded.

    Attributes:
        config: The settings. `root` and a tokenizer's folder are absolute: workers stand elsewhere.
        entries: Every element of every source with its verdict so far, in order.
        images: The distinct images of the records still kept, by image id.
        stamped: Image id and stamp by slot; the stamp of a slot without use is empty.
        entry_images: Image ids of each entry, () for one not kept.
        repairs: How many keys were mended, by kind.
        repaired: Every key that was mended, with the file it is read from; see `REPAIRS_SCHEMA`.
        tallies: By source, the fields that nothing reads and the members of archives.
        tokenizer: Facts of the tokenizer.
        template: The template.
        views: Every view to make, `original` among them if it is.
        codecs: Codecs by view.
        token_folder: Where the token shards lie below the output.
        token_groups: The rows of each token shard.
        previous: The dataset that the output holds, if there is one.
        digests: Each input and setting, as short text or a digest, for naming what changed.
    """

    config: BuildConfig
    entries: list[PackedEntry]
    images: dict[str, Located]
    stamped: list[Stamped]
    entry_images: list[tuple[str, ...]]
    repairs: dict[str, int]
    repaired: pa.Table
    tallies: dict[str, Tally]
    tokenizer: TokenizerFacts
    template: Template
    views: dict[str, ImageSpec]
    codecs: dict[str, Codecs]
    token_folder: str
    token_groups: list[TokenGroup]
    previous: Previous | None
    digests: dict[str, str]

    @property
    def image_ids(self) -> list[str]:
        """The identities of the images in use, by slot."""
        return [name for name, stamp in self.stamped if stamp != UNUSED_STAMP]

    @cached_property
    def slots(self) -> dict[str, int]:
        """Slot by image id, of the images in use."""
        return {
            name: slot for slot, (name, stamp) in enumerate(self.stamped) if stamp != UNUSED_STAMP
        }

    def encoding(self, view: str) -> Encoding:
        """How a view's pixels are stored."""
        return Encoding(ORIGINAL) if view == ORIGINAL else self.config.encodings.get(view, RAW)

    def images_per_shard(self, view: str) -> int:
        """How many images of a view fit into `shard_bytes`; of source bytes on average."""
        if view != ORIGINAL:
            return max(1, self.config.shard_bytes // _pixel_bytes(self.views[view]))
        if self.previous is not None and view in self.previous.manifest.views:
            return self.previous.manifest.views[view].images_per_shard  # sizes differ, slots stay
        mean = max(1, self.original_bytes() // max(1, len(self.images)))
        return max(1, min(ORIGINALS_PER_SHARD, self.config.shard_bytes // mean))

    def original_bytes(self) -> int:
        """Bytes of the images' files."""
        return sum(map(source_bytes, self.images.values()))

    def pixel_bytes(self) -> int:
        """Bytes of all pixels of all views, as they are before they are encoded."""
        return sum(map(_pixel_bytes, self.config.views.values())) * len(self.images)

    @cached_property
    def kept_images(self) -> dict[str, dict[int, ShardFacts]]:
        """By view and number, the shards that stay though an image of theirs has no more use."""
        output, kept = open_output(self.config.output), dict[str, dict[int, ShardFacts]]()
        for view in self.views:
            before = self.previous.manifest.views.get(view) if self.previous else None
            if self.previous is None or before is None or not self._is_same_view(view):
                kept[view] = {}
            else:
                kept[view] = keep_image_shards(output, self.stamped, self.previous, before)
        return kept

    def _is_same_view(self, view: str) -> bool:
        """Whether the dataset has shards of the view that a build now would make alike."""
        if self.previous is None:
            return False
        before = self.previous.manifest
        facts = before.views[view]
        return (
            before.plan.get("writer") == self.digests["writer"]
            and facts.images_per_shard == self.images_per_shard(view)
            and digest(facts.spec) == digest(self.views[view].facts())
            and digest(facts.codecs) == digest(asdict(self.codecs[view]))
            and facts.encoding.get("name") == self.encoding(view).describe()
        )

    def image_shards(self, view: str) -> list[ImageTask | ShardFacts]:
        """The shards of a view in order: tasks, and the facts of those that stay as they are."""
        kept = self.kept_images[view]
        parts = _cut(self.stamped, self.images_per_shard(view))
        return [
            kept[number] if number in kept else self._image_task(view, number, part)
            for number, part in enumerate(parts)
        ]

    def _image_task(self, view: str, number: int, part: tuple[Stamped, ...]) -> ImageTask:
        spec, codecs, encoding = self.views[view], self.codecs[view], self.encoding(view)
        named = [(name, stamp.hex()) for name, stamp in part]
        compared = self.compared(view, number)
        made = [self.digests["writer"], spec.facts(), asdict(codecs), encoding.describe(), named]
        made += [compared] if compared else []
        return ImageTask(
            f"images/{view}/{number:05d}-{digest(made)[:12]}.arrow",
            self.digests["writer"],
            self.config.root,
            tuple(self.images.get(name) or Located(name, "", 0, 0) for name, _ in part),
            spec,
            codecs,
            encoding,
            compared,
        )

    def compared(self, view: str, number: int) -> int:
        """Of how many images of a shard the error of mode `fast` is measured: the view's first."""
        if view == ORIGINAL or self.views[view].mode != "fast":
            return 0
        return max(0, COMPARED - number * self.images_per_shard(view))

    def image_tasks(self) -> list[ImageTask]:
        """The image shards of every view that are to be there, finished or not."""
        shards = [shard for view in self.views for shard in self.image_shards(view)]
        return [shard for shard in shards if isinstance(shard, ImageTask)]

    def token_shards(self) -> list[TokenTask | ShardFacts]:
        """The token shards; an entry quarantined before decoding is in none that is made."""
        kept = [
            (entry.packed, images)
            for entry, images in zip(self.entries, self.entry_images, strict=True)
            if entry.verdict.kept and entry.packed is not None
        ]
        return [self._token_shard(group, kept) for group in self.token_groups]

    def _token_shard(
        self, group: TokenGroup, kept: Sequence[tuple[bytes, tuple[str, ...]]]
    ) -> TokenTask | ShardFacts:
        if group.facts is not None:
            return group.facts
        rows = [kept[place] for place in group.kept if place is not None]
        name = digest([(name, stamp.hex()) for name, stamp in group.rows])[:12]
        return TokenTask(
            f"{self.token_folder}/{group.number:05d}-{name}.arrow",
            self.digests["writer"],
            tuple(packed for packed, _ in rows),
            tuple(images for _, images in rows),
            self.config.tokenizer,
            self.tokenizer.fingerprint,
            self.template,
            self.config.compat,
            self.config.max_text_length,
        )

    def kept_packed(self) -> list[bytes]:
        """The kept records, packed; `TokenGroup.kept` counts them."""
        return [e.packed for e in self.entries if e.verdict.kept and e.packed is not None]

    def token_tasks(self) -> list[TokenTask]:
        """The token shards that are to be there, finished or not."""
        return [shard for shard in self.token_shards() if isinstance(shard, TokenTask)]


def source_bytes(place: Located) -> int:
    """Bytes of an image's file, or of its member of an archive."""
    return place.size if place.member is None else place.member.size


def _pixel_bytes(spec: ImageSpec) -> int:
    return spec.size * spec.size * 3


def _cut(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def plan_build(
    config: BuildConfig, on_progress: Callable[[int], None] = lambda done: None
) -> BuildPlan:
    """Read and check every source, find every image, fix tokenizer, template and codecs.

    `on_progress` is told the number of records read, about once a second.

    Raises:
        DataError: A folder, file, tokenizer or template that is missing or wrong; nothing kept;
            more quarantined than `max_quarantined`.
    """
    root = Path(config.root)
    if not is_folder(root):
        raise DataError(f"root: folder {root} does not exist; pass --root with the data's folder")
    config = replace(config, root=str(root.resolve()), tokenizer=_absolute(config.tokenizer))
    loaded = load_tokenizer(config.tokenizer)
    template = bind_template(get_template(config.template), loaded)
    if obstacle := export_obstacle(template, loaded):
        raise DataError(obstacle)
    _try_out(template, loaded, config.compat)
    tokenizer = tokenizer_facts(loaded)
    views = config.views | ({ORIGINAL: VERIFIED} if config.keep_original else {})
    codecs = {view: resolve_codecs(_resizer(spec, config.compat)) for view, spec in views.items()}
    output = open_output(config.output)
    previous = read_previous(output)
    originals = Originals(previous, output.resolve())
    rules = record_rules(template, loaded, config.compat)
    read = _read_sources(config, root, rules, originals, on_progress)
    entries, entry_images, located = read.entries, read.entry_images, read.located
    check_quarantined(entries, config.max_quarantined)
    check_sources(config.mixture, Counter(e.source for e in entries if e.verdict.kept))
    check_agreement(loaded, _first_texts(entries))
    stamps = {name: originals.stamp(place) or image_stamp(place) for name, place in located.items()}
    digests = _digests(config, entries, stamps, tokenizer, template, codecs)
    folder = _token_folder(config, tokenizer, template)
    rows = _stamped_rows(entries, entry_images)
    groups = arrange_tokens(output, rows, config.records_per_shard, folder, previous)
    return BuildPlan(
        config, entries, located, arrange_slots(stamps, previous), entry_images,
        dict(read.repairs), pa.concat_tables(read.repaired), read.tallies, tokenizer, template,
        views, codecs, folder, groups, previous, digests,
    )  # fmt: skip


@dataclass
class _Read:
    """What was read of the sources; the fields are those of `BuildPlan`."""

    entries: list[PackedEntry] = field(default_factory=list[PackedEntry])
    entry_images: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    located: dict[str, Located] = field(default_factory=dict[str, Located])
    repairs: Counter[str] = field(default_factory=Counter[str])
    repaired: list[pa.Table] = field(default_factory=list[pa.Table])
    tallies: dict[str, Tally] = field(default_factory=dict[str, Tally])


def _read_sources(
    config: BuildConfig,
    root: Path,
    rules: Rules,
    originals: Originals,
    on_progress: Callable[[int], None],
) -> _Read:
    """Every entry of every source with its verdict and its images."""
    read = _Read()
    unseen, told = set(config.exclude), paced(on_progress)
    for source in config.sources:
        mount = open_mount(source, config, root)
        if not originals:
            mount.require()
        first = len(read.entries)
        tally = read.tallies[source.name] = Tally()
        for entry in entries_of(source, root, rules, tally):
            checked, places = locate_images(_without(entry, unseen), mount)
            if checked.verdict.reason == Reason.IMAGE_MISSING:
                checked, places = originals.locate(entry, checked)
            for place in places:
                read.located.setdefault(place.image_id, place)
            read.entries.append(checked.pack())
            read.entry_images.append(tuple(place.image_id for place in places))
            told(len(read.entries))
        take_back(mount.settle(), read.entries, read.entry_images, first)
        read.repairs.update(mount.repairs)
        read.repaired.append(repairs_table(source.name, mount.repaired()))
    used = {name for images in read.entry_images for name in images}
    read.located = {name: place for name, place in read.located.items() if name in used}
    on_progress(len(read.entries))
    _check_all_seen(unseen)
    return read


def _stamped_rows(
    entries: Sequence[PackedEntry], entry_images: Sequence[tuple[str, ...]]
) -> list[Stamped]:
    """Sample id and stamp of each record still kept."""
    return [
        (entry.sample_id, row_stamp(entry.packed, images))
        for entry, images in zip(entries, entry_images, strict=True)
        if entry.verdict.kept and entry.packed is not None
    ]


def _token_folder(config: BuildConfig, tokenizer: TokenizerFacts, template: Template) -> str:
    """The folder of all that decides ids alike."""
    settings = [config.compat, config.max_text_length, writer_version()]
    return f"tokens/{digest([_deciding(tokenizer), template_facts(template), *settings])[:12]}"


def _deciding(tokenizer: TokenizerFacts) -> list[Any]:
    """What of a tokenizer decides ids: which tokens begin and end a text is set beside the rest."""
    return [tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id]


def _check_all_seen(excluded: set[str]) -> None:
    """What is still to be excluded when all has been read is a mistake."""
    if excluded:
        raise DataError(
            f"exclude: {excerpt(min(excluded))!r} is no record's sample id; expected "
            "source/record_id as in quarantine.parquet and selection.arrow"
        )


def _without(entry: Entry, excluded: set[str]) -> Entry:
    """An entry with its verdict if it is one of the `excluded`; takes it out of them."""
    if entry.sample_id not in excluded:
        return entry
    excluded.remove(entry.sample_id)
    return replace(entry, verdict=Verdict(Reason.EXCLUDED, "named in `exclude`"))


def _absolute(tokenizer: str) -> str:
    """A tokenizer's folder as an absolute path; a name on the hub as it is."""
    return str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else tokenizer


def _resizer(spec: ImageSpec, compat: str | None) -> Literal["auto", "pillow", "simd", "torch"]:
    """The resizer a view asks for; LLaVA's pixels are Pillow's."""
    return "pillow" if compat == "llava" and spec.resizer == "auto" else spec.resizer


def _try_out(template: Template, tokenizer: Any, compat: str | None) -> None:
    """Encode one record: what template and tokenizer are wrong about is said before the work."""
    turns = (Turn("user", (ImagePart(0), TextPart("Why?"))), Turn("assistant", (TextPart("So."),)))
    trial = Record("trial", "trial", "trial", turns, ("trial.jpg",))
    if compat == "llava":
        encode_as_llava([trial], tokenizer, template)
    elif not template.chat:  # a chat template may refuse some records and write others
        encode_batch([trial], tokenizer, template)


def _kept_records(entries: Iterable[PackedEntry]) -> Iterator[Record]:
    return (unpack(e.packed) for e in entries if e.packed is not None and e.verdict.kept)


def _first_texts(entries: Iterable[PackedEntry], most: int = 512) -> Iterable[str]:
    """What the first records kept say: enough to notice two tokenizers that differ."""
    records = _kept_records(entries)
    texts = (turn.text for record in records for turn in record.turns if turn.text)
    return islice(texts, most)


def check_quarantined(entries: Sequence[Entry | PackedEntry], most: float) -> None:
    """Stop a build that goes wrong.

    Raises:
        DataError: Nothing is kept, or more than the share `most` is quarantined; names the first.
    """
    bad = [entry for entry in entries if not entry.verdict.kept]
    if len(bad) == len(entries):
        raise quarantine_error(bad, len(entries), "nothing is kept")
    bad = [entry for entry in bad if entry.verdict.reason != Reason.EXCLUDED]  # that is no defect
    if len(bad) > most * len(entries):
        raise quarantine_error(bad, len(entries), f"over max_quarantined {most:g}")


def quarantine_error(bad: Sequence[Entry | PackedEntry], total: int, why: str) -> DataError:
    """One line with the counts by reason and the first record of the commonest."""
    reasons = Counter(str(entry.verdict.reason) for entry in bad).most_common()
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    first = next(entry for entry in bad if str(entry.verdict.reason) == reasons[0][0])
    remedy = "mend the input" if len(bad) == total else "mend the input or raise --max_quarantined"
    return DataError(
        f"{len(bad)} of {total} records quarantined, {why}: {counts}; first "
        f"{excerpt(first.sample_id)}: {first.verdict.detail}; {remedy}"
    )


def _digests(
    config: BuildConfig,
    entries: Iterable[PackedEntry],
    stamps: dict[str, bytes],
    tokenizer: TokenizerFacts,
    template: Template,
    codecs: dict[str, Codecs],
) -> dict[str, str]:
    """All that decides bytes, by name, so that a change can be named: short text or a digest."""
    stored = {view: encoding.describe() for view, encoding in config.encodings.items()}
    digests = {
        "format": str(FORMAT),
        "writer": writer_version(),
        "tokenizer": digest(_deciding(tokenizer)),
        "template": digest(template_facts(template)),
        "views": digest({name: spec.facts() for name, spec in config.views.items()}),
        "codecs": "; ".join(f"{view}: {codec.describe()}" for view, codec in codecs.items()),
        "encodings": "; ".join(f"{view}: {name}" for view, name in sorted(stored.items())) or "raw",
        "keep_original": str(config.keep_original),
        "compat": str(config.compat),
        "max_text_length": str(config.max_text_length),
        "records_per_shard": str(config.records_per_shard),
        "shard_bytes": str(config.shard_bytes),
        "mixture": digest(asdict(config.mixture)),
        "images": digest([[name, stamp.hex()] for name, stamp in stamps.items()]),
    }
    hashes = {
        source.name: hashlib.sha256(digest(source.facts()).encode()) for source in config.sources
    }
    for entry in entries:
        line = f"{entry.sample_id}\t{entry.verdict.reason}\t{entry.digest.hex()}\n"
        hashes[entry.source].update(line.encode())
    return digests | {f"source {name}": found.hexdigest() for name, found in hashes.items()}
