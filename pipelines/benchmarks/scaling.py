"""What a whole preprocessing takes on machines that are not here: a calculation, not a measurement.

Each limit is a rate in images a second; the smallest decides. All assumptions are flags, so that a
team can put its own figures in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.benchmarks.harness import table
from pipelines.command import UsageError, parse, say

__all__ = ["Limits", "ScalingConfig", "limits", "main"]

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
        per_core: Images a second of a core, shards written and hashed (topic `build`, both cores
            together, halved).
        tokens_per_core: Records a second of a core into token shards (topic `tokens`).
        cores: Cores of a node.
        source_kb: Bytes of a source image, in kB.
        disk_mb: What a node's disk writes, in MB/s.
        disk_read_mb: What a node's disk reads, in MB/s.
        network_gbit: Of a node, in Gbit/s; in a store's case all bytes pass through it.
        store_requests: GETs a second that the store answers for one prefix.
        head_tasks: Ray Data's tasks a second on the head node.
        head_rows: Records a second that the driver plans and selects.
    """

    per_core: float = 200.0
    tokens_per_core: float = 2_600.0
    cores: int = 64
    source_kb: float = 64.0
    disk_mb: float = 2_000.0
    disk_read_mb: float = 3_000.0
    network_gbit: float = 25.0
    store_requests: float = 5_500.0
    head_tasks: float = 20.0
    head_rows: float = 10_400.0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name, value in vars(self).items():
            if value <= 0:
                raise UsageError(f"{name}: {value}; expected more than 0")


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
    tokens_share = records / config.tokens_per_core / (images / config.per_core)
    wide = float("inf")
    on_disk = place == "disk"
    seconds_of_disk = PIXEL_BYTES / (config.disk_mb * 1e6) + config.source_kb * 1e3 / (
        config.disk_read_mb * 1e6
    )
    return Limits(
        processors=nodes * config.cores * config.per_core / (1 + tokens_share),
        disks=nodes / seconds_of_disk if on_disk else wide,
        network=wide if on_disk else nodes * config.network_gbit / 8 * 1e9 / moved,
        store=wide if on_disk else config.store_requests,
        head=config.head_tasks * 8 * SHARD_IMAGES,  # up to 8 shards in a task of Ray's
        serial_seconds=records / config.head_rows,
    )


def main(argv: Sequence[str]) -> int:
    """Tell the table and what decides in each case."""
    config = parse(ScalingConfig, argv, "How long 558K and 665K take on 64 and 1,024 cores.")
    rows: list[list[object]] = []
    for mixture, (images, records) in MIXTURES.items():
        for nodes in NODES:
            for place in ("disk", "store"):
                found = limits(config, nodes, images, records, place)
                name, rate = found.least
                seconds = images / rate
                rows.append([
                    f"{mixture}, {nodes} x {config.cores}", place, round(found.processors),
                    round(rate), name, f"{seconds / 60:.1f}",
                    f"{(seconds + found.serial_seconds) / 60:.1f}",
                ])  # fmt: skip
    columns = ("cores", "data on", "processors", "images/s", "limit", "shards", "all (min)")
    table("a calculation; every assumption is a flag", columns, rows)
    written = {name: images * PIXEL_BYTES / 1e9 for name, (images, _) in MIXTURES.items()}
    say(", ".join(f"{name} writes {size:.0f} GB" for name, size in written.items()))
    say(
        f"whole adds what the driver does alone: reading, checking, planning and selecting, "
        f"{config.head_rows:,.0f} records a second"
    )
    return 0
