"""Build the same inputs from a store into a store at several delays a call, by turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lapilli.data.shards.manifest import read_manifest
from lapilli.data.text.tokenizer_files import train_tokenizer
from pipelines.benchmarks.harness import by_turns, provenance, publish
from pipelines.benchmarks.material.photos import photo_name, write_photos
from pipelines.benchmarks.store_build.delayed_store import KEY, SECRET, delayed_store
from pipelines.cli.command import UsageError, parse

__all__ = ["Inputs", "StoreBuild", "StoreTopicConfig", "main", "make_inputs", "store_build"]

DISTINCT = 500  # photos; more images are links to them
WORDS = (
    "what", "is", "shown", "here", "a", "red", "blue", "green", "photo", "of", "some", "small",
    "thing", "on", "the", "table",
)  # fmt: skip
SHOWN = {
    "ms a call": "delay_ms", "nodes": "nodes", "s": "seconds", "least": "low", "most": "high",
    "x the first": "of_first", "calls": "calls", "calls a shard": "calls_per_shard",
    "GET an image": "gets_per_image", "MB read": "megabytes_read",
    "MB written": "megabytes_written",
}  # fmt: skip


@dataclass(frozen=True)
class StoreTopicConfig:
    """What is measured.

    Attributes:
        folder: Keeps the photos between runs; else they are made anew.
        images: Images of 640x480, a record each.
        size: Pixels a side of the view.
        shard_bytes: Bytes of an image shard.
        delays: Milliseconds before each call is passed on.
        nodes: Ray nodes, all on this machine.
        cores: Cores of a node; 0 shares this machine's among them.
        rounds: Turns that count.
        save: Add rows to `results/store.csv`.
    """

    folder: str = ""
    images: int = 4000
    size: int = 336
    shard_bytes: int = 64 << 20
    delays: tuple[float, ...] = (0.0, 20.0)
    nodes: int = 1
    cores: int = 0
    rounds: int = 3
    save: bool = True

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if not self.delays or min(self.delays) < 0:
            raise UsageError(f"delays: {self.delays}; expected milliseconds, 0 or more")


@dataclass(frozen=True)
class Inputs:
    """What is built: a recipe, and the folder whose folders are served as buckets."""

    served: Path
    recipe: Path


@dataclass(frozen=True)
class StoreBuild:
    """A build that was measured.

    Attributes:
        seconds: Of planning and building.
        images: Images that were read.
        shards: Shards of all kinds.
        gets: Calls that read an object or list.
        heads: Calls that look an object up.
        puts: Calls that store an object.
        calls: All of them.
        bytes_read: Bytes that the store gave.
        bytes_written: Bytes that it took.
    """

    seconds: float
    images: int
    shards: int
    gets: int
    heads: int
    puts: int
    calls: int
    bytes_read: int
    bytes_written: int


def make_inputs(folder: Path, images: int, size: int = 336, shard_bytes: int = 64 << 20) -> Inputs:
    """Photos of 640x480 with a record each, a tokenizer and a recipe, below `folder`."""
    served = folder / "served"
    photos = served / "data" / "photos"
    distinct = min(images, DISTINCT)
    write_photos(photos, distinct, (640, 480))
    for number in range(distinct, images):
        if not (link := photos / photo_name(number)).exists():
            os.link(photos / photo_name(number % distinct), link)
    records = [_record(number) for number in range(images)]
    (served / "data" / "records.json").write_text(json.dumps(records), encoding="utf-8")
    texts = (turn["value"] for record in records[:200] for turn in record["conversations"])
    train_tokenizer(texts, served / "data" / "tokenizer", vocab_size=320)
    (served / "out").mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "sources:\n  - {name: photos, annotations: records.json, images: photos}\n"
        f"template: v1\nviews:\n  pad: {{size: {size}, fill: [123, 117, 104]}}\n"
        f"shard_bytes: {shard_bytes}\n",
        encoding="utf-8",
    )
    return Inputs(served, recipe)


def _record(number: int) -> dict[str, Any]:
    words = " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 30))
    turns = [{"from": "human", "value": f"<image>\n{words[:60]}"}, {"from": "gpt", "value": words}]
    return {"id": str(number), "image": photo_name(number), "conversations": turns}


def store_build(inputs: Inputs, delay: float, nodes: int = 1, cores: int = 1) -> StoreBuild:
    """Build once from the store into it, anew.

    Args:
        inputs: What is built.
        delay: Seconds before each call is passed on.
        nodes: Ray nodes on this machine.
        cores: Cores of each.

    Raises:
        UsageError: The build failed; its output is repeated.
    """
    output = inputs.served / "out" / "dataset"
    shutil.rmtree(output, ignore_errors=True)
    with delayed_store(inputs.served, delay) as store:
        environment = {
            **os.environ, "AWS_ENDPOINT_URL": store.endpoint, "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "pipelines.benchmarks.store_build.one_build", str(nodes),
            str(cores), str(inputs.recipe), "s3://data", "s3://data/tokenizer", "s3://out/dataset",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"store: the build failed: {(done.stderr or done.stdout)[-800:]}")
        seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
        counts = store.take()
    manifest = read_manifest(output)
    calls = sum(count for name, count in counts.items() if name not in ("read", "written"))
    return StoreBuild(
        seconds=seconds,
        images=manifest.counts["images"],
        shards=len(manifest.shards()),
        gets=counts.get("GET", 0),
        heads=counts.get("HEAD", 0),
        puts=counts.get("PUT", 0),
        calls=calls,
        bytes_read=counts.get("read", 0),
        bytes_written=counts.get("written", 0),
    )


def main(argv: Sequence[str]) -> int:
    """Measure by turns, tell, and add a row for each delay."""
    config = parse(StoreTopicConfig, argv, "Builds from a store into a store, by its latency.")
    head = provenance(("ray", "pyarrow", "obstore"), "store", argv)
    cores = config.cores or max(1, (os.cpu_count() or 1) // config.nodes)
    if config.folder:
        Path(config.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.folder or None) as scratch:
        folder = Path(config.folder or scratch)
        inputs = make_inputs(folder, config.images, config.size, config.shard_bytes)
        found: dict[str, StoreBuild] = {}

        def once(name: str, delay: float) -> float:
            found[name] = store_build(inputs, delay / 1000, config.nodes, cores)
            return found[name].seconds

        clocks: dict[str, Callable[[], float]] = {
            f"{delay:g}": partial(once, f"{delay:g}", delay) for delay in config.delays
        }
        spreads = by_turns(clocks, config.rounds, warm=False)
    first = next(iter(spreads.values())).median
    rows: list[dict[str, Any]] = []
    for name, spread in spreads.items():
        made = found[name]
        facts = asdict(made) | {"seconds": round(spread.median, 2)}
        read, written = facts.pop("bytes_read"), facts.pop("bytes_written")
        rows.append(
            {"delay_ms": float(name), "nodes": config.nodes, "node_cores": cores}
            | facts
            | {
                "low": round(spread.low, 2), "high": round(spread.high, 2),
                "rounds": config.rounds, "of_first": round(spread.median / first, 3),
                "calls_per_shard": round(made.calls / made.shards, 1),
                "gets_per_image": round(made.gets / made.images, 2),
                "megabytes_read": round(read / 1e6, 1),
                "megabytes_written": round(written / 1e6, 1),
            }
        )  # fmt: skip
    publish("store", head, rows, SHOWN, title=f"{config.images:,} photos", save=config.save)
    return 0
