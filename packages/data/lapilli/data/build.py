"""A build: plan to shards with Ray Data, one task a shard, then selection and manifest."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lapilli.data.errors import DataError
from lapilli.data.manifest import (
    FORMAT,
    PLAN,
    Manifest,
    ViewFacts,
    digest,
    read_manifest,
    write_manifest,
)
from lapilli.data.plan import BuildPlan, ImageTask, Task
from lapilli.data.runners import Runner, run_on_ray
from lapilli.data.selection import read_bad_images, read_token_rows, select, write_quarantine
from lapilli.data.shards import (
    SELECTION_SCHEMA,
    TEMPORARY,
    ShardFacts,
    write_json,
    write_shard,
)
from lapilli.data.tasks import finished_task
from lapilli.data.tokenize import IMAGE_TOKEN_INDEX, load_tokenizer

__all__ = ["BuildReport", "build", "check_disk"]

TOKENIZER = "tokenizer"  # a copy of its files, so that a dataset can be moved
CONFIG = "config.json"  # the resolved settings; a recipe that makes this dataset again
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildReport:
    """What a build did, for the person who started it."""

    manifest: Manifest
    shards_built: int
    shards_reused: int
    seconds: float


def build(
    plan: BuildPlan,
    on_progress: Progress = lambda done, total: None,
    *,
    runner: Runner = run_on_ray,
) -> BuildReport:
    """Carry out a plan: build what is missing or damaged, select, write the manifest last.

    `on_progress(done, total)` is called after every shard. `runner` makes the shards; the default
    needs a running Ray (`lapilli.data.cluster.ray_session`), `run_here` none.

    Raises:
        DataError: The output holds something else, the disk is too small, a worker's libraries
            differ, or too much is quarantined.
    """
    started = time.monotonic()
    output = Path(plan.config.output)
    _check_output(output, plan.digests)
    tasks: list[Task] = [*plan.token_tasks(), *plan.image_tasks()]
    facts = _finished(tasks, output)
    missing = [task for task in tasks if task.name not in facts]
    reused = len(facts)
    check_disk(output, missing)
    write_json(output / PLAN, plan.digests)
    on_progress(reused, len(tasks))
    for built in runner(missing, output, plan.config.workers):
        facts[built.path] = built
        on_progress(len(facts), len(tasks))
    manifest = _finish(plan, output, facts)
    return BuildReport(manifest, len(missing), reused, time.monotonic() - started)


def _check_output(output: Path, digests: dict[str, str]) -> None:
    """The output is new, or of the same plan; nothing else is overwritten or mixed in."""
    path = output / PLAN
    if output.exists() and not output.is_dir():
        raise DataError(f"output: {output} is a file; expected a folder; choose another --output")
    if not path.exists():
        if output.exists() and any(output.iterdir()):
            raise DataError(
                f"output: {output} is not empty and no dataset; choose another --output"
            )
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise DataError(
            f"output: {path} cannot be read; remove {output} or choose another --output"
        ) from None
    changes = [
        _describe_change(name, before.get(name), digests.get(name))
        for name in {**before, **digests}
        if before.get(name) != digests.get(name)
    ]
    if changes:
        raise DataError(
            f"output: {output} was built with another {'; another '.join(changes)}; expected the "
            "same inputs and settings; choose another --output or remove this folder"
        )


def _describe_change(name: str, before: Any, now: Any) -> str:
    """The name of what changed, with both values where they are text and no digest."""
    values = [str(value) for value in (before, now)]
    is_text = all(value is not None for value in (before, now)) and max(map(len, values)) != 64
    return f"{name} ({values[0]}, now {values[1]})" if is_text else name


def _finished(tasks: list[Task], output: Path) -> dict[str, ShardFacts]:
    """Facts of the shards that an earlier run finished, by name; clears what it left half-done."""
    if not output.exists():
        return {}
    for temporary in output.rglob(f".*{TEMPORARY}"):
        temporary.unlink(missing_ok=True)
    with ThreadPoolExecutor() as pool:  # hashing gives the interpreter free: 1.5 GB/s a core
        found = pool.map(lambda task: finished_task(task, output), tasks)
        return {facts.path: facts for facts in found if facts is not None}


def check_disk(output: Path, missing: Iterable[Task]) -> None:
    """Stop before the work if the pixels still to be written do not fit on the disk.

    Raises:
        DataError: Names the bytes needed and free.
    """
    images = [task for task in missing if isinstance(task, ImageTask)]
    needed = sum(len(task.image_ids) * task.spec.size**2 * 3 for task in images)
    existing = next(
        folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"output: {output} has {free / 1e9:.1f} GB free, the images need "
            f"{needed / 1e9:.1f} GB; free space or choose another --output"
        )


def _finish(plan: BuildPlan, output: Path, facts: dict[str, ShardFacts]) -> Manifest:
    """Join verdicts and statuses: selection, quarantine, then the manifest."""
    tokens = [facts[task.name] for task in plan.token_tasks()]
    views = _view_facts(plan, facts)
    images = [shard for view in views.values() for shard in view.shards]
    selection = select(plan, read_token_rows(output, tokens), read_bad_images(output, images))
    write_quarantine(output / "quarantine.parquet", selection.entries, plan.config)
    selected = write_shard(output, "selection.arrow", selection.columns, SELECTION_SCHEMA)
    load_tokenizer(plan.config.tokenizer).save_pretrained(str(output / TOKENIZER))
    write_json(output / CONFIG, asdict(plan.config))
    shards = [*tokens, *images, selected]
    counts = selection.counts() | {
        "images": len(plan.image_ids),
        "repairs": dict(sorted(plan.repairs.items())),
    }
    manifest = Manifest(
        format=FORMAT,
        fingerprint=digest([[shard.path, shard.sha256] for shard in shards]),
        plan=plan.digests,
        tokenizer=asdict(plan.tokenizer),
        template=plan.template.name,
        image_token=IMAGE_TOKEN_INDEX,
        counts=counts,
        mixture=selection.mixture,
        tokens=tokens,
        views=views,
        selection=selected,
        versions={
            name: importlib.metadata.version(name)
            for name in ("lapilli", "pyarrow", "pillow", "tokenizers", "transformers", "ray")
        },
    )
    write_manifest(output, manifest)
    return read_manifest(output)


def _view_facts(plan: BuildPlan, facts: dict[str, ShardFacts]) -> dict[str, ViewFacts]:
    tasks = plan.image_tasks()
    return {
        view: ViewFacts(
            asdict(spec),
            asdict(plan.codecs[view]),
            plan.images_per_shard(view),
            [facts[task.name] for task in tasks if task.name.startswith(f"images/{view}/")],
        )
        for view, spec in plan.config.views.items()
    }
