"""Store a build's tasks in one file; the driver and Ray pass only offsets around."""

from __future__ import annotations

import hashlib
import pickle
import uuid
from pathlib import Path
from typing import Any, TypedDict

from lapilli.data.building.crash_guard import WORK
from lapilli.data.errors import DataError
from lapilli.data.io.atomic import write_atomic
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.planning.shard_task import Task

__all__ = ["TASKS", "TaskLocation", "read_task", "write_tasks"]

TASKS = f"{WORK}/tasks-"  # and a name of this build's own


class TaskLocation(TypedDict):
    """A task's file below the output, and offset, size and SHA-256 of its bytes there."""

    file: str
    start: int
    size: int
    sha256: str


def write_tasks(tasks: list[Task], output: Output) -> list[TaskLocation]:
    """Write the tasks one after another and return the location of each."""
    places: list[TaskLocation] = []
    name = f"{TASKS}{uuid.uuid4().hex}.pickle"

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for task in tasks:
                data = pickle.dumps(task)
                start, sha256 = file.tell(), _digest(data)
                places.append({"file": name, "start": start, "size": len(data), "sha256": sha256})
                file.write(data)

    write_atomic(output / name, write)
    return places


def read_task(output: Output, place: TaskLocation) -> Task:
    """A task as the driver wrote it. Others may be able to write where the output lies.

    Raises:
        DataError: It is another one.
    """

    def read(file: Any) -> bytes:
        file.seek(place["start"])
        return file.read(place["size"])

    path = output / place["file"]
    if isinstance(path, RemotePath):
        data: bytes = path.read_with(read)
    else:
        with path.open("rb") as file:
            data = read(file)
    if _digest(data) != place["sha256"]:
        raise DataError(
            f"{path}: changed since this build wrote it; check that nothing else writes there and "
            "run the same command again"
        )
    return pickle.loads(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
