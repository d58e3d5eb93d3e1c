"""Plan a build: records, verdicts and codecs become shard tasks.

The plan alone decides every shard's bytes: which records, which images, in which order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.images.codecs import Codecs
from lapilli.data.images.encodings import ORIGINAL
from lapilli.data.images.node_codecs import resolve_for_nodes
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.access import is_folder
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import open_output
from lapilli.data.planning.build_plan import BuildPlan, TargetPlan
from lapilli.data.planning.describe_shards import (
    describe_target,
    describe_tokens,
    describe_view,
)
from lapilli.data.planning.incremental import (
    Previous,
    TokenGroup,
    arrange_tokens,
    read_previous,
)
from lapilli.data.planning.mixture import check_sources, num_held_out
from lapilli.data.planning.originals import Originals
from lapilli.data.planning.parts.entries import Entries
from lapilli.data.planning.parts.entry_views import PackedRecords, StampedRows
from lapilli.data.planning.parts.image_slots import ImageSlots, arrange_slots
from lapilli.data.planning.parts.read_sources import Reading, read_sources
from lapilli.data.planning.rules import record_rules
from lapilli.data.planning.shard_task import TokenTask, writer_version
from lapilli.data.record import (
    ImagePart,
    Reason,
    Record,
    TextPart,
    Turn,
    Verdict,
    excerpt,
    unpack,
)
from lapilli.data.shards.manifest import FORMAT, digest
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

__all__ = ["check_quarantined", "plan_build"]

# `original` is decoded, and not resized
READING = Reading()
MOST_NAMES = 2**31 - 1  # bytes of a column of strings in a batch of Arrow
VERIFIED = ImageSpec(size=1, fill=(0, 0, 0), aspect="stretch")


def plan_build(
    config: BuildConfig,
    on_progress: Callable[[int], None] = lambda done: None,
    *,
    reading: Reading = READING,
) -> BuildPlan:
    """Read and check every source, find every image, fix tokenizer, template and codecs.

    `on_progress` is called with the number of records read, about once a second. `reading` says how
    files are read; by default large ones by Ray's tasks, and Ray is started if none is running.

    Raises:
        DataError: A folder, file, tokenizer or template that is missing or wrong; nothing kept;
            more quarantined than `max_quarantined`.
    """
    if not is_folder(root := Path(config.root)):
        raise DataError(f"root: folder {root} does not exist; pass --root with the data's folder")
    config = replace(config, root=str(root.resolve()), tokenizer=_absolute(config.tokenizer))
    loaded = load_tokenizer(config.tokenizer)
    template = bind_template(get_template(config.template), loaded)
    if obstacle := export_obstacle(template, loaded):
        raise DataError(obstacle)
    _try_out(template, loaded, config.compat)
    tokenizer = tokenizer_facts(loaded)
    specs = config.views | ({ORIGINAL: VERIFIED} if config.keep_original else {})
    codecs = {v: resolve_for_nodes(_resizer(spec, config.compat)) for v, spec in specs.items()}
    previous = read_previous(open_output(config.output))
    originals = Originals(previous, open_output(config.output).resolve())
    record_rules(template, loaded, config.compat)  # a template that can write nothing stops here
    read = read_sources(config, template, originals, on_progress, reading)
    check_quarantined(read.entries, config.max_quarantined)
    check_sources(config.mixture, kept := read.entries.kept_by_source())
    num_held_out(config.mixture, kept.total())  # now, and not when every image is decoded
    check_agreement(loaded, _first_texts(read.entries))
    stamps = read.images.stamps(originals)
    slots = arrange_slots(read.images, stamps, previous)
    _check_names(read.entries, slots)
    groups, token_shards = _plan_tokens(read.entries, config, tokenizer, template, previous)
    targets = _plan_targets(slots, config)
    return BuildPlan(
        config=config,
        entries=read.entries,
        slots=slots,
        repairs=dict(read.repairs),
        repaired=read.repaired,
        tallies=read.tallies,
        tokenizer=tokenizer,
        template=template,
        views={
            view: describe_view(view, spec, codecs[view], slots, config)
            for view, spec in specs.items()
        },
        targets=targets,
        token_groups=groups,
        token_shards=token_shards,
        previous=previous,
        digests=_digests(
            config, read.entries, read.images.digest(stamps), tokenizer, template, codecs, targets
        ),
    )


def _check_names(entries: Entries, slots: ImageSlots) -> None:
    """Notice more names than the selection and the list of inputs hold, each one batch of Arrow.

    Raises:
        DataError: Says how many bytes they take, and how many they may.
    """
    arrow: Any = pc
    columns = entries.sample_ids, slots.names
    total = sum(arrow.sum(arrow.binary_length(names)).as_py() or 0 for names in columns)
    if total > MOST_NAMES:
        raise DataError(
            f"sources: the names of {len(entries):,} records and {len(slots):,} images take "
            f"{total:,} bytes; expected at most {MOST_NAMES:,} in a dataset; shorten the records' "
            "ids, or build several datasets"
        )


def _plan_tokens(
    entries: Entries,
    config: BuildConfig,
    tokenizer: TokenizerFacts,
    template: Template,
    previous: Previous | None,
) -> tuple[list[TokenGroup], tuple[TokenTask | ShardFacts, ...]]:
    """The rows of each token shard and its description, over the records still kept."""
    output, folder = open_output(config.output), _token_folder(config, tokenizer, template)
    rows = StampedRows(entries, entries.kept)
    groups = arrange_tokens(output, rows, config.records_per_shard, folder, previous)
    return groups, describe_tokens(groups, entries, folder, config, tokenizer, template)


def _plan_targets(slots: ImageSlots, config: BuildConfig) -> dict[str, TargetPlan]:
    """Every teacher's features; their images are decoded by Pillow, as LLaVA's are."""
    return {
        name: describe_target(name, target, resolve_for_nodes("pillow"), slots, config)
        for name, target in config.targets.items()
    }


def _token_folder(config: BuildConfig, tokenizer: TokenizerFacts, template: Template) -> str:
    """The folder of all that decides ids alike."""
    settings = [config.compat, config.max_text_length, writer_version()]
    return f"tokens/{digest([_deciding(tokenizer), template_facts(template), *settings])[:12]}"


def _deciding(tokenizer: TokenizerFacts) -> list[Any]:
    """What of a tokenizer decides ids: which tokens begin and end a text is set beside the rest."""
    return [tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id]


def _absolute(tokenizer: str) -> str:
    """A tokenizer's folder as an absolute path; a name on the hub as it is."""
    return str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else tokenizer


def _resizer(spec: ImageSpec, compat: str | None) -> Literal["auto", "pillow", "simd", "torch"]:
    """The resizer a view asks for; LLaVA's pixels are Pillow's."""
    return "pillow" if compat == "llava" and spec.resizer == "auto" else spec.resizer


def _try_out(template: Template, tokenizer: Any, compat: str | None) -> None:
    """Encode one record: what template and tokenizer are wrong about is said before the work."""
    turns = (Turn("user", (ImagePart(0), TextPart("Why?"))), Turn("assistant", (TextPart("So."),)))
    trial = Record(
        record_id="trial", sample_id="trial", source="trial", turns=turns, images=("trial.jpg",)
    )
    if compat == "llava":
        encode_as_llava([trial], tokenizer, template)
    elif not template.chat:  # a chat template may refuse some records and write others
        encode_batch([trial], tokenizer, template)


def _first_texts(entries: Entries, most: int = 512) -> Iterable[str]:
    """What the first records kept say: enough to notice two tokenizers that differ."""
    records = map(unpack, PackedRecords(entries, entries.kept))
    texts = (turn.text for record in records for turn in record.turns if turn.text)
    return islice(texts, most)


def check_quarantined(entries: Entries, most: float) -> None:
    """Stop a build with too many bad records.

    Raises:
        DataError: Nothing is kept, or more than the share `most` is quarantined; names the first.
    """
    bad, total = entries.verdicts, len(entries)
    if len(bad) == total:
        raise _quarantine_error(entries, bad, "nothing is kept")
    bad = {row: v for row, v in bad.items() if v.reason != Reason.EXCLUDED}  # that is no defect
    if len(bad) > most * total:
        raise _quarantine_error(entries, bad, f"over max_quarantined {most:g}")


def _quarantine_error(entries: Entries, bad: Mapping[int, Verdict], why: str) -> DataError:
    """One line with the counts by reason and the first record of the commonest."""
    ordered = {row: bad[row] for row in sorted(bad)}
    reasons = Counter(str(verdict.reason) for verdict in ordered.values()).most_common()
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    first = next(row for row, verdict in ordered.items() if str(verdict.reason) == reasons[0][0])
    total = len(entries)
    remedy = "fix the input" if len(bad) == total else "fix the input or raise --max_quarantined"
    return DataError(
        f"{len(bad)} of {total} records quarantined, {why}: {counts}; first "
        f"{excerpt(entries.names(first)[2])}: {bad[first].detail}; {remedy}"
    )


def _digests(
    config: BuildConfig,
    entries: Entries,
    images: str,
    tokenizer: TokenizerFacts,
    template: Template,
    codecs: dict[str, Codecs],
    targets: dict[str, TargetPlan],
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
        "images": images,
        **{f"targets {name}": target.made for name, target in targets.items()},
    }
    for number, source in enumerate(config.sources):
        found = hashlib.sha256(digest(source.facts()).encode())
        for lines in entries.lines(number):
            found.update(lines.encode())
        digests[f"source {source.name}"] = found.hexdigest()
    return digests
