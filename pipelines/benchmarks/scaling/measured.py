"""The calculation held against builds: Ray nodes of this machine, a store with a delay a call.

Nothing is fitted to what is predicted. The rate of a core and the fixed seconds come from a build
of the same images on one node and this machine's disk, without a store, which takes turns with the
builds that are predicted; what a call costs comes from calls without a build
(`sides.store_calls`); how many calls there are is counted in the code.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.benchmarks.harness import Spread, by_turns, provenance, publish
from pipelines.benchmarks.scaling.inputs import (
    DriverInputs,
    NodeInputs,
    ScalingConfig,
    StoreInputs,
)
from pipelines.benchmarks.scaling.model import Work, calls, predict
from pipelines.benchmarks.sides.cluster_builds import PHOTOS, BuildJob, make_inputs
from pipelines.benchmarks.sides.slow_store import slow_store
from pipelines.benchmarks.sides.store_calls import CallJob
from pipelines.cli.command import UsageError, parse, say

__all__ = ["LocalBuild", "MeasuredConfig", "StoreCosts", "calibrated", "main"]

LOCAL = "one node, local disk"
PROBED = 400  # images, for the cost of a call
STORED = 4  # objects, for the cost of an upload
SECONDS = 900  # for one process
SHOWN = {
    "nodes": "nodes", "ms": "delay_ms", "predicted": "predicted_seconds",
    "measured": "measured_seconds", "error %": "error_percent", "calls": "calls_predicted",
    "counted": "calls_counted",
}  # fmt: skip


@dataclass(frozen=True)
class MeasuredConfig:
    """What is built.

    Attributes:
        images: Images, each with a record.
        photos: Distinct photos of 640x480; the others are links to them.
        size: Side of the squares, in pixels.
        per_shard: Images in a shard.
        nodes: Ray nodes, of one core each.
        delays: What every call to the store waits, in ms.
        rounds: Turns; the medians count.
        save: Add rows to `results/scaling_measured.csv`.
    """

    images: int = 4_000
    photos: int = 200
    size: int = 336
    per_shard: int = 190
    nodes: tuple[int, ...] = (1, 2)
    delays: tuple[float, ...] = (0.0, 20.0)
    rounds: int = 3
    save: bool = True

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("images", "photos", "size", "per_shard", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)}; expected 1 or more")
        if self.images < 3 * self.per_shard:
            raise UsageError(
                f"images: {self.images} in shards of {self.per_shard}; expected three shards or "
                "more, since the first is not counted"
            )
        cores = os.cpu_count() or 1
        if not self.nodes or min(self.nodes) < 1 or max(self.nodes) > cores:
            raise UsageError(f"nodes: {list(self.nodes)}; expected 1 to {cores}, the cores here")
        if not self.delays or not all(math.isfinite(d) and d >= 0 for d in self.delays):
            raise UsageError(f"delays: {list(self.delays)}; expected ms, 0 or more")


@dataclass(frozen=True)
class LocalBuild:
    """What a build on one node and a local disk took; seconds as in `sides.cluster_builds`."""

    plan_seconds: float
    first_seconds: float
    shards_seconds: float
    finish_seconds: float


@dataclass(frozen=True)
class StoreCosts:
    """What calls to the store cost without a delay and without a build.

    Attributes:
        image_calls: Calls for an image.
        call_seconds: A call that has the store for itself.
        client_seconds: Processor seconds of the caller, a call.
        client_seconds_per_mb: The same for a MB that is stored.
        server_seconds: Processor seconds of store and proxy, a call.
        server_seconds_per_mb: The same for a MB that is stored.
        upload_mb: MB/s of one upload.
    """

    image_calls: float
    call_seconds: float
    client_seconds: float
    client_seconds_per_mb: float
    server_seconds: float
    server_seconds_per_mb: float
    upload_mb: float


@dataclass
class _Cell:
    """Builds of a number of nodes at a delay."""

    nodes: int
    delay_ms: float
    calls: list[int] = field(default_factory=list[int])
    builds: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    @property
    def name(self) -> str:
        return f"{self.nodes} nodes, {self.delay_ms:g} ms"

    def phase(self, name: str) -> float:
        """Median seconds of a phase, as `sides.cluster_builds` names it."""
        return round(statistics.median(one[name] for one in self.builds), 2)


def main(argv: Sequence[str]) -> int:
    """Measure, predict, tell, and add a row for each number of nodes and delay."""
    config = parse(MeasuredConfig, argv, "Builds on 1 and 2 nodes, predicted and measured.")
    head = provenance(("ray", "torch", "pyarrow"), "scaling_measured", argv)
    with tempfile.TemporaryDirectory(prefix="lapilli-") as folder:
        rows = _Measurement(config, Path(folder)).rows()
    title = f"{config.images:,} images in shards of {config.per_shard}, predicted and measured"
    publish("scaling_measured", head, rows, SHOWN, title=title, save=config.save)
    return 0


class _Measurement:
    """Inputs on a disk, builds by turns, and rows."""

    def __init__(self, config: MeasuredConfig, folder: Path) -> None:
        self.config = config
        self.served, self.tokenizer = folder / "served", folder / "tokenizer"
        self.raw, self.out = self.served / "raw", folder / "out"
        (self.served / "out").mkdir(parents=True)
        taken = make_inputs(self.raw, self.tokenizer, config.images, config.photos)
        self.source_kb = taken / 1e3
        self.local: list[dict[str, float]] = []

    def rows(self) -> list[dict[str, Any]]:
        cells = [_Cell(nodes, d) for nodes in self.config.nodes for d in self.config.delays]
        clocks: dict[str, Callable[[], float]] = {LOCAL: self._build_here}
        clocks |= {cell.name: partial(self._build_in_store, cell) for cell in cells}
        costs = self._costs()
        spreads = by_turns(clocks, self.config.rounds, warm=False)
        local = LocalBuild(
            **{
                name: statistics.median(one[name] for one in self.local)
                for name in LocalBuild.__dataclass_fields__
            }
        )
        say(f"from one node and a local disk: {_told(asdict(local))}")
        say(f"of calls without a build: {_told(asdict(costs))}")
        given = calibrated(self.config, local, costs, self.source_kb)
        return [self._row(cell, spreads[cell.name], given) for cell in cells]

    def _row(self, cell: _Cell, spread: Spread, given: ScalingConfig) -> dict[str, Any]:
        delayed = given.store.latency_ms + cell.delay_ms
        images = self.config.images
        work = Work(nodes=cell.nodes, images=images, records=images, place="store")
        case = replace(given, store=replace(given.store, latency_ms=delayed))
        found = predict(case, work)
        return {
            "nodes": cell.nodes, "delay_ms": cell.delay_ms, "images": images,
            "per_shard": self.config.per_shard, "size": self.config.size,
            "rounds": self.config.rounds, "predicted_seconds": round(found.seconds, 2),
            "measured_seconds": round(spread.median, 2), "low": round(spread.low, 2),
            "high": round(spread.high, 2),
            "error_percent": round(100 * (found.seconds / spread.median - 1), 1),
            "limit": found.limit,
            "plan_predicted": round(found.driver["planning"] + found.driver["listing"], 2),
            "plan_measured": cell.phase("plan_seconds"),
            "shards_predicted": round(found.driver["start"] + found.shards, 2),
            "shards_measured": cell.phase("shards_seconds"),
            "finish_predicted": round(found.driver["finishing"], 2),
            "finish_measured": cell.phase("finish_seconds"),
            "calls_predicted": round(calls(case, work)),
            "calls_counted": round(statistics.median(cell.calls)),
            "per_core": round(case.node.per_core, 1), "latency_ms": round(delayed, 2),
        }  # fmt: skip

    def _build_here(self) -> float:
        shutil.rmtree(self.out, ignore_errors=True)
        found = self._build(nodes=1, root=str(self.raw), output=str(self.out), environment={})
        shutil.rmtree(self.out)
        self.local.append(found)
        return found["seconds"]

    def _build_in_store(self, cell: _Cell) -> float:
        output = self.served / "out" / "dataset"
        with slow_store(self.served, cell.delay_ms) as store:
            found = self._build(
                nodes=cell.nodes, root="s3://raw", output="s3://out/dataset",
                environment=store.environment,
            )  # fmt: skip
            cell.calls.append(store.calls())
            cell.builds.append(found)
        shutil.rmtree(output)
        return found["seconds"]

    def _build(
        self, *, nodes: int, root: str, output: str, environment: Mapping[str, str]
    ) -> dict[str, float]:
        job = BuildJob(
            root=root, output=output, tokenizer=str(self.tokenizer), nodes=nodes,
            size=self.config.size, per_shard=self.config.per_shard,
        )  # fmt: skip
        return _process("cluster_builds", asdict(job), environment)

    def _costs(self) -> StoreCosts:
        """Read images and store objects without a delay."""
        folder = self.raw / PHOTOS
        reads = CallJob(
            photos=f"s3://raw/{PHOTOS}", folder=str(folder), count=min(PROBED, self.config.images)
        )
        mb = self.config.per_shard * self.config.size**2 * 3
        writes = CallJob(output="s3://out/probe", objects=STORED, object_bytes=max(mb, 1 << 16))
        with slow_store(self.served, 0) as store:
            used = [store.processor_seconds()]
            read = _process("store_calls", asdict(reads), store.environment)
            asked = store.calls()
            used.append(store.processor_seconds())
            stored = _process("store_calls", asdict(writes), store.environment)
            used.append(store.processor_seconds())
        shutil.rmtree(self.served / "out" / "probe")
        each = asked / read["reads"]
        return StoreCosts(
            image_calls=each,
            call_seconds=read["alone_seconds"] / each,
            client_seconds=read["processor_seconds"] / each,
            client_seconds_per_mb=stored["processor_seconds"],
            server_seconds=(used[1] - used[0]) / asked,
            server_seconds_per_mb=(used[2] - used[1]) / stored["stored_mb"],
            upload_mb=stored["mb_per_second"],
        )


def calibrated(
    config: MeasuredConfig, local: LocalBuild, costs: StoreCosts, source_kb: float
) -> ScalingConfig:
    """The calculation's inputs for builds on this machine, without a delay.

    The first shard's rows are made when the driver hears of the first result, that of the token
    shard; from then to the last result the worker does nothing but make the others. What passes
    before, less one shard, is the start.

    Raises:
        UsageError: The local build was too short to tell a rate.
    """
    shards = math.ceil(config.images / config.per_shard)
    running = local.shards_seconds - local.first_seconds
    each = running / (config.images * (shards - 1) / shards)
    start = local.shards_seconds - config.images * each
    if each <= 0 or start <= 0:
        raise UsageError(
            f"images: {config.images}; a build on a local disk took {local.shards_seconds:.1f} s, "
            f"{local.first_seconds:.1f} s of it until the first shard: too short for a rate; give "
            "--images more"
        )
    return ScalingConfig(
        node=NodeInputs(
            cores=1, per_core=1 / each, tokens_per_core=1e12, gap_seconds=0.0,
            shard_images=config.per_shard, image_bytes=config.size**2 * 3,
            machine_cores=os.cpu_count() or 1,
        ),
        store=StoreInputs(
            latency_ms=costs.call_seconds * 1e3, requests=1e9, image_calls=costs.image_calls,
            upload_mb=costs.upload_mb, client_ms=costs.client_seconds * 1e3,
            client_ms_per_mb=costs.client_seconds_per_mb * 1e3,
            server_ms=costs.server_seconds * 1e3,
            server_ms_per_mb=costs.server_seconds_per_mb * 1e3,
        ),
        driver=DriverInputs(
            rows=config.images / local.plan_seconds, task_rows=0.0, start_seconds=start,
            finish_shard_ms=1e3 * local.finish_seconds / shards,
        ),
        source_kb=source_kb,
    )  # fmt: skip


def _process(side: str, job: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, float]:
    """What a side prints, run in a process of its own.

    Raises:
        UsageError: It failed, or did not end in time.
    """
    command = [sys.executable, "-m", f"pipelines.benchmarks.sides.{side}", json.dumps(job)]
    try:
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(f"{side}: not at its end after {SECONDS} s; give --images less") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise UsageError(f"{side}: ended with exit code {done.returncode}: {last[0]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _told(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
