"""Execute the tasks of a plan on Ray Data's workers or in this process.

A runner takes tasks and yields the facts of finished shards, in any order.
"""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from lapilli.data.building.crash_guard import WORK, CrashGuard, journal_folder
from lapilli.data.building.run_task import begin_task, finished_task, run_task
from lapilli.data.building.task_file import TASKS, read_task, write_tasks
from lapilli.data.building.task_memory import task_memory
from lapilli.data.building.teachers import load_teacher
from lapilli.data.cluster.nodes import Demand, alive_nodes, check_possible, may_have, wait_for_nodes
from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.config import TargetConfig
from lapilli.data.errors import DataError
from lapilli.data.io.access import blame, system_error
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output, open_output
from lapilli.data.planning.shard_task import TargetTask, Task
from lapilli.data.ray_internals import fill_slots_at_once, within_pool
from lapilli.data.ray_session import RayDied, ray_session, watched
from lapilli.data.shards.files import StoredShard
from lapilli.data.shards.summaries import Summaries

__all__ = ["Runner", "check_pool", "group_sizes", "run_here", "run_on_ray"]

MOST_SHARDS = 8
EVERY_NODE = PoolConfig()
NOTHING = StoredShard(path="", rows=0, bytes=0, sha256="")
OWN = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}  # Ray's arguments, by resource
STORED = tuple(field.name for field in fields(StoredShard))

Result: TypeAlias = dict[str, Any]  # a shard's facts, or an error, as Ray Data passes them on
Runner: TypeAlias = Callable[[list[Task], Output, int], Iterator[ShardFacts]]


@dataclass(frozen=True)
class _Slots:
    """Where the tasks of a stage run.

    Attributes:
        workers: Tasks at the same time; 0 takes every core.
        pool: The nodes.
        bundle: What each task asks of one.
    """

    workers: int
    pool: PoolConfig
    bundle: dict[str, float]

    @property
    def other(self) -> dict[str, float]:
        """Resources by names that Ray does not know."""
        return {name: value for name, value in self.bundle.items() if name not in OWN}

    @property
    def options(self) -> dict[str, Any]:
        """Ray's arguments of a task."""
        named = {OWN[name]: value for name, value in self.bundle.items() if name in OWN}
        labels = self.pool.label_selector
        more = {"resources": self.other} | ({"label_selector": labels} if labels else {})
        return {"num_cpus": 0, **named, **{name: value for name, value in more.items() if value}}


def run_on_ray(
    tasks: list[Task],
    output: Output,
    workers: int,
    *,
    pool: PoolConfig = EVERY_NODE,
    on_note: Callable[[str], None] = lambda line: None,
) -> Iterator[ShardFacts]:
    """Run tasks on Ray Data, one block and one Ray task each; yields facts as they finish.

    Ray is started if it is not running and there is a task to run. Tasks are stored in one file
    beside the output; the driver and Ray hold only offsets into it. A worker that dies is replaced,
    and `crash_guard` records the image that it was decoding.

    Args:
        tasks: The shards to make.
        output: The dataset's folder or store; every worker must see it under this path.
        workers: Tasks at the same time; 0 takes every core.
        pool: The nodes that tasks run on, and what each asks of one.
        on_note: Called with a line while nodes are waited for.

    Raises:
        DataError: A task failed for a reason that the user can fix, such as a node with other
            libraries; a task's process died too often; no node can run one; Ray died.
    """
    _clear(output, tasks)
    if not tasks:
        return
    left = len(tasks)
    where = str(output.resolve())
    places = write_tasks(tasks, output)
    rows = [
        {"name": task.name, "place": place, "output": where}
        for task, place in zip(tasks, places, strict=True)
    ]
    try:
        with ray_session(), fill_slots_at_once() as begun:
            for target in _targets(tasks):
                if target.num_gpus:
                    check_possible(_devices(target, pool))
            slots = _find_slots(tasks, workers, pool, on_note)
            for stage in _stages(tasks, rows, slots, on_note):
                for row in stage:
                    if row["error"]:
                        said = row["error"]
                        raise DataError(said) if row["expected"] else RuntimeError(said)
                    begun()
                    left -= 1
                    yield StoredShard(**{name: row[name] for name in STORED})
    except RayDied as error:
        raise DataError(f"{error}, it continues with the {left} shards that are missing") from None
    finally:
        _clear(output, tasks)


def check_pool(pool: PoolConfig) -> None:
    """Require a node that a task can run on, or an autoscaler that could add one.

    Raises:
        DataError: There is none: a label or a resource that no node has.
    """
    check_possible(_one_task(pool))


def _one_task(pool: PoolConfig) -> Demand:
    """The least that a build needs; its memory is known when it is planned."""
    return Demand(
        workers=1, bundle=pool.bundle(CPU=1), pool=pool, setting="num_workers", group="build"
    )


def _find_slots(
    tasks: list[Task], workers: int, pool: PoolConfig, on_note: Callable[[str], None]
) -> _Slots:
    """What each task asks of a node, once there is one that can run a task.

    A node type of an autoscaler may not say how much memory it has, and a small machine may have
    less than a large image may need: then tasks run one at a time on a node, or ask for none.

    Raises:
        DataError: There is no such node, and none comes.
    """
    bundle = pool.bundle(CPU=1)
    if not pool.memory:
        needed = max(map(task_memory, tasks))
        nodes = [node for node in alive_nodes(pool.label_selector) if node.slots(bundle)]
        most = max((node.resources.get("memory", 0) for node in nodes), default=needed)
        bundle |= {"memory": float(min(needed, most))}
    demand = replace(_one_task(pool), bundle=bundle)
    if not pool.memory and not may_have([demand])[0]:
        demand = _one_task(pool)
        bundle = dict(demand.bundle)
    wait_for_nodes(demand, on_note)
    return _Slots(workers, pool, bundle)


def _stages(
    tasks: list[Task],
    rows: list[dict[str, Any]],
    slots: _Slots,
    on_note: Callable[[str], None],
) -> Iterator[Iterator[Result]]:
    """The tasks' results: pixels and ids, then each teacher's with actors of its own."""
    pairs = [*zip(tasks, rows, strict=True)]
    plain = [row for task, row in pairs if not isinstance(task, TargetTask)]
    if plain:
        yield _in_pool(plain, slots)
    for target in _targets(tasks):
        own = [row for task, row in pairs if isinstance(task, TargetTask) and task.target == target]
        if target.num_gpus:
            wait_for_nodes(_devices(target, slots.pool), on_note)
        yield watched(partial(_asked_of_teacher, own, target))


def _in_pool(rows: list[dict[str, Any]], slots: _Slots) -> Iterator[Result]:
    with within_pool(slots.pool.label_selector, slots.other):
        yield from watched(lambda: _mapped(rows, slots).iter_rows())


def _targets(tasks: list[Task]) -> list[TargetConfig]:
    """The teachers that are asked, in order."""
    asked = {repr(task.target): task.target for task in tasks if isinstance(task, TargetTask)}
    return [*asked.values()]


def _devices(target: TargetConfig, pool: PoolConfig) -> Demand:
    """The GPUs of a teacher's actors, wherever they are."""
    return Demand(
        workers=target.num_workers, bundle={"GPU": target.num_gpus},
        pool=PoolConfig(node_timeout=pool.node_timeout),
        setting=f"targets: num_workers of {target.teacher}", group="build",
    )  # fmt: skip


def _asked_of_teacher(rows: list[dict[str, Any]], target: TargetConfig) -> Any:
    """The results of a teacher's tasks, made by actors that load it once each."""
    import ray

    cores = int(ray.cluster_resources().get("CPU", 1))
    workers = min(target.num_workers, max(1, cores))
    mapped = _blocks(rows, target.num_workers).map_batches(
        _TeacherActor, fn_constructor_args=(target,), batch_size=None, batch_format="pyarrow",
        num_cpus=0 if target.num_gpus else 1, num_gpus=target.num_gpus or None,
        concurrency=target.num_workers if target.num_gpus else workers,
    )  # fmt: skip
    return mapped.iter_rows()


class _TeacherActor:
    """A process of Ray's with a teacher. One that dies is replaced, and its shards begun again."""

    def __init__(self, target: TargetConfig) -> None:
        with suppress(Exception):  # said by the first task, as a value: Ray starts actors anew
            load_teacher(target)

    def __call__(self, rows: pa.Table) -> Iterator[dict[str, list[Any]]]:
        yield from _run_rows(rows)


def _mapped(rows: list[dict[str, Any]], slots: _Slots) -> Any:
    """A Ray Data dataset that yields the tasks' results."""
    there = [node.slots(slots.bundle) for node in alive_nodes(slots.pool.label_selector)]
    return _blocks(rows, slots.workers or sum(there)).map_batches(
        _run_rows, batch_size=None, batch_format="pyarrow", concurrency=slots.workers or None,
        **slots.options,
    )  # fmt: skip


def _blocks(rows: list[dict[str, Any]], slots: int) -> Any:
    """A Ray Data dataset of the tasks, some a block."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised too
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # a shard's facts are passed on when it is finished
    blocks = [pa.Table.from_pylist(group) for group in _groups(rows, max(1, slots))]
    # Ray Data starts a task again without end when its process dies; `journal` sets the limit.
    # `from_arrow` would run a task for each block's schema, on any node.
    return ray.data.from_blocks(blocks)


def group_sizes(shards: int, slots: int) -> Iterator[int]:
    """How many shards each of Ray's tasks makes: fewer towards the end, so that all end together.

    Args:
        shards: All that are to be made.
        slots: Tasks at the same time.
    """
    while shards:
        size = max(1, min(MOST_SHARDS, shards // (2 * slots)))
        yield size
        shards -= size


def _groups(rows: list[dict[str, Any]], slots: int) -> Iterator[list[dict[str, Any]]]:
    """Rows for one of Ray's tasks each."""
    left = iter(rows)
    for size in group_sizes(len(rows), slots):
        yield list(islice(left, size))


def _run_rows(rows: pa.Table) -> Iterator[dict[str, list[Any]]]:
    """A task of Ray's: some shards, each flushed or stored while the next is made.

    The facts of each are passed on once it is finished.
    """
    unfinished: Future[Result] | None = None
    with ThreadPoolExecutor(1) as pool:
        for row in rows.to_pylist():
            finish = _begin_row(row)
            if unfinished:
                yield _block(unfinished.result())
            unfinished = pool.submit(finish)
        if unfinished:
            yield _block(unfinished.result())


def _block(result: Result) -> dict[str, list[Any]]:
    return {name: [value] for name, value in result.items()}


def _clear(output: Output, tasks: list[Task]) -> None:
    """Remove the working files of this build, or of one that was killed."""
    if isinstance(output, Path):
        shutil.rmtree(output / WORK, ignore_errors=True)
    elif tasks:
        for path in (output / WORK).files():
            if str(path.relative_to(output)).startswith(TASKS):
                path.unlink(missing_ok=True)


def _begin_row(row: dict[str, Any]) -> Callable[[], Result]:
    """Make a shard's rows; the returned function finishes the shard.

    Both halves return errors as values, since one exception would end the Ray Data dataset.
    """
    try:
        output = open_output(row["output"])
        guard = CrashGuard(journal_folder(output, row["name"]), row["name"])
    except Exception as error:
        return partial(_failed, row, error)
    try:
        task = read_task(output, row["place"])
        guard.examine(task)
        # When Ray retries a task, its first shards may exist already.
        facts = finished_task(task, _beside(task, output))
        finish = (lambda: facts) if facts else begin_task(task, output, guard.decoding)
    except Exception as error:
        guard.close()
        return partial(_failed, row, error)
    return partial(_finish_row, row, guard, finish)


def _beside(task: Task, output: Output) -> Summaries:
    """The facts stored beside a task's shard, if an earlier attempt made it."""
    shards = Summaries(output)
    shards.look_at(task.name)
    return shards


def _finish_row(row: dict[str, Any], guard: CrashGuard, finish: Callable[[], ShardFacts]) -> Result:
    try:
        return {"columns": "", **asdict(finish()), "error": "", "expected": False}
    except Exception as error:
        return _failed(row, error)
    finally:
        guard.close()


def _failed(row: dict[str, Any], error: Exception) -> Result:
    expected = isinstance(error, DataError)
    said = str(error) if expected else "".join(traceback.format_exception(error))
    if (found := system_error(error)) and (line := blame(found, row["output"])):
        said, expected = line, True
    return {**asdict(NOTHING), "error": said, "expected": expected}


def run_here(tasks: list[Task], output: Output, workers: int) -> Iterator[ShardFacts]:
    """Run tasks one after the other in this process: a runner without Ray, for small things.

    An image that crashes its decoder crashes this process.
    """
    del workers
    for task in tasks:
        yield run_task(task, output)
