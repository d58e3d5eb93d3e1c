"""What a preprocessing run takes, from what is given: pure functions.

    seconds = start + planning + listing + finishing + max(parts of the shards' phase)

The README of this folder has each term with its reason. The driver's phases follow each other, so
they are added; while shards are made every part works at the same time, so the slowest decides.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lapilli.data.building.runners import group_sizes
from pipelines.benchmarks.scaling.inputs import ScalingConfig

__all__ = [
    "PLACES",
    "Place",
    "Prediction",
    "Work",
    "calls",
    "driver_memory",
    "predict",
    "temporary_disk",
]

Place: TypeAlias = Literal["disk", "store", "shared disk"]
PLACES: tuple[Place, ...] = ("disk", "store", "shared disk")


@dataclass(frozen=True)
class Work:
    """What is built, and where.

    Attributes:
        nodes: Nodes that build.
        images: Distinct images.
        records: Records.
        place: What images are read from and shards written to: each node's own disk, an object
            store, or one disk that all nodes share.
    """

    nodes: int
    images: int
    records: int
    place: Place


@dataclass(frozen=True)
class Prediction:
    """Seconds of a run.

    Attributes:
        driver: The driver's phases by name; they follow each other.
        parts: What each part would take for the shards alone, by name; the slowest decides.
    """

    driver: dict[str, float]
    parts: dict[str, float]

    @property
    def shards(self) -> float:
        """Seconds in which the shards are made."""
        return max(self.parts.values())

    @property
    def seconds(self) -> float:
        """Seconds of the whole."""
        return sum(self.driver.values()) + self.shards

    @property
    def limit(self) -> str:
        """The phase or the part that takes most of the whole."""
        part = max(self.parts, key=lambda name: self.parts[name])
        phases = {part: self.shards} | self.driver
        return max(phases, key=lambda name: phases[name])


def predict(config: ScalingConfig, work: Work) -> Prediction:
    """The seconds of a run, by phase and part."""
    return Prediction(_driver(config, work), _parts(config, work))


def calls(config: ScalingConfig, work: Work) -> float:
    """Calls to the store, of the driver and all workers."""
    store, shards = config.store, _shards(config, work)
    pages = store.listings * math.ceil(work.images / store.page_keys)
    return (
        store.plan_calls + pages + store.build_calls + work.images * store.image_calls
        + shards * (store.begin_calls + _upload_calls(config, work))
    )  # fmt: skip


def driver_memory(config: ScalingConfig, records: int, *, in_store: bool) -> float:
    """Bytes that the driver holds for records with an image each.

    Args:
        config: The inputs.
        records: Records.
        in_store: Whether the output is a store: what lies beside shards is then held too.
    """
    driver = config.driver
    each = driver.record_bytes + driver.facts_bytes * in_store
    return driver.base_mb * 1e6 + records * each


def temporary_disk(config: ScalingConfig, records: int) -> tuple[float, float]:
    """Bytes in the driver's `TMPDIR`, and in the output's task file while a build runs.

    Both hold the records' texts once; the task file also has a place for every image.
    """
    driver = config.driver
    texts = records * driver.text_bytes
    return texts, texts + records * driver.place_bytes


def _driver(config: ScalingConfig, work: Work) -> dict[str, float]:
    """Phases in which only the driver works, or tasks that it waits for."""
    driver, store, shared = config.driver, config.store, config.shared_disk
    planning = work.records / driver.rows
    if driver.task_rows:
        planning += work.records / (driver.task_rows * work.nodes * config.node.cores)
    listing, finishing = 0.0, _shards(config, work) * driver.finish_shard_ms / 1e3
    if work.place == "store":
        latency = store.latency_ms / 1e3
        pages = store.listings * math.ceil(work.images / store.page_keys)
        listing = latency * (store.plan_calls + pages / store.pages_at_once)
        finishing += latency * store.build_calls + store.fixed_seconds
    elif work.place == "shared disk":
        asked = work.images * shared.plan_operations
        listing = max(asked * shared.latency_ms / 1e3, asked / shared.operations)
    return {
        "start": driver.start_seconds, "planning": planning, "listing": listing,
        "finishing": finishing,
    }  # fmt: skip


def _parts(config: ScalingConfig, work: Work) -> dict[str, float]:
    node, store, shared = config.node, config.store, config.shared_disk
    cores = work.nodes * node.cores
    sizes = list(group_sizes(_shards(config, work), cores))
    shard = _shard(config, work)
    read = work.images * config.source_kb * 1e3
    written = work.images * node.image_bytes
    parts = {
        shard.slowest: _makespan(sizes, cores, shard, node.gap_seconds),
        "tasks": len(sizes) / config.driver.tasks,
    }
    if work.place == "disk":
        seconds = written / (node.disk_mb * 1e6) + read / (node.disk_read_mb * 1e6)
        return parts | {"disks": seconds / work.nodes}
    parts["network"] = (read + written) / (work.nodes * node.network_gbit / 8 * 1e9)
    if work.place == "store":
        parts["requests"] = work.images * store.image_calls / (store.requests * store.prefixes)
        if node.machine_cores:
            each = store.image_calls * store.server_ms
            each += node.image_bytes / 1e6 * store.server_ms_per_mb
            used = shard.images * shard.busy * _shards(config, work) + work.images * each / 1e3
            parts["machine"] = used / node.machine_cores
        return parts
    parts["bandwidth"] = (read + written) / (shared.mb * 1e6)
    parts["operations"] = work.images * shared.image_operations / shared.operations
    return parts


@dataclass(frozen=True)
class _Shard:
    """A shard as a worker makes it; seconds.

    Attributes:
        images: Images in it.
        busy: Of the processor, an image.
        wait: An image's calls, over those on their way at the same time.
        begin: What is waited for before the first image.
        store: What finishing it takes, in a thread beside the next shard.
    """

    images: float
    busy: float
    wait: float
    begin: float
    store: float

    @property
    def made(self) -> float:
        """Seconds until its rows are there: reading runs ahead of decoding."""
        return self.begin + self.images * max(self.busy, self.wait)

    @property
    def slowest(self) -> str:
        """What a worker's time goes to."""
        if self.store > self.made:
            return "upload"
        reads = self.images * max(self.busy, self.wait)
        waits = self.begin + reads * (self.wait > self.busy)
        return "latency" if waits > reads * (self.wait <= self.busy) else "processors"


def _shard(config: ScalingConfig, work: Work) -> _Shard:
    node, store, shared = config.node, config.store, config.shared_disk
    images = work.images / _shards(config, work)
    busy = 1 / node.per_core + work.records / work.images / node.tokens_per_core
    if work.place == "disk":
        return _Shard(images=images, busy=busy, wait=0, begin=0, store=0)
    if work.place == "shared disk":
        asked = shared.image_operations * shared.latency_ms / 1e3
        return _Shard(
            images=images, busy=busy, wait=asked / shared.in_flight, begin=asked, store=asked
        )
    latency, megabytes = store.latency_ms / 1e3, images * node.image_bytes / 1e6
    client = store.image_calls * store.client_ms + node.image_bytes / 1e6 * store.client_ms_per_mb
    return _Shard(
        images=images,
        busy=busy + client / 1e3,
        wait=latency * store.image_calls / store.in_flight,
        begin=latency * (store.begin_calls + store.image_calls),
        store=latency * _upload_calls(config, work) + megabytes / store.upload_mb,
    )


def _upload_calls(config: ScalingConfig, work: Work) -> int:
    """Calls to store a shard."""
    images = work.images / _shards(config, work)
    return config.store.store_calls + math.ceil(
        images * config.node.image_bytes / 1e6 / config.store.part_mb
    )


def _shards(config: ScalingConfig, work: Work) -> int:
    return math.ceil(work.images / config.node.shard_images)


def _makespan(sizes: Sequence[int], cores: int, shard: _Shard, gap: float) -> float:
    """Seconds until the last task ends, each taken by the core that is free first.

    In a task a shard is stored while the next is made; the last is waited for.
    """
    free = [0.0] * min(cores, len(sizes))
    for size in sizes:
        made = shard.made + (size - 1) * max(shard.made, shard.store) + shard.store
        heapq.heappush(free, heapq.heappop(free) + made + gap)
    return max(free)
