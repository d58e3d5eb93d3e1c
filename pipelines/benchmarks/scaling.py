"""What a whole preprocessing takes on machines that are not here: a calculation, not a measurement.

Each limit is a rate in images a second; the smallest decides. All assumptions are flags, so that a
team can put its own figures in.
"""

from __future__ import annotations

import csv
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapilli.data.building.runners import group_sizes
from pipelines.benchmarks.harness import RESULTS, Bar, Spread, add_row, draw_bars, provenance, table
from pipelines.cli.command import UsageError, parse, say

__all__ = ["Limits", "ScalingConfig", "limits", "main", "measured_per_core"]

SHARD_IMAGES = 198  # of 336 px in 64 MiB
PIXEL_BYTES = 336 * 336 * 3
MIXTURES = {
    "558K": (558_128, 558_128),
    "665K": (624_610, 665_298),
}  # records with an image (665K name some twice), records
NODES = (1, 16)


@dataclass(frozen=True)
class ScalingConfig:
    """What is assumed.

    Attributes:
        per_core: Images a second of a core, shards written and hashed; 0 takes the newest row of
            `results/build.csv` (Ray Data), by its workers.
        tokens_per_core: Records a second of a core into token shards (topic `tokens`).
        cores: Cores of a node.
        source_kb: Bytes of a source image, in kB.
        disk_mb: What a node's disk writes, in MB/s.
        disk_read_mb: What a node's disk reads, in MB/s.
        network_gbit: Of a node, in Gbit/s; in a store's case all bytes pass through it.
        store_requests: GETs a second that the store answers for one prefix.
        head_tasks: Ray Data's tasks a second on the head node.
        head_rows: Records a second that the driver plans and selects.
        start_seconds: Until all workers work: Ray, Ray Data's second look at the cluster, imports.
        gap_seconds: What a worker waits between two tasks of Ray's.
        plot: A PNG, SVG or PDF file for the picture.
        save: Add rows to `results/scaling.csv`.
    """

    per_core: float = 0.0
    tokens_per_core: float = 2_600.0
    cores: int = 64
    source_kb: float = 64.0
    disk_mb: float = 2_000.0
    disk_read_mb: float = 3_000.0
    network_gbit: float = 25.0
    store_requests: float = 5_500.0
    head_tasks: float = 90.0
    head_rows: float = 10_400.0
    start_seconds: float = 10.0
    gap_seconds: float = 0.1
    plot: str = ""
    save: bool = True

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name, value in vars(self).items():
            if isinstance(value, str | bool):
                continue
            if value < 0 or (not value and name not in ("per_core", "gap_seconds")):
                raise UsageError(f"{name}: {value}; expected more than 0")


def measured_per_core(rows: Path = RESULTS / "build.csv") -> float:
    """Images a second of a core by the newest row of Ray Data's side.

    Raises:
        UsageError: There is none.
    """
    with rows.open(newline="", encoding="utf-8") as file:
        ours = [row for row in csv.DictReader(file) if row["side"] == "lapilli, Ray Data"]
    if not ours:
        raise UsageError(f"{rows}: no row of Ray Data; run the topic build, or give --per_core")
    return float(ours[-1]["images_per_second"]) / int(ours[-1]["workers"])


@dataclass(frozen=True)
class Limits:
    """Images a second that each part allows, and the seconds that do not shrink with nodes."""

    processors: float
    disks: float
    network: float
    store: float
    head: float
    serial_seconds: float

    @property
    def least(self) -> tuple[str, float]:
        """The part that decides, and its rate."""
        rates = {name: rate for name, rate in vars(self).items() if name != "serial_seconds"}
        name = min(rates, key=lambda name: rates[name])
        return name, rates[name]


def limits(config: ScalingConfig, nodes: int, images: int, records: int, place: str) -> Limits:
    """The limits for `images` distinct ones and `records`, read and written at a `place`.

    Args:
        config: The assumptions.
        nodes: Machines.
        images: Distinct images.
        records: Records.
        place: `disk` is each node's own; `store` an object store with one prefix.
    """
    moved = config.source_kb * 1e3 + PIXEL_BYTES
    cores = nodes * config.cores
    # a core's rate with its share of the records' tokens
    rate = 1 / (1 / config.per_core + records / images / config.tokens_per_core)
    sizes = list(group_sizes(-(-images // SHARD_IMAGES), cores))
    seconds = _makespan(sizes, cores, SHARD_IMAGES / rate, config.gap_seconds)
    wide = float("inf")
    on_disk = place == "disk"
    seconds_of_disk = PIXEL_BYTES / (config.disk_mb * 1e6) + config.source_kb * 1e3 / (
        config.disk_read_mb * 1e6
    )
    return Limits(
        processors=images / seconds,
        disks=nodes / seconds_of_disk if on_disk else wide,
        network=wide if on_disk else nodes * config.network_gbit / 8 * 1e9 / moved,
        store=wide if on_disk else config.store_requests,
        head=images / (len(sizes) / config.head_tasks),
        serial_seconds=records / config.head_rows + config.start_seconds,
    )


def _makespan(sizes: Sequence[int], cores: int, shard_seconds: float, gap: float) -> float:
    """Seconds until the last of the tasks ends, each taken by the core that is free first."""
    free = [0.0] * cores
    for size in sizes:
        heapq.heappush(free, heapq.heappop(free) + size * shard_seconds + gap)
    return max(free)


def main(argv: Sequence[str]) -> int:
    """Tell the table and what decides in each case; add a row for each."""
    config = parse(ScalingConfig, argv, "How long 558K and 665K take on 64 and 1,024 cores.")
    config = replace(config, per_core=config.per_core or measured_per_core())
    head = provenance(("ray",), "scaling", argv)
    rows = [
        _row(config, mixture, nodes, place)
        for mixture in MIXTURES
        for nodes in NODES
        for place in ("disk", "store")
    ]
    columns = ("case", "on", "cores", "images/s", "limit", "reads", "writes", "shards", "all")
    table(
        f"a calculation from {config.per_core:,.0f} images/s of a core; GB/s, minutes", columns,
        [[value for name, value in row.items() if name != "per_core"] for row in rows],
    )  # fmt: skip
    written = {name: images * PIXEL_BYTES / 1e9 for name, (images, _) in MIXTURES.items()}
    say(", ".join(f"{name} writes {size:.0f} GB" for name, size in written.items()))
    say(
        f"all adds {config.start_seconds:.0f} s until every worker works, and what the driver does "
        f"alone: reading, checking, planning and selecting, {config.head_rows:,.0f} records a "
        "second"
    )
    if config.plot:
        _draw(Path(config.plot), config, rows)
    if config.save:
        path = [add_row("scaling", head | row) for row in rows][-1]
        say(f"{len(rows)} rows added to {path}")
    return 0


def _row(config: ScalingConfig, mixture: str, nodes: int, place: str) -> dict[str, Any]:
    images, records = MIXTURES[mixture]
    found = limits(config, nodes, images, records, place)
    name, rate = found.least
    seconds = images / rate
    return {
        "case": f"{mixture} {nodes}x{config.cores}", "place": place,
        "processors": round(found.processors), "images_per_second": round(rate), "limit": name,
        "read_gb_per_second": round(rate * config.source_kb / 1e6, 2),
        "written_gb_per_second": round(rate * PIXEL_BYTES / 1e9, 2),
        "shards_minutes": round(seconds / 60, 1),
        "all_minutes": round((seconds + found.serial_seconds) / 60, 1),
        "per_core": round(config.per_core, 1),
    }  # fmt: skip


def _draw(path: Path, config: ScalingConfig, rows: Sequence[dict[str, Any]]) -> None:
    bars = [
        Bar(
            f"{row['case']}, {row['place']}",
            Spread(*[row["images_per_second"]] * 3),
            "ours",
            f"{row['limit']}, {row['all_minutes']} min",
        )
        for row in rows
    ]
    draw_bars(
        path, "What limits a whole preprocessing, by calculation", "images a second", bars,
        f"{config.per_core:,.0f} images/s of a core as measured; disks {config.disk_mb:,.0f} MB/s, "
        f"network {config.network_gbit:.0f} Gbit/s a node, {config.store_requests:,.0f} GETs/s.",
    )  # fmt: skip
