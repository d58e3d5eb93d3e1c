"""The tables of the calculation: minutes of mixtures on clusters, and what the driver holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.benchmarks.harness import Bar, Spread, draw_bars, provenance, publish
from pipelines.benchmarks.scaling.inputs import ScalingConfig, measured_per_core
from pipelines.benchmarks.scaling.model import (
    PLACES,
    Place,
    Work,
    driver_memory,
    predict,
    temporary_disk,
)
from pipelines.cli.command import parse, say

__all__ = ["CASES", "main"]

# Distinct images and records; the 665K names some images twice, and has records without one.
MIXTURES = {
    "558K": (558_128, 558_128),
    "665K": (624_610, 665_298),
    "100M": (100_000_000, 100_000_000),
}
NODES = (1, 16, 100)
CASES: list[tuple[str, int, Place]] = [
    (mixture, nodes, place) for mixture in MIXTURES for nodes in NODES for place in PLACES
]
DRIVER_RECORDS = {"665K": 665_298, "100M": 100_000_000, "1B": 1_000_000_000}
SHOWN = {
    "case": "case", "place": "place", "limit": "limit", "images/s": "images_per_second",
    "plan": "plan_minutes", "shards": "shards_minutes", "all": "all_minutes",
}  # fmt: skip
SHOWN_DRIVER = {
    "records": "case", "memory, GB": "memory_gb", "with a store": "memory_store_gb",
    "TMPDIR, GB": "temporary_gb", "task file, GB": "task_file_gb",
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Tell both tables and add their rows."""
    about = "How long 558K, 665K and 100M records take on clusters, and what the driver holds."
    config = parse(ScalingConfig, argv, about)
    node = replace(config.node, per_core=config.node.per_core or measured_per_core())
    config = replace(config, node=node)
    head = provenance(("ray",), "scaling", argv)
    rows = [_row(config, mixture, nodes, place) for mixture, nodes, place in CASES]
    title = f"a calculation from {node.per_core:,.0f} images/s of a core; minutes"
    publish("scaling", head, rows, SHOWN, title=title, save=config.save)
    held = [_driver_row(config, case, records) for case, records in DRIVER_RECORDS.items()]
    publish(
        "scaling_driver", head, held, SHOWN_DRIVER, title="what the driver holds", save=config.save
    )
    say(
        f"plan: the driver's planning and listing, with {config.driver.start_seconds:.0f} s until "
        "every worker works; limit: what takes most of the whole"
    )
    if config.plot:
        _draw(Path(config.plot), config, rows)
    return 0


def _row(config: ScalingConfig, mixture: str, nodes: int, place: Place) -> dict[str, Any]:
    images, records = MIXTURES[mixture]
    found = predict(config, Work(nodes=nodes, images=images, records=records, place=place))
    rate = images / found.shards
    before = found.driver["start"] + found.driver["planning"] + found.driver["listing"]
    work = next(found.parts[n] for n in ("processors", "latency", "upload") if n in found.parts)
    store = config.store
    return {
        "case": f"{mixture} {nodes}x{config.node.cores}", "place": place,
        "processors": round(images / work), "images_per_second": round(rate),
        "limit": found.limit,
        "read_gb_per_second": round(rate * config.source_kb / 1e6, 2),
        "written_gb_per_second": round(rate * config.node.image_bytes / 1e9, 2),
        "shards_minutes": round(found.shards / 60, 1),
        "all_minutes": round(found.seconds / 60, 1),
        "per_core": round(config.node.per_core, 1),
        "plan_minutes": round(before / 60, 1),
        "finish_minutes": round(found.driver["finishing"] / 60, 1),
        "latency_ms": store.latency_ms, "image_calls": store.image_calls,
        "in_flight": store.in_flight, "prefixes": store.prefixes,
        "driver_rows": config.driver.rows,
    }  # fmt: skip


def _driver_row(config: ScalingConfig, case: str, records: int) -> dict[str, Any]:
    here, stored = temporary_disk(config, records)
    return {
        "case": case, "records": records,
        "memory_gb": round(driver_memory(config, records, in_store=False) / 1e9, 1),
        "memory_store_gb": round(driver_memory(config, records, in_store=True) / 1e9, 1),
        "temporary_gb": round(here / 1e9, 1), "task_file_gb": round(stored / 1e9, 1),
        "record_bytes": config.driver.record_bytes, "facts_bytes": config.driver.facts_bytes,
        "text_bytes": config.driver.text_bytes,
    }  # fmt: skip


def _draw(path: Path, config: ScalingConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Minutes of LLaVA's 665K; those of 100M would leave nothing to see of them."""
    bars = [
        Bar(
            f"{row['case'].removeprefix('665K ')}, {row['place']}",
            Spread(*[row["all_minutes"]] * 3),
            "ours",
            row["limit"],
        )
        for row in rows
        if row["case"].startswith("665K")
    ]
    node, store, shared = config.node, config.store, config.shared_disk
    draw_bars(
        path, f"Preprocessing of 665K records on nodes of {node.cores} cores",
        "minutes, by calculation", bars,
        f"{node.per_core:,.0f} images/s of a core; disks {node.disk_mb:,.0f} MB/s, network "
        f"{node.network_gbit:.0f} Gbit/s a node; store {store.latency_ms:.0f} ms a call, "
        f"{store.requests:,.0f} calls/s; shared disk {shared.mb:,.0f} MB/s, "
        f"{shared.operations:,.0f} operations/s.",
    )  # fmt: skip
