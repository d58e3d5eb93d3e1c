"""Finish a build: write selection, quarantine and manifest, then remove stale files."""

from __future__ import annotations

import fnmatch
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lapilli.data.building.reencode import check_ids
from lapilli.data.building.teachers import with_revision
from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.dataset.build_settings import CONFIG
from lapilli.data.dataset.tokenizer_copy import TOKENIZER, open_copy, place_copy, write_copy
from lapilli.data.errors import DataError
from lapilli.data.images.encodings import encoding_error
from lapilli.data.io.atomic import ShardFacts, json_text, write_json
from lapilli.data.io.remote_path import Output
from lapilli.data.io.whole_file import read_whole
from lapilli.data.planning.build_plan import BuildPlan, TargetPlan, ViewPlan
from lapilli.data.planning.parts.input_columns import input_columns
from lapilli.data.planning.selection import (
    Selection,
    read_image_rows,
    read_token_rows,
    select,
    write_quarantine,
    write_repairs,
)
from lapilli.data.planning.shard_task import Task
from lapilli.data.record import Reason, Verdict
from lapilli.data.shards.files import facts_name, stand_for, write_shard
from lapilli.data.shards.manifest import (
    FORMAT,
    PLAN,
    Manifest,
    TargetFacts,
    ViewFacts,
    digest,
    read_manifest,
    write_manifest,
)
from lapilli.data.shards.schemas import (
    INPUT_SCHEMA,
    JPEG_SCHEMA,
    SELECTION_SCHEMA,
    TARGET_SCHEMA,
    TARGETS_BESIDE,
)
from lapilli.data.shards.summaries import OpenColumns, Summaries
from lapilli.data.sources.tally import tally_facts
from lapilli.data.text.encode import IMAGE_TOKEN_INDEX, load_tokenizer
from lapilli.data.versions import installed_versions

__all__ = ["find_unchanged", "finish", "tidy"]


RECORDED = ("lapilli", "pyarrow", "pillow", "tokenizers", "transformers", "ray")
# What a build writes, and may remove again when nothing names it any more.
OWN_FILES = tuple(
    f"{name}{facts}"
    for name in ("tokens/*/*.arrow", "images/*/*.arrow", "targets/*/*.arrow", "selection*.arrow",
                 "inputs*.arrow", "quarantine-*.parquet", "repairs-*.parquet")
    for facts in ("", ".json")
)  # fmt: skip


def finish(
    plan: BuildPlan, output: Output, facts: dict[str, ShardFacts], shards: Summaries
) -> Manifest:
    """Join verdicts and statuses: selection, quarantine, then the manifest.

    Args:
        plan: The plan.
        output: Where its shards are.
        facts: Of every shard that the plan makes, by name.
        shards: The facts and small columns stored beside the shards.
    """
    shards.look()
    tokens = [_facts(shard, facts) for shard in plan.token_shards]
    stay = (
        shard for view in (*plan.views.values(), *plan.targets.values()) for shard in view.shards
    )
    shards.fetch([*facts, *(one.path for one in (*tokens, *stay) if isinstance(one, ShardFacts))])
    opened = shards.table
    views = {name: _view_facts(view, opened, facts) for name, view in plan.views.items()}
    images = [shard for view in views.values() for shard in view.shards]
    targets = {name: _target_facts(t, opened, facts) for name, t in plan.targets.items()}
    features = [shard for target in targets.values() for shard in target.shards]
    rows = read_image_rows(opened, images)
    _check_unchanged(rows.bad)
    selection = select(plan, read_token_rows(opened, tokens, plan.token_groups), rows.bad)
    selected, quarantined, inputs, repaired = _write_selection(plan, output, selection)
    kept = _keep_tokenizer(plan, output, tokens)
    if plan.previous is None:  # of an amended dataset, when it is one
        _write_config(plan, output)
    counts = selection.counts() | {
        "images": len(plan.slots) - plan.slots.unused,
        "unused_images": plan.slots.unused,
        "repairs": dict(sorted(plan.repairs.items())),
        "image_notes": rows.count_notes(plan.slots.used_names()),
        **tally_facts(plan.tallies),
    }
    manifest = Manifest(
        format=FORMAT,
        fingerprint=digest([shard.sha256 for shard in (*tokens, *images, *features, selected)]),
        plan=plan.digests,
        tokenizer=asdict(plan.tokenizer),
        template=plan.template.name,
        image_token=IMAGE_TOKEN_INDEX,
        counts=counts,
        mixture=selection.mixture,
        tokens=tokens,
        views=views,
        selection=selected,
        versions=installed_versions(*RECORDED),
        quarantine=quarantined,
        inputs=inputs,
        repairs=repaired,
        template_fields=asdict(plan.template),
        tokenizer_files=kept,
        targets=targets,
    )
    write_manifest(output, manifest)
    return read_manifest(output)


def _check_unchanged(bad_images: Mapping[str, Verdict]) -> None:
    """Stop if an image became unreadable after planning; the next run rebuilds its shard."""
    lost = [v.detail for v in bad_images.values() if v.reason == Reason.IMAGE_MISSING]
    if lost:
        raise DataError(
            f"{len(lost)} images changed or vanished while the build ran, first {lost[0]}; "
            "bring them back and run the same command again, or take them as they are now into "
            "another --output"
        )
    kept_back = [v.detail for v in bad_images.values() if v.reason == Reason.IMAGE_UNREADABLE]
    if kept_back:
        raise DataError(
            f"{len(kept_back)} images could not be read while the build ran, first {kept_back[0]}; "
            "check their rights or their disk and run the same command again"
        )


def _keep_tokenizer(plan: BuildPlan, output: Output, tokens: list[ShardFacts]) -> list[ShardFacts]:
    """Put a copy of the tokenizer into the dataset, once it has written the shards' ids again."""
    with tempfile.TemporaryDirectory(prefix="lapilli-") as folder:
        copy = Path(folder) / TOKENIZER
        write_copy(load_tokenizer(plan.config.tokenizer), copy)
        remedy = f"{plan.config.tokenizer} changed while the build ran; run the same command again"
        tokenizer = open_copy(copy, asdict(plan.tokenizer), remedy)
        check_ids(plan, output, tokens, copy, tokenizer)
        return place_copy(copy, output / TOKENIZER)


def _write_selection(
    plan: BuildPlan, output: Output, selection: Selection
) -> tuple[ShardFacts, ShardFacts, ShardFacts, ShardFacts]:
    """Write selection, quarantine, inputs and repairs; an amended dataset's have other names."""
    mark = ""
    if plan.previous is not None:
        mark = f"-{digest(plan.digests)[:12]}"
        if plan.previous.manifest.plan == plan.digests:
            mark = Path(plan.previous.manifest.selection.path).stem.removeprefix("selection")
    selected = write_shard(output, f"selection{mark}.arrow", selection.columns, SELECTION_SCHEMA)
    name = f"quarantine{mark}.parquet"
    quarantined = write_quarantine(output / name, selection.entries, plan.config)
    columns = input_columns(plan.slots, [group.rows for group in plan.token_groups])
    inputs = write_shard(output, f"inputs{mark}.arrow", columns, INPUT_SCHEMA)
    repaired = write_repairs(output / f"repairs{mark}.parquet", plan.repaired)
    return selected, replace(quarantined, path=name), inputs, repaired


def _write_config(plan: BuildPlan, output: Output) -> None:
    """Inputs and settings, for naming what changes, and the recipe that makes this dataset."""
    write_json(output / PLAN, plan.digests)
    write_json(output / CONFIG, _settings(plan))


def _settings(plan: BuildPlan) -> dict[str, Any]:
    """The recipe that a dataset keeps: what decides its bytes, and where they come from."""
    return asdict(replace(plan.config, incremental=False, build=PoolConfig()))


def tidy(plan: BuildPlan, output: Output, manifest: Manifest) -> None:
    """Clean up after a new manifest: link the fixed names to its files, remove unused files."""
    _write_config(plan, output)
    for facts, name in (
        (manifest.selection, "selection.arrow"),
        (manifest.quarantine, "quarantine.parquet"),
        (manifest.repairs, "repairs.parquet"),
    ):
        if facts is not None and facts.path != name:
            stand_for(output, facts, name)
    for name in _unnamed(_own_files(output), manifest):
        (output / name).unlink(missing_ok=True)
    if isinstance(output, Path):
        _remove_empty(output)


def _own_files(output: Output) -> list[str]:
    """The files of an output that a build may have written, by one listing of a store."""
    if isinstance(output, Path):
        return [
            path.relative_to(output).as_posix()
            for pattern in OWN_FILES
            for path in output.glob(pattern)
        ]
    return [*output.sizes()]


def _unnamed(names: Iterable[str], manifest: Manifest) -> list[str]:
    """The files that a build has written and that the manifest does not name."""
    named = {"selection.arrow", "quarantine.parquet", "repairs.parquet"}
    named |= {facts.path for facts in _files(manifest)}
    return [
        name
        for name in names
        if name.removesuffix(".json") not in named
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in OWN_FILES)
    ]


def find_unchanged(plan: BuildPlan, shards: Summaries) -> Manifest | None:
    """The manifest of a store that holds just what the plan makes, by its listing alone.

    None where something is missing, too much or of another size, or where libraries have changed.
    """
    if plan.previous is None or not shards.sizes:
        return None
    manifest, counts = plan.previous.manifest, plan.previous.manifest.counts
    refused = counts["quarantined"] - counts["reasons"].get(Reason.EXCLUDED, 0)
    files = [*_files(manifest), *manifest.tokenizer_files]
    names = {facts.path for facts in files}
    is_same = (
        manifest.plan == plan.digests
        and manifest.versions == installed_versions(*RECORDED)
        and refused <= plan.config.max_quarantined * counts["read"]
        and all(shards.sizes.get(facts.path) == facts.bytes for facts in files)
        and all(facts_name(facts.path) in shards.sizes for facts in manifest.shards())
        and all(_path(shard) in names for shard in _all_shards(plan))
        and {PLAN, CONFIG, "selection.arrow", "quarantine.parquet"} <= shards.sizes.keys()
        and not _unnamed(shards.sizes, manifest)
    )
    if is_same and read_whole(shards.output / CONFIG) != json_text(_settings(plan)).encode():
        _write_config(plan, shards.output)
    return manifest if is_same else None


def _all_shards(plan: BuildPlan) -> Iterator[Task | ShardFacts]:
    """Every shard that the dataset will hold."""
    yield from plan.token_shards
    for one in (*plan.views.values(), *plan.targets.values()):
        yield from one.shards


def _path(shard: Task | ShardFacts) -> str:
    return shard.path if isinstance(shard, ShardFacts) else shard.name


def _remove_empty(output: Path) -> None:
    for folder in (
        path for kind in ("tokens", "images", "targets") for path in output.glob(f"{kind}/*")
    ):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _files(manifest: Manifest) -> list[ShardFacts]:
    others = (manifest.selection, manifest.quarantine, manifest.inputs, manifest.repairs)
    return [*manifest.shards(), *(facts for facts in others if facts is not None)]


def _facts(shard: Task | ShardFacts, built: dict[str, ShardFacts]) -> ShardFacts:
    return shard if isinstance(shard, ShardFacts) else built[shard.name]


def _view_facts(view: ViewPlan, opened: OpenColumns, built: dict[str, ShardFacts]) -> ViewFacts:
    shards = [_facts(shard, built) for shard in view.shards]
    encoding, pixel_bytes = view.encoding, view.spec.size**2 * 3
    stored: dict[str, Any] = {"kind": encoding.kind, "name": encoding.describe()}
    if encoding.kind == "jpeg":
        rows = [row for shard in shards for row in _errors(opened, shard)]
        stored |= {"quality": encoding.quality, "error": encoding_error(rows, pixel_bytes)}
    compared = [shard for shard, most in zip(shards, view.compared, strict=True) if most]
    rows = [row for shard in compared for row in _errors(opened, shard, "fast_")]
    return ViewFacts(
        spec=view.spec.facts(),
        codecs=asdict(view.codecs),
        images_per_shard=view.images_per_shard,
        shards=shards,
        encoding=stored,
        fast_error=encoding_error(rows, pixel_bytes),
    )


def _target_facts(
    plan: TargetPlan, opened: OpenColumns, built: dict[str, ShardFacts]
) -> TargetFacts:
    shards = [_facts(shard, built) for shard in plan.shards]
    names = [*TARGETS_BESIDE]
    tables = [opened(shard, TARGET_SCHEMA, names) for shard in shards]
    statuses = Counter(str(s) for table in tables for s in table["status"].to_pylist())
    changed, whole = (
        sum(value or 0.0 for table in tables for value in table[name].to_pylist())
        for name in names[1:]
    )
    return TargetFacts(
        teacher=plan.target.teacher,
        made=plan.made,
        rows=plan.target.stored_rows,
        width=plan.target.width,
        storage=plan.target.storage,
        images_per_shard=plan.images_per_shard,
        shards=shards,
        error=math.sqrt(changed / whole) if whole else 0.0,
        statuses=dict(sorted(statuses.items())),
        weights=with_revision(plan.weights),
        settings=plan.settings,
    )


def _errors(opened: OpenColumns, shard: ShardFacts, prefix: str = "") -> list[tuple[int, int, int]]:
    """Absolute, squared and worst error of each image of a shard that they were measured of."""
    names = [f"{prefix}{kind}_error" for kind in ("absolute", "squared", "worst")]
    table = opened(shard, JPEG_SCHEMA, names).drop_null()
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))
