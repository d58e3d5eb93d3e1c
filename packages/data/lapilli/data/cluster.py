"""Ray for one script: the cluster it was submitted to, or a local one that ends with it."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lapilli.data.errors import DataError

__all__ = ["RayDied", "ray_session", "watched"]

Item = TypeVar("Item")

ASK_EVERY = 1.0  # seconds
LEAVE = 30.0  # seconds that what waits for Ray has to take notice
NO_ANSWER = 30.0  # seconds after which Ray's control service is taken for dead


class RayDied(DataError):
    """Ray on the driver's machine is gone."""


@contextmanager
def ray_session() -> Generator[None]:
    """Use the Ray that is already here (a job's, a test's), or start one and stop it after.

    `RAY_ADDRESS` names a cluster (`ray job submit` sets it). Without it a local Ray is started on
    this machine; one left over from somebody else's script is never joined.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        ray.init("local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def watched(results: Callable[[], Iterable[Item]]) -> Iterator[Item]:
    """Yield from something that waits for Ray, and stop waiting when Ray on this machine has died.

    Ray's own calls wait for ever for a node whose raylet was killed. So they wait in a thread of
    their own, while this one asks every second whether the node is alive; Ray notices after some
    12 seconds. An error of `results` is raised here.

    Raises:
        RayDied: It has died; nothing more will come.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    answers: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=16)
    stop = threading.Event()
    alive = _Alive(node, stop)
    threads = [
        threading.Thread(target=_pull, args=(results, answers, stop), daemon=True),
        threading.Thread(target=alive.ask, daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while True:
            try:
                kind, value = answers.get(timeout=ASK_EVERY)
            except queue.Empty:
                alive.require()
                continue
            if kind == "end":
                return
            if kind == "error":
                alive.require()
                raise value
            yield value
    finally:
        stop.set()
        for thread in threads:  # who still asks a Ray that is shut down would start another one
            thread.join(0 if alive.is_dead else LEAVE)


def _pull(
    results: Callable[[], Iterable[Any]],
    answers: queue.Queue[tuple[str, Any]],
    stop: threading.Event,
) -> None:
    """Pass on what comes, until it ends or nobody waits any more."""

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                answers.put((kind, value), timeout=ASK_EVERY)
                break

    try:
        for item in results():
            put("item", item)
            if stop.is_set():
                return
    except BaseException as error:
        put("error", error)
    put("end", None)


class _Alive:
    """Whether this machine's node of Ray still runs; asked in a thread, for it may not answer."""

    def __init__(self, node: str, stop: threading.Event) -> None:
        self._node = node
        self._stop = stop
        self._answered = time.monotonic()
        self._dead = False

    def ask(self) -> None:
        import ray

        while not self._stop.wait(ASK_EVERY):
            try:
                nodes: list[dict[str, Any]] = ray.nodes()
            except Exception:  # Ray is being stopped, or is gone: no answer is an answer
                continue
            self._dead = not any(n["Alive"] for n in nodes if n["NodeID"] == self._node)
            self._answered = time.monotonic()

    @property
    def is_dead(self) -> bool:
        return self._dead or time.monotonic() - self._answered > NO_ANSWER

    def require(self) -> None:
        if self.is_dead:
            raise RayDied(
                "Ray has died on this machine, perhaps for want of memory; run the same command "
                "again"
            )
