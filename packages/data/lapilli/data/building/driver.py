"""Run a build: one Ray Data task per shard, then selection and manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from lapilli.data.building.finish import find_unchanged, finish, tidy
from lapilli.data.building.run_task import finished_task
from lapilli.data.building.runners import Runner, run_on_ray
from lapilli.data.errors import DataError
from lapilli.data.io.access import cannot_read, exists, is_folder, is_missing
from lapilli.data.io.addresses import split_root
from lapilli.data.io.atomic import TEMPORARY, ShardFacts, write_json
from lapilli.data.io.remote_path import Output, open_output
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.io.writer_lock import LOCK, only_writer
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.disk import check_disk
from lapilli.data.planning.shard_task import Task
from lapilli.data.shards.manifest import (
    PLAN,
    Manifest,
)
from lapilli.data.shards.summaries import Summaries

__all__ = [
    "BuildReport",
    "build",
]

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
    runner: Runner | None = None,
) -> BuildReport:
    """Carry out a plan: build what is missing or damaged, select, write the manifest last.

    A dataset that is updated stays valid until its new manifest is written: no file that the old
    manifest names is touched before.

    `on_progress(done, total)` is called after every shard. `runner` makes the shards; the default
    is `run_on_ray` on the nodes of the settings' `build`, `run_here` needs no Ray.

    Raises:
        DataError: The output holds something else or another build writes there, the disk is too
            small, a worker's libraries differ, an image changed meanwhile, Ray died, or too much is
            quarantined.
    """
    output = open_output(plan.config.output)
    with only_writer(output, "built"):
        made = runner or partial(run_on_ray, pool=plan.config.build)
        return _build(plan, output, on_progress, made)


def _build(plan: BuildPlan, output: Output, on_progress: Progress, runner: Runner) -> BuildReport:
    started = time.monotonic()
    _check_output(output, plan)
    tasks, shards = plan.tasks(), Summaries(output)
    shards.look()
    if (manifest := find_unchanged(plan, shards)) is not None:
        on_progress(len(tasks), len(tasks))
        return BuildReport(manifest, 0, len(manifest.shards()), time.monotonic() - started)
    facts = _finished(tasks, shards)
    missing = [task for task in tasks if task.name not in facts]
    reused = len(facts)
    check_disk(output, missing)
    if plan.previous is None:
        write_json(output / PLAN, plan.digests)
    on_progress(reused, len(tasks))
    for built in runner(missing, output, plan.config.num_workers):
        facts[built.path] = shards.keep(built)
        on_progress(len(facts), len(tasks))
    manifest = finish(plan, output, facts, shards)
    tidy(plan, output, manifest)
    reused += len(manifest.shards()) - len(tasks)  # those that stay as they are have no task
    return BuildReport(manifest, len(missing), reused, time.monotonic() - started)


def _check_output(output: Output, plan: BuildPlan) -> None:
    """The output is new, of the same plan, or to be amended; nothing else is mixed in."""
    path, digests = output / PLAN, plan.digests
    if plan.previous is None and exists(output) and not is_folder(output):
        raise DataError(f"output: {output} is a file; expected a folder; choose another --output")
    try:
        _refuse_addresses(output, plan)
        before = from_json(read_whole(path), dict[str, str])
        before = plan.previous.manifest.plan if plan.previous else before
    except OSError as error:
        if not is_missing(error):
            raise DataError(cannot_read(path, error)) from None
        if exists(output) and any(path.name != LOCK for path in output.iterdir()):
            raise DataError(
                f"output: {output} is not empty and no dataset; choose another --output"
            ) from None
        return
    except JsonError:
        raise DataError(
            f"output: {path} is damaged; remove {output} or choose another --output"
        ) from None
    changes = [
        _describe_change(name, before.get(name), digests.get(name))
        for name in {**before, **digests}
        if before.get(name) != digests.get(name)
    ]
    if changes and not plan.config.incremental:
        raise DataError(
            f"output: {output} was built with another {'; another '.join(changes)}; expected the "
            "same inputs and settings; pass --incremental to redo what has changed, or choose "
            "another --output"
        )


def _refuse_addresses(output: Output, plan: BuildPlan) -> None:
    """Refuse to amend a dataset of a root in a store that names its images by address."""
    roots = {parts[0] for one in plan.config.sources if (parts := split_root(one.images))}
    if not roots or plan.previous is None:
        return
    starts = tuple(f"{root}/" for root in roots)
    if any(name.startswith(starts) for name, _ in plan.previous.slots):
        raise DataError(
            f"output: {output} is of an earlier version, which names its images by address and not "
            "by their paths below the root; it can be read, and not amended: choose another "
            "--output"
        )


def _describe_change(name: str, before: Any, now: Any) -> str:
    """The name of what changed, with both values where they are text and no digest."""
    values = [str(value) for value in (before, now)]
    is_text = all(value is not None for value in (before, now)) and max(map(len, values)) != 64
    return f"{name} ({values[0]}, now {values[1]})" if is_text else name


def _finished(tasks: list[Task], shards: Summaries) -> dict[str, ShardFacts]:
    """Facts of the shards that an earlier run finished, by name; clears what it left half-done."""
    output = shards.output
    if isinstance(output, Path):
        if not exists(output):
            return {}
        for temporary in output.rglob(f".*{TEMPORARY}"):
            temporary.unlink(missing_ok=True)
    shards.fetch(task.name for task in tasks)
    with ThreadPoolExecutor() as pool:  # hashing gives the interpreter free: 1.5 GB/s a core
        found = pool.map(lambda task: finished_task(task, shards), tasks)
        return {facts.path: facts for facts in found if facts is not None}
