"""What the calculation takes as given. Every input is a flag with its unit and its source.

Sources: "measured" names a topic or an entry of `results/LOG.md`; "code" a module whose constant it
is; "published" a vendor's page; what is "assumed" is a round figure of common hardware.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from pipelines.benchmarks.harness import RESULTS
from pipelines.cli.command import UsageError

__all__ = [
    "DriverInputs",
    "NodeInputs",
    "ScalingConfig",
    "SharedDiskInputs",
    "StoreInputs",
    "measured_per_core",
]

MAY_BE_0 = {
    "per_core", "gap_seconds", "latency_ms", "client_ms", "client_ms_per_mb", "server_ms",
    "server_ms_per_mb", "machine_cores", "task_rows", "finish_shard_ms", "base_mb", "plan_calls",
    "build_calls", "begin_calls", "store_calls", "fixed_seconds", "plan_operations",
}  # fmt: skip


@dataclass(frozen=True)
class NodeInputs:
    """A node that builds.

    Attributes:
        cores: Cores, each with a task of its own.
        per_core: Images a second of a core, shards written and hashed; 0 takes the newest row of
            `results/build.csv` (measured: topic `build`).
        tokens_per_core: Records a second of a core into token shards (measured: topic `tokens`).
        gap_seconds: What a worker waits between two tasks of Ray's (measured: LOG, 0.04 to 0.1).
        disk_mb: What its own disk writes, in MB/s (assumed: an NVMe disk).
        disk_read_mb: What its own disk reads, in MB/s (assumed).
        network_gbit: Its network, in Gbit/s (assumed).
        shard_images: Images in a shard (code: 64 MiB of 336 px).
        image_bytes: Bytes of a square (code: 336 x 336 x 3).
        machine_cores: Cores that nodes and store share, where one machine pretends to be all of
            them; 0 for machines of their own.
    """

    cores: int = 64
    per_core: float = 0.0
    tokens_per_core: float = 2_600.0
    gap_seconds: float = 0.1
    disk_mb: float = 2_000.0
    disk_read_mb: float = 3_000.0
    network_gbit: float = 25.0
    shard_images: int = 198
    image_bytes: int = 338_688
    machine_cores: int = 0


@dataclass(frozen=True)
class StoreInputs:
    """An object store, and how it is called.

    Attributes:
        latency_ms: Of a call, in ms (assumed; S3's guide to performance says 100 to 200 for a
            first byte, a store in the same rack has 1 to 5).
        requests: GET and HEAD calls a second for one prefix (published: Amazon S3, 5,500).
        prefixes: Prefixes that the images lie under (assumed: one folder).
        image_calls: Calls an image (code: obstore reads with a GET alone).
        in_flight: Images a task reads at the same time (code: `image_shard.READ_AHEAD`, four times as
            many when one is late).
        begin_calls: Calls of a worker, one after the other, before a shard's first image (code:
            `runners._begin_row`; counted: task file 2, facts 3).
        part_mb: Part of an upload, in MB (code: pyarrow sends parts of 10 MiB).
        store_calls: Calls beside the parts to store a shard (counted: begin and end of the upload,
            facts).
        upload_mb: What a single upload reaches, in MB/s (assumed).
        plan_calls: Calls of the driver, one after the other, in planning (counted: 10).
        page_keys: Keys of a page of a listing (published: S3, 1,000).
        listings: How often planning lists the images (counted: 1).
        pages_at_once: Pages that are asked for at the same time (code: 1, each names the next).
        build_calls: Calls of the driver, one after the other, from the lease to the manifest
            (counted: 35, for any number of shards).
        client_ms: Processor time of a worker for a call, in ms (measured: `scaling_measured`).
        client_ms_per_mb: The same for a MB that is stored, in ms (measured).
        server_ms: Processor time of the store for a call, in ms; counts where `machine_cores` is
            given (measured).
        server_ms_per_mb: The same for a MB that is stored, in ms (measured).
        fixed_seconds: What a build waits besides (code: `lease.SETTLE`).
    """

    latency_ms: float = 20.0
    requests: float = 5_500.0
    prefixes: int = 1
    image_calls: float = 1.0
    in_flight: int = 32
    begin_calls: int = 5
    part_mb: float = 10.5
    store_calls: int = 3
    upload_mb: float = 200.0
    plan_calls: int = 10
    page_keys: int = 1_000
    listings: int = 1
    pages_at_once: int = 1
    build_calls: int = 35
    client_ms: float = 0.36
    client_ms_per_mb: float = 1.3
    server_ms: float = 0.0
    server_ms_per_mb: float = 0.0
    fixed_seconds: float = 0.5


@dataclass(frozen=True)
class SharedDiskInputs:
    """One network file system (NFS, Lustre) that all nodes read and write.

    Attributes:
        mb: Read and written by all nodes together, in MB/s (assumed).
        operations: Metadata operations a second for all nodes together (assumed).
        latency_ms: Of a metadata operation, in ms (assumed: NFS in one room).
        plan_operations: Operations of the driver for an image, one after the other (code:
            `LocalFolder.locate` asks for rights, and for size and time, which a client may have
            from the listing).
        image_operations: Operations of a worker for an image (code: open, stat, close).
        in_flight: Images a task reads at the same time (code: `READERS`).
    """

    mb: float = 5_000.0
    operations: float = 20_000.0
    latency_ms: float = 0.5
    plan_operations: float = 2.0
    image_operations: float = 3.0
    in_flight: int = 4


@dataclass(frozen=True)
class DriverInputs:
    """The driver, on the head node.

    Attributes:
        rows: Records a second that it joins to a plan (measured: topic `plan_scale`, 665,298 in
            23.8 s of its processor); without `task_rows`, those that it plans by itself.
        task_rows: Records a second that a core scans in a task of Ray's (from measured: one
            process that does both, less the driver's share, 45 us each); 0 where planning has no tasks.
        tasks: Ray Data's tasks a second (measured: LOG, 90 to 94).
        start_seconds: Until every worker works: Ray, Ray Data's second look at the cluster,
            imports (measured: topic `build`, cold against warm).
        finish_shard_ms: Of finishing, for each shard, in ms (measured: 401 shards against 21 of the
            same 2,000 images, processor time).
        base_mb: Memory of the driver before it knows a record, in MB (measured: `plan_scale`).
        record_bytes: Memory for a record and its image at the end of a build, where it needs most,
            in bytes (measured: `plan_scale`, 303 beside 124 while planning).
        facts_bytes: Memory for what lies beside shards, of a record and its image, in bytes; held
            where the output is a store (measured: 54 and 33 of Base64).
        text_bytes: Text of a record on the temporary disk, in bytes (published: LLaVA's 665K has
            1.03 GB).
        place_bytes: An image's place in a task file, in bytes (measured: 60).
    """

    rows: float = 28_000.0
    task_rows: float = 22_000.0
    tasks: float = 90.0
    start_seconds: float = 10.0
    finish_shard_ms: float = 0.35
    base_mb: float = 260.0
    record_bytes: float = 303.0
    facts_bytes: float = 87.0
    text_bytes: float = 1_550.0
    place_bytes: float = 60.0


@dataclass(frozen=True)
class ScalingConfig:
    """What is assumed.

    Attributes:
        node: A node that builds.
        store: An object store.
        shared_disk: A network file system.
        driver: The driver.
        source_kb: Bytes of a source image, in kB (published: COCO's mean is 160, 64 at the 336 px
            of LLaVA's 558K).
        plot: A PNG, SVG or PDF file for the picture.
        save: Add rows to `results/scaling.csv` and `results/scaling_driver.csv`.
    """

    node: NodeInputs = field(default_factory=NodeInputs)
    store: StoreInputs = field(default_factory=StoreInputs)
    shared_disk: SharedDiskInputs = field(default_factory=SharedDiskInputs)
    driver: DriverInputs = field(default_factory=DriverInputs)
    source_kb: float = 64.0
    plot: str = ""
    save: bool = True

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        _require_numbers(self, "")


def _require_numbers(group: Any, before: str) -> None:
    for one in fields(group):
        name, value = f"{before}{one.name}", getattr(group, one.name)
        if is_dataclass(value):
            _require_numbers(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            least = "0 or more" if one.name in MAY_BE_0 else "more than 0"
            if not math.isfinite(value) or value < 0 or (not value and one.name not in MAY_BE_0):
                raise UsageError(f"{name}: {value}; expected a number, {least}")


def measured_per_core(rows: Path = RESULTS / "build.csv") -> float:
    """Images a second of a core by the newest row of Ray Data's side.

    Raises:
        UsageError: There is none.
    """
    with rows.open(newline="", encoding="utf-8") as file:
        ours = [row for row in csv.DictReader(file) if row["side"] == "lapilli, Ray Data"]
    if not ours:
        raise UsageError(
            f"{rows}: no row of Ray Data; run the topic build, or give --node.per_core"
        )
    return float(ours[-1]["images_per_second"]) / int(ours[-1]["workers"])
