"""Processes that begin with torch, DeepSpeed and lapilli imported: a start takes no seconds.

A server imports them once a test process and forks. A worker has the environment of the test at
the time of its start, as a spawned one would.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from torch.multiprocessing.spawn import start_processes

__all__ = ["process", "spawn"]

IMPORTED = ["lapilli.train.worker.loop", "lapilli.train.engine.deepspeed_engine", "tests.factories"]
Environment = dict[str, str]


def process(target: Callable[..., object], *args: Any) -> BaseProcess:
    """A process, not started yet."""
    return context().Process(target=_run, args=(dict(os.environ), target, *args))


def spawn(worker: Callable[..., object], args: tuple[Any, ...] = (), *, nprocs: int) -> None:
    """Run `worker(rank, *args)` in processes to their end.

    Raises:
        ProcessRaisedException, ProcessExitedException: The first that failed; all are ended.
    """
    context()
    start_processes(
        _run_rank, (dict(os.environ), worker, args), nprocs=nprocs, start_method="forkserver"
    )


def context() -> ForkServerContext:
    """The server that forks."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    return found


def _run(environment: Environment, target: Callable[..., object], *args: Any) -> None:
    _be_in(environment)
    target(*args)


def _run_rank(
    rank: int, environment: Environment, worker: Callable[..., object], args: tuple[Any, ...]
) -> None:
    _be_in(environment)
    worker(rank, *args)


def _be_in(environment: Environment) -> None:
    os.environ.clear()
    os.environ.update(environment)
