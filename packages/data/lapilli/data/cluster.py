"""Ray for one script: the cluster it was submitted to, or a local one that ends with it."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lapilli.data.errors import DataError

__all__ = ["RayDied", "ray_session", "watched"]

Item = TypeVar("Item")

ASK_EVERY = 1.0  # seconds
LEAVE = 30.0  # seconds that what waits for Ray has to take notice that nobody listens


class RayDied(DataError):
    """Ray on the driver's machine is gone."""


@contextmanager
def ray_session() -> Generator[None]:
    """Use the Ray that is already here (a job's, a test's), or start one and stop it after.

    `RAY_ADDRESS` names a cluster (`ray job submit` sets it). Without it a local Ray is started on
    this machine; one left over from somebody else's script is never joined.
    """
    # A thread that still asks a Ray that is gone must not start another one.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # Ray Data notices a task's end at once and not 0.1 s later: a worker waits less for its next.
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
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


def watched(results: Callable[[], Iterable[Item]], *, leave: float = LEAVE) -> Iterator[Item]:
    """Yield from something that waits for Ray, and stop waiting when Ray on this machine has died.

    Ray's own calls wait for ever for a node whose raylet was killed. So they wait in a thread of
    their own, while this one asks every second whether the raylet is there. It must be faster than
    Ray, which notices after 12 seconds and ends this process without a word. An error of `results`
    is raised here.

    Args:
        results: Waits for Ray; called in a thread of its own.
        leave: Seconds its thread has to end after this one has stopped listening.

    Raises:
        RayDied: It has died; nothing more will come.
    """
    alive = _Alive()
    answers: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=16)
    stop = threading.Event()
    puller = threading.Thread(target=_pull, args=(results, answers, stop), daemon=True)
    puller.start()
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
        puller.join(0 if alive.is_dead else leave)


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
    """Whether the raylet of this process's node still listens."""

    def __init__(self) -> None:
        import ray

        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        self._address = node["NodeManagerAddress"], int(node["NodeManagerPort"])
        self.is_dead = False

    def require(self) -> None:
        """Knock at its port: of a process that has ended the system refuses it at once.

        A port that does not answer belongs to a node that is busy, or that is stopped to be
        looked at.
        """
        try:
            socket.create_connection(self._address, ASK_EVERY).close()
        except ConnectionRefusedError:
            self.is_dead = True
        except OSError:
            return
        if self.is_dead:
            raise RayDied(
                "Ray has died on this machine, perhaps for want of memory; run the same command "
                "again"
            )
