"""The live progress line of a build."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from rich.progress import Progress

from lapilli.data.building.runners import Runner
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.shard_task import ImageTask, Task
from lapilli.data.shards.files import open_table
from lapilli.data.shards.schemas import IMAGE_SCHEMA, OK
from pipelines.cli.command import progress_bar

__all__ = ["build_line", "describe_rate"]


@contextmanager
def build_line(runner: Runner) -> Generator[Runner]:
    """A runner that makes shards as `runner` does and keeps a live line of them meanwhile."""
    with progress_bar(fields=True) as bar:

        def run(tasks: list[Task], output: Output, workers: int) -> Iterator[ShardFacts]:
            return _followed(runner(tasks, output, workers), tasks, output, workers, bar)

        yield run


def _followed(
    made: Iterator[ShardFacts], tasks: list[Task], output: Output, workers: int, bar: Progress
) -> Iterator[ShardFacts]:
    """The shards as they come; an image counts when its shard is finished."""
    images = {task.name for task in tasks if isinstance(task, ImageTask)}
    total = sum(len(task.images) for task in tasks if isinstance(task, ImageTask))
    shards = bar.add_task("shards", total=len(tasks), fields=[])
    line = bar.add_task("images", total=total, fields=[]) if total else None
    started, done, unusable = time.monotonic(), 0, 0
    for facts in made:
        bar.advance(shards)
        if line is not None and facts.path in images:
            done += facts.rows
            unusable += _unusable(output, facts)
            seconds = time.monotonic() - started
            rate = describe_rate(done, seconds, workers or _cores(), unusable)
            bar.update(line, completed=done, fields=rate)
        yield facts


def describe_rate(images: int, seconds: float, cores: int, unusable: int) -> list[str]:
    """Images a second, of all cores and of one, and the quarantined ones; most important first."""
    rate = images / max(seconds, 1e-9)
    bad = [f"{unusable:,} quarantined"] if unusable else []
    return [f"{rate:,.0f} images/s", *bad, f"{rate / cores:,.0f} a core"]


def _unusable(output: Output, facts: ShardFacts) -> int:
    statuses = open_table(output, facts, IMAGE_SCHEMA, ["status"])["status"].to_pylist()
    return len(statuses) - statuses.count(OK)


def _cores() -> int:
    """Cores of the cluster if Ray runs, else of this process."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return len(os.sched_getaffinity(0))
