"""Random reads of squares of 336 px from files that are in memory already, on one core.

The floor copies rows out of a memory-mapped file with numpy. Every side gives an array of its own,
uint8 [336, 336, 3]; ours is also told as it gives it, a view of the map.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.benchmarks.harness import (
    Bar,
    by_turns,
    draw_bars,
    pin_to_one_core,
    provenance,
    publish,
)
from pipelines.benchmarks.material.large import write_large
from pipelines.benchmarks.sides.build_sides import PIXEL_BYTES, import_mosaic
from pipelines.benchmarks.sides.image_sides import SIZE
from pipelines.cli.command import parse, say

__all__ = ["ReadConfig", "main"]

Read = Callable[[int], object]
SHOWN = {
    "side": "side", "samples/s": "samples_per_second", "least": "low", "most": "high",
    "of the floor": "of_floor",
}  # fmt: skip
PER_SHARD = 64 * 2**20 // PIXEL_BYTES


@dataclass(frozen=True)
class ReadConfig:
    """What is measured.

    Attributes:
        images: Images that are written and read.
        reads: Random reads of a turn.
        rounds: Turns that count.
        plot: A PNG, SVG or PDF file for the picture.
        save: Add rows to `results/read.csv`.
    """

    images: int = 2000
    reads: int = 1000
    rounds: int = 5
    plot: str = ""
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each side."""
    config = parse(ReadConfig, argv, "Random reads of raw squares, beside other systems.")
    head = provenance(("numpy", "pyarrow"), "read", argv)
    say(f"pinned to core {pin_to_one_core()}; {config.images:,} squares of {SIZE} px")
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(config, Path(scratch))
    ranked = sorted(rows, key=lambda row: -row["samples_per_second"])
    publish("read", head, ranked, SHOWN, title="warm random reads, one core", save=config.save)
    if config.plot:
        _draw(Path(config.plot), ranked, str(head["processor"]))
    return 0


def measure(config: ReadConfig, scratch: Path) -> list[dict[str, Any]]:
    """All sides by turns over the same random order; what is not installed is named."""
    pictures = np.random.default_rng(0).integers(0, 256, (16, SIZE, SIZE, 3), np.uint8)
    readers: dict[str, Read] = {}
    for name, make in SIDES.items():
        folder = scratch / name.split(",")[0]
        folder.mkdir(exist_ok=True)
        try:
            readers[name] = make(folder, pictures, config.images)
        except ImportError as error:
            say(f"{name}: left out: {error}; see README")
            shutil.rmtree(folder)
    order = np.random.default_rng(1).integers(0, config.images, config.reads).tolist()
    clocks: dict[str, Callable[[], float]] = {
        name: partial(_seconds, read, order) for name, read in readers.items()
    }
    rates = {name: s.rate(config.reads) for name, s in by_turns(clocks, config.rounds).items()}
    floor = rates["numpy map, copied"].median
    return [
        {
            "side": name, "images": config.images, "reads": config.reads,
            "rounds": config.rounds, "samples_per_second": round(rate.median),
            "low": round(rate.low), "high": round(rate.high),
            "of_floor": round(rate.median / floor, 3),
        }
        for name, rate in rates.items()
    ]  # fmt: skip


def _seconds(read: Read, order: Sequence[int]) -> float:
    started = time.perf_counter()
    for index in order:
        read(index)
    return time.perf_counter() - started


def _numpy(folder: Path, pictures: NDArray[np.uint8], count: int) -> Read:
    with (folder / "rows.raw").open("wb") as file:
        for number in range(count):
            file.write(pictures[number % len(pictures)].data)
    rows = np.memmap(folder / "rows.raw", np.uint8, "r", shape=(count, SIZE, SIZE, 3))
    return lambda index: rows[index].copy()


def _lapilli(folder: Path, pictures: NDArray[np.uint8], count: int) -> Read:
    del pictures
    dataset = _open_large(folder, count)
    return lambda index: dataset.sample(index).pixels.copy()


def _by_reference(folder: Path, pictures: NDArray[np.uint8], count: int) -> Read:
    del pictures
    dataset = _open_large(folder, count)
    return lambda index: dataset.sample(index).pixels


def _open_large(folder: Path, count: int) -> Any:
    from lapilli.data.dataset.dataset import open_dataset

    path = folder / "dataset"
    if not path.exists():
        shards = -(-count // PER_SHARD)
        write_large(path, records=count, shards=shards, per_shard=-(-count // shards))
    return open_dataset(path, view="wide", image_tokens=576)


def _datasets(folder: Path, pictures: NDArray[np.uint8], count: int) -> Read:
    datasets: Any = import_module("datasets")
    features = datasets.Features({"pixels": datasets.Value("large_binary")})
    written = datasets.Dataset.from_generator(
        partial(_rows, pictures, count),
        features=features,
        cache_dir=str(folder),
        writer_batch_size=PER_SHARD,
    )
    return lambda index: _square(written[index]["pixels"])


def _rows(pictures: NDArray[np.uint8], count: int) -> Iterator[dict[str, bytes]]:
    for number in range(count):
        yield {"pixels": pictures[number % len(pictures)].tobytes()}


def _mosaic(folder: Path, pictures: NDArray[np.uint8], count: int) -> Read:
    streaming = import_mosaic()
    with streaming.MDSWriter(
        out=str(folder), columns={"pixels": "bytes"}, size_limit=64 * 2**20
    ) as sink:
        for row in _rows(pictures, count):
            sink.write(row)
    read = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return lambda index: _square(read[index]["pixels"])


def _litdata(folder: Path, pictures: NDArray[np.uint8], count: int) -> Read:
    litdata = import_module("litdata")
    writer = import_module("litdata.streaming.writer").BinaryWriter(
        str(folder), chunk_bytes=64 * 2**20
    )
    for number, row in enumerate(_rows(pictures, count)):
        writer[number] = row
    writer.done()
    writer.merge()
    read: Any = litdata.StreamingDataset(str(folder))
    return lambda index: _square(read[index]["pixels"])


def _square(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(data), np.uint8).reshape(SIZE, SIZE, 3)


SIDES: dict[str, Callable[[Path, NDArray[np.uint8], int], Read]] = {
    "numpy map, copied": _numpy,
    "lapilli, copied": _lapilli,
    "lapilli, by reference": _by_reference,
    "datasets": _datasets,
    "mosaicml-streaming": _mosaic,
    "litdata": _litdata,
}


def _draw(path: Path, rows: Sequence[dict[str, Any]], processor: str) -> None:
    bars = [
        Bar.of(
            row, "samples_per_second",
            "ours" if row["side"].startswith("lapilli") else
            "floor" if row["side"].startswith("numpy") else "other",
        )
        for row in rows
        if row["side"] != "lapilli, by reference"  # copies nothing: no comparison
    ]  # fmt: skip
    draw_bars(
        path, "Random reads of warm raw squares, 336 px", "samples a second, one core", bars,
        f"{processor}. All give an array of their own. Line: least and most.",
    )  # fmt: skip
