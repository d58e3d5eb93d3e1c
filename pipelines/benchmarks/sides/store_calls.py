"""What calls to a store cost by themselves, without a build, once, in a process of its own.

python -m pipelines.benchmarks.sides.store_calls '{"photos": ..., "output": ..., "count": 400, ...}'

`count` images are read as a build's workers read them, or objects of a shard's size are stored.
What is printed is one line of JSON: seconds of a call that has the store for itself, of the
processor for an image or an object, and of an upload.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lapilli.data.io.remote_path import RemotePath
from lapilli.data.mounts import Located, read_image
from pipelines.benchmarks.harness import clock
from pipelines.benchmarks.material.photos import photo_name

__all__ = ["CallJob"]


@dataclass(frozen=True)
class CallJob:
    """What is asked of the store.

    Attributes:
        photos: Address of the photos' folder.
        folder: The same folder on this machine, for the files' sizes.
        count: Images that are read at the same time as others; a quarter as many one by one.
        in_flight: At the same time.
        output: Address under which objects are stored.
        objects: Objects that are stored, one after the other; with any, nothing is read.
        object_bytes: Bytes of each.
    """

    photos: str = ""
    folder: str = ""
    count: int = 0
    in_flight: int = 16
    output: str = ""
    objects: int = 0
    object_bytes: int = 0


def _read(job: CallJob) -> dict[str, float]:
    def read(number: int) -> int:
        name = photo_name(number)
        address, size = f"{job.photos}/{name}", (Path(job.folder) / name).stat().st_size
        place = Located(image_id=address, container=address, size=size, mtime_ns=0)
        return len(read_image(Path("/"), place))

    read(0)  # the connection, and the client's threads
    alone = job.count // 4
    apart, _ = clock(lambda: [read(number) for number in range(alone)])
    with ThreadPoolExecutor(job.in_flight) as pool:
        together, _ = clock(lambda: list(pool.map(read, range(job.count))))
    return {
        "reads": 1 + alone + job.count,
        "alone_seconds": apart.wall / alone,
        "together_seconds": together.wall / job.count,
        "processor_seconds": together.cpu / job.count,
    }


def _store(job: CallJob) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="lapilli-") as folder:
        path = Path(folder) / "object"
        path.write_bytes(os.urandom(1 << 16) * (job.object_bytes >> 16))
        output = RemotePath(job.output)
        (output / "first").put(path)

        def store() -> None:
            for number in range(job.objects):
                (output / f"{number}").put(path)

        taken, _ = clock(store)
    megabytes = job.objects * job.object_bytes / 1e6
    return {
        "stored_mb": megabytes + job.object_bytes / 1e6,
        "mb_per_second": megabytes / taken.wall,
        "processor_seconds": taken.cpu / megabytes,
    }


def main(argv: Sequence[str]) -> int:
    """Call the store and print what it took."""
    job = CallJob(**json.loads(argv[0]))
    started = time.perf_counter()
    found = _store(job) if job.objects else _read(job)
    print(json.dumps(found | {"seconds": time.perf_counter() - started}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
