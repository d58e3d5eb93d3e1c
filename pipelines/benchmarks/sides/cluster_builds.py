"""A dataset planned and built on Ray nodes of this machine, once, in a process of its own.

python -m pipelines.benchmarks.sides.cluster_builds '{"root": ..., "output": ..., "nodes": 2, ...}'

Root and output are folders or addresses. What is printed is one line of JSON. Its seconds begin
when the nodes are up and end when the manifest is written; the workers that Ray starts, with their
imports, are in it. Each node has a core of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapilli.data.building.driver import build
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.images.view import ImageSpec
from lapilli.data.planning.plan import plan_build
from lapilli.data.ray_internals import set_variables
from lapilli.data.sources.root_address import with_root_address
from lapilli.data.text.tokenizer_files import train_tokenizer
from pipelines.benchmarks.material.photos import photo_name, write_photos
from pipelines.benchmarks.sides.image_sides import FILL

__all__ = ["ANNOTATIONS", "PHOTOS", "BuildJob", "make_inputs"]

ANNOTATIONS, PHOTOS = "mixture.json", "photos"
PHOTO_SIZE = (640, 480)
QUESTION, ANSWER = "What is in the picture?", "A made-up thing, number {number} of many."


@dataclass(frozen=True)
class BuildJob:
    """What is built.

    Attributes:
        root: Folder or address with `mixture.json` and `photos/`, as `make_inputs` writes it.
        output: Folder or address of the dataset, which is new.
        tokenizer: Folder.
        nodes: Ray nodes, of one core each.
        size: Side of the squares, in pixels.
        per_shard: Images in a shard.
    """

    root: str
    output: str
    tokenizer: str
    nodes: int
    size: int
    per_shard: int

    @property
    def config(self) -> BuildConfig:
        """The settings of the build."""
        given = BuildConfig(
            root=self.root, output=self.output, tokenizer=self.tokenizer, template="v1",
            sources=[SourceConfig(name="made", annotations=ANNOTATIONS, images=PHOTOS)],
            views={"pad": ImageSpec(size=self.size, fill=FILL, resizer="torch")},
            shard_bytes=self.per_shard * self.size * self.size * 3,
        )  # fmt: skip
        return with_root_address(given)


def make_inputs(root: Path, tokenizer: Path, images: int, distinct: int) -> float:
    """Write `images` records with an image each and a small tokenizer; links beyond `distinct`.

    Returns:
        Mean bytes of an image.
    """
    photos = root / PHOTOS
    distinct = min(distinct, images)
    taken = write_photos(photos, distinct, PHOTO_SIZE)
    for number in range(distinct, images):
        os.link(photos / photo_name(number % distinct), photos / photo_name(number))
    (root / ANNOTATIONS).write_text(
        json.dumps([_record(number) for number in range(images)]), encoding="utf-8"
    )
    train_tokenizer([QUESTION, ANSWER.format(number=1234567890)], tokenizer, vocab_size=320)
    return taken / distinct


def _record(number: int) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\n{QUESTION}"},
        {"from": "gpt", "value": ANSWER.format(number=number)},
    ]
    return {"id": str(number), "image": photo_name(number), "conversations": turns}


def _start_nodes(count: int) -> Any:
    """A Ray cluster of nodes with a core each; tried again where a busy machine is late."""
    from ray.cluster_utils import Cluster

    allowed = os.sched_getaffinity(0)
    for is_last in (False, False, True):
        cluster = Cluster()
        try:
            for core in sorted(allowed)[:count]:
                os.sched_setaffinity(0, {core})  # what a node starts stays on its core
                cluster.add_node(num_cpus=1, include_dashboard=False)
            return cluster
        except Exception:  # for a raylet that is late Ray raises `Exception` itself
            cluster.shutdown()
            if is_last:
                raise
        finally:
            os.sched_setaffinity(0, allowed)
    raise AssertionError("unreachable")


def _timed_build(job: BuildJob) -> dict[str, float]:
    set_variables()
    import ray

    cluster = _start_nodes(job.nodes)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    cluster.wait_for_nodes()
    try:
        ends: list[float] = []
        started = time.perf_counter()
        plan = plan_build(job.config)
        planned = time.perf_counter()
        report = build(plan, lambda done, total: ends.append(time.perf_counter()))
        ended = time.perf_counter()
    finally:
        ray.shutdown()
        cluster.shutdown()
    # The first call of on_progress is before any shard.
    return {
        "plan_seconds": planned - started,
        "first_seconds": ends[1] - planned,
        "shards_seconds": ends[-1] - planned,
        "finish_seconds": ended - ends[-1],
        "seconds": ended - started,
        "images": report.manifest.counts["images"],
        "shards": report.shards_built,
    }


def main(argv: Sequence[str]) -> int:
    """Build once and print what it took."""
    job = BuildJob(**json.loads(argv[0]))
    sys.stdout.flush()
    kept = os.dup(1)  # what libraries print goes to stderr: stdout has one line
    os.dup2(2, 1)
    found = _timed_build(job)
    os.write(kept, (json.dumps(found) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
