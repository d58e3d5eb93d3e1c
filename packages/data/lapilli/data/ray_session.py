"""Connect to the Ray cluster a job was submitted to, or start a local one for its duration."""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lapilli.data.errors import DataError
from lapilli.data.io.access import blame
from lapilli.data.local_ray import local_ray
from lapilli.data.ray_internals import set_variables, start_in_folder
from lapilli.data.record import excerpt

if TYPE_CHECKING:
    import psutil

__all__ = ["RayDied", "leave_working_folder", "ray_session", "watched"]

Item = TypeVar("Item")

QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
ASK_EVERY = 1.0  # seconds
REAP = 5.0  # seconds that a process that was killed has to be gone
LEAVE = 30.0  # seconds for a thread that waits for Ray to notice that it is abandoned


class RayDied(DataError):
    """Ray on the driver's machine is gone."""


@contextmanager
def ray_session() -> Generator[None]:
    """Use the Ray that is already here (a job's, a test's), or start one and stop it after.

    `RAY_ADDRESS` names a cluster (`ray job submit` sets it). Without it a local Ray is started on
    this machine, for this user and on loopback (`local_ray`); one left over from somebody else's
    script is never joined. One that does not come up in time, as on a busy machine, is tried once
    more.

    Raises:
        DataError: It does not come up or may not, or `RAY_ADDRESS` is no address.
    """
    set_variables()
    import ray

    if ray.is_initialized():
        yield
        return
    with nullcontext() if "RAY_ADDRESS" in os.environ else local_ray() as folder:
        with _own_sigterm():
            _start(folder)
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                ray.shutdown()
            raise
        ray.shutdown()


@contextmanager
def _own_sigterm() -> Generator[None]:
    """Keep the command's handler of SIGTERM: `ray.init` puts one in its place, a silent exit."""
    own = signal.getsignal(signal.SIGTERM)
    yield
    if callable(own) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, own)


def _start(folder: Path | None) -> None:
    """Join the cluster that is named, or start a Ray here; a second time if it is late.

    Args:
        folder: For the files of a local Ray; None joins.
    """
    import ray

    for is_last in (False, True):
        before = set(_children())
        try:
            if folder is None:
                ray.init(**QUIET)
            else:
                start_in_folder(folder, QUIET)
            return
        except Exception as error:
            with suppress(Exception):
                ray.shutdown()
            _end_left_over(before)
            line = _why_not(error)
            if is_last or not _may_be_late(error):
                raise line from error
            warnings.warn("Ray did not come up in time; trying once more", stacklevel=2)


def _why_not(error: Exception) -> DataError:
    """The line for what `ray.init` raises; a fault of the program is raised as it is."""
    why = excerpt(" ".join(str(error).split()) or type(error).__name__, 200)
    address = os.environ.get("RAY_ADDRESS")
    if isinstance(error, ValueError) and address is not None:
        return DataError(f"RAY_ADDRESS: {address!r} is no address ({why}); expected HOST:PORT")
    if isinstance(error, OSError) and not _may_be_late(error):
        return DataError(f"Ray cannot start: {blame(error) or why}")
    if not _may_be_late(error):
        raise error
    if address is not None:
        return DataError(
            f"RAY_ADDRESS: no Ray came up at {address!r} in time ({why}); check that its head runs "
            "and can be reached"
        )
    return DataError(
        f"Ray did not come up in time on this machine ({why}); it may be busy: run the same "
        "command again later"
    )


def _may_be_late(error: Exception) -> bool:
    """Whether an error is one that `ray.init` raises where processes are slower than it waits."""
    from ray.exceptions import RayError

    # For a raylet that is late it raises `Exception` itself.
    late = (RayError, RuntimeError, ConnectionError, TimeoutError)
    return isinstance(error, late) or type(error) is Exception


def _children() -> list[psutil.Process]:
    import psutil

    return psutil.Process().children(recursive=True)


def _end_left_over(before: set[psutil.Process]) -> None:
    """End what a start that failed has left running: Ray forgets the processes it waited for."""
    import psutil

    for process in _children():
        with suppress(psutil.Error):
            if process not in before and any("/ray/" in word for word in process.cmdline()):
                process.kill()
                process.wait(REAP)


def leave_working_folder(folder: str) -> None:
    """Take the folder that the user's command stood in off a worker's import path.

    Ray puts it there. Names `package.module:name` are not looked up in it (`load_builder`), unless
    PYTHONPATH names it.
    """
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in {str(Path(path).absolute()) for path in named if path} and folder in sys.path:
        sys.path.remove(folder)


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
    """Forward items until they end or the consumer has stopped."""

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
                "Ray has died on this machine, perhaps out of memory; run the same command again"
            )
