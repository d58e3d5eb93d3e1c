"""Time and memory of reading an annotation file: streamed, as entries, as a plan holds them.

python -m pipelines.benchmarks.read_sources --gigabytes 1 --folder /tmp/lapilli_benchmark

`floor` is `json.load` of the whole file, which every loader that does not stream pays.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapilli.data.config import SourceConfig
from lapilli.data.images.buffers import peak_resident
from lapilli.data.sources.reading.json_stream import read_json
from lapilli.data.sources.validation import read_entries
from pipelines.cli.command import parse, run, say

WORDS = (
    "a",
    "red",
    "crater",
    "harbour",
    "lantern",
    "goat",
    "Käse",
    "火山",
    "stands",
    "near",
    "people",
)


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
        gigabytes: Size of the file that is made.
        folder: Where it is made; it stays for another run.
        rounds: How often all are measured, in turns.
    """

    folder: str
    gigabytes: float = 1.0
    rounds: int = 1


def make_file(path: Path, size: int) -> None:
    """A JSON array of LLaVA records, one to eight questions each, half of them in ASCII."""
    rng = random.Random(0)
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            turns: list[dict[str, str]] = []
            for place in range(rng.randint(1, 8)):
                marker = "<image>\n" if place == 0 else ""
                question = marker + " ".join(rng.choices(WORDS, k=12))
                answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 110)))
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            image = f"coco/train2017/{number % 200_000:012d}.jpg"
            record = {"id": f"{number:012d}", "image": image, "conversations": turns}
            text = json.dumps(record, ensure_ascii=number % 2 == 0)
            written += file.write((",\n" if number else "[") + text)
            number += 1
        file.write("]")


def floor(path: Path) -> int:
    """The whole file at once."""
    with path.open(encoding="utf-8") as file:
        return len(json.load(file))


def stream(path: Path) -> int:
    """Every element, none held."""
    return sum(1 for _ in read_json(path))


def entries(path: Path) -> int:
    """Every element as an entry with its verdict, none held."""
    return sum(1 for _ in read_entries(SourceConfig(name="s", annotations=path.name), path.parent))


def plan(path: Path) -> int:
    """All entries as a plan holds them."""
    found = [e.pack() for e in read_entries(SourceConfig(name="s", annotations=path.name), path.parent)]
    return len(found)


MEASURED: tuple[Callable[[Path], int], ...] = (floor, stream, entries, plan)


def measure(what: Callable[[Path], int], path: Path) -> tuple[int, float, float]:
    """Records, seconds of processor time and peak gigabytes, in this process."""
    before = time.process_time()
    records = what(path)
    peak = peak_resident() / 1e9
    return records, time.process_time() - before, peak


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(BenchmarkConfig, argv, "Measure reading.")
    path = Path(config.folder) / f"{config.gigabytes:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        make_file(path, int(config.gigabytes * 1e9))
    context = multiprocessing.get_context("spawn")  # each with a peak of its own
    for _ in range(config.rounds):
        for what in MEASURED:
            with context.Pool(1) as pool:
                records, seconds, peak = pool.apply(measure, (what, path))
            say(f"{what.__name__}: {records} records, {seconds:.1f} s, {peak:.2f} GB")
    return 0


if __name__ == "__main__":
    run(main)
