"""One side of the topic `build`, once, in a process of its own.

python -m pipelines.benchmarks.sides.build_sides SIDE '{"photos": DIR, "output": DIR, ...}'

Every side turns the same photos into squares of 336 px by the same work and stores them in its own
system's natural form. What it prints is one line of JSON. Its seconds begin when everything is
imported (and Ray is up) and end when all is written; the processes a system starts for its workers,
with their imports, are in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from lapilli.data.images.codecs import resolve_codecs
from lapilli.data.images.view import ImageSpec, prepare
from lapilli.data.mounts import Located
from lapilli.data.planning.shard_task import ImageTask, writer_version
from pipelines.benchmarks.sides.image_sides import FILL, SIZE, llava_square

__all__ = ["SIDES", "Job", "pixels", "shown_side", "write_alone"]

PIXEL_BYTES = SIZE * SIZE * 3
SHARD = 64 * 2**20 // PIXEL_BYTES  # images in a file of 64 MiB, ours and where others let us choose
SPEC = ImageSpec(size=SIZE, fill=FILL, resizer="torch")


@dataclass(frozen=True)
class Job:
    """What a side is to do.

    Attributes:
        photos: Folder with the photos.
        output: An empty folder.
        count: Photos; the folder's are taken in order.
        work: `best` is lapilli's own `prepare`; `pillow` pads and resizes on Pillow, as LLaVA does.
        workers: Processes.
    """

    photos: str
    output: str
    count: int
    work: str
    workers: int = 2

    @property
    def paths(self) -> list[Path]:
        """The photos."""
        return sorted(Path(self.photos).glob("*.jpg"))[: self.count]


Timed = dict[str, float]
Side = Callable[[Job], Timed]


def pixels(path: Path, work: str) -> np.ndarray:
    """A photo's square, uint8 [336, 336, 3]."""
    data = path.read_bytes()
    return prepare(data, SPEC) if work == "best" else np.asarray(llava_square(data))


def shown_side(side: str) -> str:
    """A side as a reader sees it."""
    return SIDES[side][0]


# ---- floors --------------------------------------------------------------------------------------


def write_alone(paths: Sequence[Path], output: Path, work: str, prefix: str = "") -> str:
    """A bare loop: read, make square, write, hash; a file of 64 MiB after the other."""
    digest = ""
    for start in range(0, len(paths), SHARD):
        hashed = hashlib.sha256()
        with (output / f"{prefix}{start:08d}.raw").open("wb") as file:
            for path in paths[start : start + SHARD]:
                square = np.ascontiguousarray(pixels(path, work)).data
                file.write(square)
                hashed.update(square)
        digest = hashed.hexdigest()
    return digest


def _bare(job: Job) -> Timed:
    return _timed(lambda: write_alone(job.paths, Path(job.output), job.work))


def _two_bare(job: Job) -> Timed:
    def begun(pool: ProcessPoolExecutor) -> Iterator[str]:
        parts = [job.paths[start :: job.workers] for start in range(job.workers)]
        names = [f"{number}-" for number in range(job.workers)]
        write = partial(_write_part, output=Path(job.output), work=job.work)
        return pool.map(write, parts, names)

    # Its processes are there and have imported everything: nothing but the work is in the floor.
    with ProcessPoolExecutor(job.workers, get_context("forkserver")) as pool:
        list(pool.map(_ready, range(4 * job.workers)))
        return _timed(lambda: list(begun(pool)))


def _ready(number: int) -> int:
    import torch

    torch.set_num_threads(1)
    time.sleep(0.3)  # so that every process gets some
    return number


def _write_part(paths: list[Path], name: str, *, output: Path, work: str) -> str:
    return write_alone(paths, output, work, name)


# ---- ours ----------------------------------------------------------------------------------------


def _tasks(job: Job) -> list[Any]:
    if job.work != "best":
        raise SystemExit("lapilli: has its own work; --work best")
    codecs, places = resolve_codecs("torch"), [_place(path) for path in job.paths]
    return [
        ImageTask(
            name=f"images/view/{start:08d}.arrow", writer=writer_version(), root=job.photos,
            images=tuple(places[start : start + SHARD]), spec=SPEC, codecs=codecs,
        )
        for start in range(0, len(places), SHARD)
    ]  # fmt: skip


def _place(path: Path) -> Located:
    stat = path.stat()
    return Located(
        image_id=path.name, container=path.name, size=stat.st_size, mtime_ns=stat.st_mtime_ns
    )


def _here(job: Job) -> Timed:
    from lapilli.data.building.runners import run_here

    tasks = _tasks(job)
    return _timed(lambda: list(run_here(tasks, Path(job.output), 1)))


def _lapilli(job: Job) -> Timed:
    """Twice with the same workers: first they are started, then they are there."""
    from lapilli.data.building.runners import run_on_ray
    from lapilli.data.ray_session import ray_session

    tasks = _tasks(job)
    with ray_session():
        cold = _timed(lambda: list(run_on_ray(tasks, Path(job.output) / "cold", job.workers)))
        shutil.rmtree(Path(job.output) / "cold")  # no more of the disk and its cache than others
        before = _processor_seconds()
        warm = _timed(lambda: list(run_on_ray(tasks, Path(job.output) / "warm", job.workers)))
        spent = {pid: (name, used) for pid, (name, used) in _processor_seconds().items()}
    rays_own = sum(
        used - before.get(pid, (name, 0.0))[1]
        for pid, (name, used) in spent.items()
        if not name.startswith(("ray::IDLE", "ray::Map", "ray::map", "python", "ray::Read"))
    )
    return warm | {"cold_seconds": cold["seconds"], "rays_own_seconds": round(rays_own, 2)}


def _processor_seconds() -> dict[int, tuple[str, float]]:
    """Processor seconds of this process and all it has started, by process."""
    import psutil

    found: dict[int, tuple[str, float]] = {}
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
            title = " ".join(process.cmdline()[:1]) or process.name()
        except psutil.Error:
            continue
        found[process.pid] = title, times.user + times.system
    return found


# ---- others --------------------------------------------------------------------------------------


def _plain_ray(job: Job) -> Timed:
    """As Ray's own guides put it: read the files, map, write Parquet."""
    import ray
    import ray.data

    def squares(batch: Any) -> dict[str, Any]:
        made = [_square_of(data, job.work) for data in batch["bytes"]]
        return {"pixels": [square.tobytes() for square in made]}

    def work() -> None:
        read = ray.data.read_binary_files([str(path) for path in job.paths])
        read.map_batches(squares, batch_size=64).write_parquet(str(Path(job.output) / "parquet"))

    ray.init("local", num_cpus=job.workers, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        return _timed(work)
    finally:
        ray.shutdown()


def _plain_pillow(job: Job) -> Timed:
    """The same with what people put into it: Pillow's padding and bicubic."""
    return _plain_ray(replace(job, work="pillow"))


def _square_of(data: bytes, work: str) -> np.ndarray:
    return prepare(data, SPEC) if work == "best" else np.asarray(llava_square(data))


def _datasets(job: Job) -> Timed:
    datasets: Any = import_module("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"pixels": datasets.Value("large_binary")})
    paths = datasets.Dataset.from_dict({"path": [str(path) for path in job.paths]})

    def square(row: dict[str, str]) -> dict[str, bytes]:
        return {"pixels": pixels(Path(row["path"]), job.work).tobytes()}

    return _timed(
        lambda: paths.map(
            square, num_proc=job.workers, features=features, remove_columns=["path"],
            cache_file_name=str(Path(job.output) / "cache.arrow"), writer_batch_size=SHARD,
        )
    )  # fmt: skip


def _webdataset(job: Job) -> Timed:
    return _by_parts(job, _write_tar)


def _write_tar(paths: list[Path], name: str, *, output: Path, work: str) -> str:
    webdataset: Any = import_module("webdataset")
    pattern = str(output / f"{name}%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SHARD, verbose=0) as sink:
        for path in paths:
            sink.write({"__key__": path.stem, "rgb": pixels(path, work).tobytes()})
    return name


def _mosaic(job: Job) -> Timed:
    import_mosaic()
    return _by_parts(job, _write_mds)


def import_mosaic() -> Any:
    """mosaicml-streaming; torchvision, which only its readers of known datasets need, may lack."""
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module: Any = types.ModuleType(f"torchvision{name}")
            module.__spec__ = ModuleSpec(module.__name__, None)
            module.VisionDataset = module.to_tensor = object
            sys.modules[module.__name__] = module
    return import_module("streaming")


def _write_mds(paths: list[Path], name: str, *, output: Path, work: str) -> str:
    columns = {"pixels": "bytes"}
    with import_mosaic().MDSWriter(
        out=str(output / name), columns=columns, hashes=["sha256"], size_limit=64 * 2**20
    ) as sink:
        for path in paths:
            sink.write({"pixels": pixels(path, work).tobytes()})
    return name


def _by_parts(job: Job, write: Callable[..., str]) -> Timed:
    """A system whose writer is one process: as many as there are workers, each with its part."""

    def work() -> list[str]:
        parts = [job.paths[start :: job.workers] for start in range(job.workers)]
        names = [f"{number}-" for number in range(job.workers)]
        one = partial(write, output=Path(job.output), work=job.work)
        with ProcessPoolExecutor(job.workers, get_context("fork")) as pool:
            return list(pool.map(one, parts, names))

    return _timed(work)


def _litdata(job: Job) -> Timed:
    litdata: Any = import_module("litdata")
    return _timed(
        lambda: litdata.optimize(
            partial(_lit_square, work=job.work), [str(path) for path in job.paths],
            output_dir=str(Path(job.output) / "lit"), num_workers=job.workers,
            chunk_bytes=64 * 2**20, start_method="fork", verbose=False,
        )
    )  # fmt: skip


def _lit_square(path: str, *, work: str) -> dict[str, bytes]:
    return {"pixels": pixels(Path(path), work).tobytes()}


SIDES: dict[str, tuple[str, Side]] = {
    "bare": ("bare loop, one core", _bare),
    "two_bare": ("two bare loops", _two_bare),
    "here": ("lapilli, one process", _here),
    "lapilli": ("lapilli, Ray Data", _lapilli),
    "plain_ray": ("plain Ray Data", _plain_ray),
    "plain_pillow": ("plain Ray Data on Pillow", _plain_pillow),
    "datasets": ("datasets.map", _datasets),
    "webdataset": ("WebDataset", _webdataset),
    "mosaic": ("mosaicml-streaming", _mosaic),
    "litdata": ("litdata", _litdata),
}


def _timed(work: Callable[[], object]) -> Timed:
    started = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started}


def main(argv: Sequence[str]) -> int:
    """Run one side and print what it took."""
    import torch

    torch.set_num_threads(1)
    side, settings = argv
    job = Job(**json.loads(settings))
    sys.stdout.flush()
    kept = os.dup(1)  # what systems print goes to stderr: stdout has one line
    os.dup2(2, 1)
    found = SIDES[side][1](job)
    os.write(kept, (json.dumps(found) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
