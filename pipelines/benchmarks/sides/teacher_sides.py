"""One side of the topic `teachers`, once, in a process of its own.

python -m pipelines.benchmarks.sides.teacher_sides SIDE '{"photos": DIR, "output": DIR, ...}'

Both sides give the same photos to the same teacher, which takes each image a fixed time, and store
its features in 8 bits. The floor is a bare process a worker: read, make square, ask, encode, write,
hash, flush. What is printed is one line of JSON. Its seconds begin when Ray is up, or the bare
processes are there with all imported; actors that Ray starts are in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lapilli.data.building.runners import run_on_ray
from lapilli.data.building.teachers import load_teacher
from lapilli.data.config import TargetConfig
from lapilli.data.images.codecs import resolve_codecs
from lapilli.data.images.view import ImageSpec, prepare
from lapilli.data.mounts import Located
from lapilli.data.planning.shard_task import TargetTask, writer_version
from lapilli.data.ray_session import ray_session
from lapilli.data.shards.target_rows import encode_rows

__all__ = ["SIDES", "TeacherJob", "paced"]

MODULE = "pipelines.benchmarks.sides.teacher_sides"
SIZE, SHARD = 96, 256  # pixels a side; images in a file
SPEC = ImageSpec(size=SIZE, fill=(0, 0, 0), aspect="stretch", resizer="pillow")


@dataclass(frozen=True)
class TeacherJob:
    """What a side is to do.

    Attributes:
        photos: Folder with the photos.
        output: An empty folder.
        count: Images.
        milliseconds: The teacher's, an image.
        rows: Vectors an image.
        width: Numbers of each.
        workers: Processes, each with a teacher.
    """

    photos: str
    output: str
    count: int
    milliseconds: float
    rows: int
    width: int
    workers: int = 2

    @property
    def paths(self) -> list[Path]:
        """The photos."""
        return sorted(Path(self.photos).glob("*.jpg"))[: self.count]

    @property
    def target(self) -> TargetConfig:
        """The teacher's settings."""
        return TargetConfig(
            teacher=f"{MODULE}:paced",
            rows=self.rows, width=self.width, size=SIZE, num_workers=self.workers,
            settings={"milliseconds": self.milliseconds},
        )  # fmt: skip


def paced(target: TargetConfig) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """A teacher that takes each image `settings.milliseconds` and gives cosines of its mean."""
    angles = np.arange(target.rows * target.width, dtype=np.float32)
    pace = float(target.settings["milliseconds"]) / 1000

    def teach(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        until = time.perf_counter() + pace * len(pixels)
        means = pixels.mean((1, 2, 3), dtype=np.float32)
        found = np.cos(means[:, None] / 40 + angles).reshape(-1, target.rows, target.width)
        time.sleep(max(0.0, until - time.perf_counter()))
        return found

    return teach


def _bare(job: TeacherJob) -> float:
    with ProcessPoolExecutor(job.workers, get_context("forkserver")) as pool:
        list(pool.map(_ready, range(4 * job.workers)))
        parts = [job.paths[start :: job.workers] for start in range(job.workers)]
        return _timed(lambda: list(pool.map(partial(_write, job=job), parts, range(job.workers))))


def _ready(number: int) -> int:
    time.sleep(0.3)  # so that every process gets some
    return number


def _write(paths: Sequence[Path], number: int, *, job: TeacherJob) -> str:
    """A worker's part: files of as many images as a shard has."""
    target, digest = job.target, ""
    teach = load_teacher(target)
    for start in range(0, len(paths), SHARD):
        hashed = hashlib.sha256()
        with (Path(job.output) / f"{number}-{start:08d}.raw").open("wb") as file:
            for first in range(start, min(start + SHARD, len(paths)), target.batch_size):
                here = paths[first : min(first + target.batch_size, start + SHARD)]
                squares = np.stack([prepare(path.read_bytes(), SPEC) for path in here])
                for rows in teach(squares):
                    for part in encode_rows(rows, target.storage):
                        file.write(part)
                        hashed.update(part)
            file.flush()
            os.fsync(file.fileno())
        digest = hashed.hexdigest()
    return digest


def _on_ray(job: TeacherJob) -> float:
    places = [_place(path) for path in job.paths]
    tasks = [
        TargetTask(
            name=f"targets/paced/{start:08d}.arrow", writer=writer_version(), root=job.photos,
            images=tuple(places[start : start + SHARD]),
            spec=SPEC, codecs=resolve_codecs("pillow"), target=job.target,
        )
        for start in range(0, len(places), SHARD)
    ]  # fmt: skip
    with ray_session():
        return _timed(lambda: list(run_on_ray([*tasks], Path(job.output), job.workers)))


def _place(path: Path) -> Located:
    stat = path.stat()
    return Located(
        image_id=path.name, container=path.name, size=stat.st_size, mtime_ns=stat.st_mtime_ns
    )


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


SIDES: dict[str, Callable[[TeacherJob], float]] = {"bare": _bare, "ray": _on_ray}


def main(argv: Sequence[str]) -> int:
    """Run one side and print what it took."""
    side, settings = argv
    kept = os.dup(1)  # what Ray prints goes to stderr: stdout has one line
    os.dup2(2, 1)
    seconds = SIDES[side](TeacherJob(**json.loads(settings)))
    os.write(kept, (json.dumps({"seconds": seconds}) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
