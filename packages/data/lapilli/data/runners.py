"""Who makes the shards of a plan: Ray Data's workers, or this process.

A runner takes tasks and yields the facts of finished shards, in any order.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeAlias

from lapilli.data.cluster import ray_session
from lapilli.data.errors import DataError
from lapilli.data.output import Output, open_output
from lapilli.data.plan import Task
from lapilli.data.shards import ShardFacts
from lapilli.data.tasks import run_task

__all__ = ["Runner", "run_here", "run_on_ray"]

Runner: TypeAlias = Callable[[list[Task], Output, int], Iterator[ShardFacts]]


def run_on_ray(tasks: list[Task], output: Output, workers: int) -> Iterator[ShardFacts]:
    """Run tasks on Ray Data, one block and one Ray task each; yields facts as they finish.

    Ray is started if none runs, and not at all where there is nothing to do.

    Args:
        tasks: The shards to make.
        output: The dataset's folder or store; every worker must see it under this path.
        workers: Tasks at the same time; 0 takes every core.

    Raises:
        DataError: A task met a user's mistake, such as a node with other libraries.
    """
    if not tasks:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    where = str(output.resolve())
    rows = [{"task": pickle.dumps(task), "output": where} for task in tasks]
    with ray_session():
        dataset = ray.data.from_items(rows, override_num_blocks=len(tasks))
        mapped = dataset.map(_run_row, num_cpus=1, concurrency=workers or None)
        for row in mapped.iter_rows():
            if row["error"]:
                raise DataError(row["error"]) if row["expected"] else RuntimeError(row["error"])
            yield ShardFacts(row["path"], row["rows"], row["bytes"], row["sha256"])


def _run_row(row: dict[str, Any]) -> dict[str, Any]:
    """A task as Ray Data sees it: errors travel as values, since one exception ends a dataset."""
    result: dict[str, Any] = {"path": "", "rows": 0, "bytes": 0, "sha256": ""}
    try:
        result = asdict(run_task(pickle.loads(row["task"]), open_output(row["output"])))
    except DataError as error:
        return {**result, "error": str(error), "expected": True}
    except Exception:
        return {**result, "error": traceback.format_exc(), "expected": False}
    return {**result, "error": "", "expected": False}


def run_here(tasks: list[Task], output: Output, workers: int) -> Iterator[ShardFacts]:
    """Run tasks one after the other in this process: a runner without Ray, for small things."""
    del workers
    for task in tasks:
        yield run_task(task, output)
