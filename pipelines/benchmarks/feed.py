"""Samples a second of the feed, against what LLaVA's dataset does for each sample.

LLaVA's way: open with PIL, pad to a square, CLIP's image processor, write the conversation down and
tokenise it with its rounds to find what is trained, in two DataLoader workers. Ours: the same
samples from shards, with 1 and 2 threads, and in two DataLoader workers. All take turns on the same
two cores. The floor is a mock feed, one step over and over. `--dataset` times another dataset's
first batch and the memory it adds to a process.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.planning.plan import plan_build
from lapilli.data.shards.manifest import read_manifest
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.train.config import RunConfig
from lapilli.train.steps import feed as feed_module
from lapilli.train.steps.feed import Feed, StepBatches, mock_steps
from pipelines.benchmarks.harness import add_row, provenance
from pipelines.benchmarks.sides.llava_way import LlavaSamples
from pipelines.benchmarks.whole import make_mixture
from pipelines.cli.command import parse, say

__all__ = ["FeedConfig", "main"]

SIDE, IMAGE_TOKENS, VIEW = 336, 576, "clip336"
WORKERS = 2
PACKAGES = ("torch", "transformers", "pillow", "pyarrow", "numpy")


@dataclass(frozen=True)
class FeedConfig:
    """What is measured.

    Attributes:
        folder: Where photos, annotations and the dataset are made, and kept.
        tokenizer: Hub name or folder of a tokenizer.
        records: Conversations, of which each picks one of the photos.
        images: Photos of 640 x 480.
        micro_batch_size: Samples of a batch.
        seconds: How long each way runs in a round.
        rounds: How often the ways take turns.
        dataset: Another dataset whose first batch is timed; empty for none.
        save: Add rows to `results/feed.csv`.
    """

    folder: str
    tokenizer: str
    records: int = 4000
    images: int = 1000
    micro_batch_size: int = 16
    seconds: float = 15.0
    rounds: int = 3
    dataset: str = ""
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each way."""
    config = parse(FeedConfig, argv, "Samples a second of the feed against LLaVA's dataset.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    head = provenance(PACKAGES, "feed", argv)
    first = first_batch(config, config.dataset) if config.dataset else {}
    folder = Path(config.folder)
    make_mixture(folder / "root", config.records, config.images)
    annotations = folder / "root" / f"mix_{config.records}_{config.images}.json"
    dataset = _dataset(config, folder, annotations)
    rows = measure(config, dataset, folder / "root", annotations)
    slowest = next(row["per_second"] for row in rows if row["way"].startswith("llava"))
    for row in rows:
        row["of_llava"] = round(row["per_second"] / slowest, 1)
        say(
            f"{row['way']:>16}: {row['per_second']:>9} samples/s, {row['of_llava']}x; "
            f"{row['per_cpu_second']} a second of the processor"
        )
        if config.save:
            add_row("feed", {**head, **row, **_no_first(), **first})
    return 0


def _no_first() -> dict[str, Any]:
    return dict.fromkeys(
        ("samples", "first_batch_seconds", "first_batch_cpu_seconds", "memory_mb"), ""
    )


def first_batch(config: FeedConfig, path: str) -> dict[str, Any]:
    """Open a dataset, plan its epoch and make the first batch; what that adds to this process."""
    view = next(iter(read_manifest(Path(path)).views))
    here = psutil.Process()
    before, cpu, started = here.memory_info(), _cpu(), time.perf_counter()
    dataset = open_dataset(path, view=view, image_tokens=IMAGE_TOKENS, max_length=2048)
    run = replace(_run(config, view), global_batch_size=8 * config.micro_batch_size, num_workers=8)
    feed = Feed(dataset, run, rank=0, world_size=8)
    steps = feed.steps(0)
    next(steps)
    seconds, cpu = time.perf_counter() - started, _cpu() - cpu
    for _ in islice(steps, 20):
        pass
    after = here.memory_info()
    added = (after.rss - after.shared) - (before.rss - before.shared)
    say(
        f"{len(dataset)} samples: first batch after {seconds:.2f} s, {cpu:.2f} s of the processor; "
        f"{added / 1e6:.0f} MB more"
    )
    return {
        "samples": len(dataset),
        "first_batch_seconds": round(seconds, 2),
        "first_batch_cpu_seconds": round(cpu, 2),
        "memory_mb": round(added / 1e6),
    }


def measure(
    config: FeedConfig, dataset: Dataset, root: Path, annotations: Path
) -> list[dict[str, Any]]:
    """Every way, round after round; medians."""
    feed = Feed(dataset, _run(config, VIEW), rank=0, world_size=1)
    elements = json.loads(annotations.read_text(encoding="utf-8"))
    theirs = LlavaSamples(elements, root, config.tokenizer, SIDE)
    ways: dict[str, Callable[[], Iterator[int]]] = {
        "llava, 2 workers": lambda: _loaded(theirs, config.micro_batch_size, theirs.collate),
        "ours, 1 thread": lambda: _threads(feed, 1),
        "ours, 2 threads": lambda: _threads(feed, 2),
        "ours, 2 workers": lambda: _loaded(_Steps(feed), None, None),
        "mock": lambda: (step.global_samples for step in mock_steps(feed)),
    }
    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(config.rounds):
        for way, start in ways.items():
            seen[way].append(_rate(start, config.seconds))
    return [
        {
            "way": way,
            "micro_batch": config.micro_batch_size,
            "rounds": config.rounds,
            "per_second": round(statistics.median(rate for rate, _ in found), 1),
            "per_cpu_second": round(statistics.median(rate for _, rate in found), 1),
        }
        for way, found in seen.items()
    ]


def _rate(start: Callable[[], Iterator[int]], seconds: float) -> tuple[float, float]:
    """Samples a second of the clock and of all processors, from the second batch on.

    Workers' time counts once they have ended, so that of their start is in it too.
    """
    cpu, batches = _cpu(), start()
    next(batches)
    started, samples = time.perf_counter(), 0
    for count in batches:
        samples += count
        if time.perf_counter() - started > seconds:
            break
    elapsed = time.perf_counter() - started
    del batches
    return samples / elapsed, samples / max(1e-9, _cpu() - cpu)


def _cpu() -> float:
    """Seconds that processors worked for this process and its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _threads(feed: Feed, threads: int) -> Iterator[int]:
    feed_module.THREADS = threads
    for step in feed.steps(0):
        yield step.global_samples


class _Steps(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Our steps for a DataLoader's workers, as tensors, which it hands over in shared memory."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed

    def __len__(self) -> int:
        return self.feed.total_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        made: StepBatches = self.feed.make(step)
        arrays = {f.name: getattr(made.batches[0], f.name) for f in fields(made.batches[0])}
        return {
            name: torch.from_numpy(value)
            for name, value in arrays.items()
            if isinstance(value, np.ndarray)
        }


def _loaded(dataset: Any, batch: int | None, collate: Any) -> Iterator[int]:
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=batch, shuffle=batch is not None, num_workers=WORKERS,
        collate_fn=collate, multiprocessing_context="fork",
    )  # fmt: skip
    for found in loader:
        yield len(found["input_ids"])


def _dataset(config: FeedConfig, folder: Path, annotations: Path) -> Dataset:
    """The same photos and conversations as shards; made once."""
    settings: dict[str, Any] = {
        "root": str(folder / "root"),
        "output": str(folder / "dataset"),
        "tokenizer": config.tokenizer,
        "template": "v1",
        "sources": [{"name": "mix", "annotations": annotations.name}],
        "views": {VIEW: {"size": SIDE, "fill": [122, 116, 104], "aspect": "pad"}},
    }
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    build(plan_build(parse(BuildConfig, [f"--config={recipe}"], "")), runner=run_here)
    return open_dataset(folder / "dataset", view=VIEW, image_tokens=IMAGE_TOKENS, max_length=2048)


def _run(config: FeedConfig, view: str) -> RunConfig:
    """A run of one worker, a micro-batch a step, for longer than is measured."""
    model = ModelConfig(vision=VisionConfig(), language=LanguageConfig())
    return RunConfig(
        dataset="", output="", view=view, model=model,
        global_batch_size=config.micro_batch_size, micro_batch_size=config.micro_batch_size,
        epochs=1000,
    )  # fmt: skip
