"""The live progress line of a build, and lines in its place where there is no terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from rich.progress import Progress

from lapilli.data.building.runners import Runner
from lapilli.data.cluster_metrics import add
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.shard_task import ImageTask, Task
from lapilli.data.shards.files import StoredShard, open_table
from lapilli.data.shards.schemas import IMAGE_SCHEMA, OK
from pipelines.cli.command import console, progress_bar, say

__all__ = ["QUIET", "build_line", "describe_rate", "each_while", "waiting_line"]

QUIET = 30.0  # seconds between lines where there is no terminal to redraw one on


@contextmanager
def each_while(seconds: float, tell: Callable[[], None]) -> Generator[None]:
    """Call a function every so many seconds until the block ends, from a thread."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            tell()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def waiting_line(what: str, seconds: float) -> str:
    """A line for work that has not begun, with what is free in Ray's cluster, if Ray runs.

    Args:
        what: What is waited for: "the first shard".
        seconds: Since when.
    """
    line = f"  waiting for {what} for {seconds:.0f} s"
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return line
    has, free = ray.cluster_resources(), ray.available_resources()
    counts = [
        f"{free.get(name, 0):g} of {has[name]:g} {unit} free"
        for name, unit in (("CPU", "cores"), ("GPU", "GPUs"), ("HPU", "HPUs"))
        if has.get(name)
    ]
    is_busy = free.get("CPU", 0) < 1
    return line + (", the cluster is busy" if is_busy else "") + f" ({', '.join(counts)})"


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
    started, found, done, unusable = time.monotonic(), 0, 0, 0
    rate = list[str]()

    def tell() -> None:
        seconds = time.monotonic() - started
        if not found:
            say(waiting_line("the first shard", seconds))
        elif not console.is_terminal:
            counts = f"{found:,} of {len(tasks):,} shards, {done:,} of {total:,} images"
            say(", ".join([f"  {seconds:,.0f} s: {counts}", *rate]))

    with each_while(QUIET, tell):
        for facts in made:
            found += 1
            bar.advance(shards)
            add("lapilli_build_shards", 1, str(output))
            add("lapilli_build_bytes", facts.bytes, str(output))
            if line is not None and facts.path in images:
                bad = _unusable(output, facts)
                done, unusable = done + facts.rows, unusable + bad
                add("lapilli_build_images", facts.rows, str(output))
                add("lapilli_build_quarantined", bad, str(output))
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
    table = facts.table(["status"]) if isinstance(facts, StoredShard) else None
    if table is None:  # it was made before, and did not come with the task's result
        table = open_table(output, facts, IMAGE_SCHEMA, ["status"])
    statuses = table["status"].to_pylist()
    return len(statuses) - statuses.count(OK)


def _cores() -> int:
    """Cores of the cluster if Ray runs, else of this process."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return len(os.sched_getaffinity(0))
