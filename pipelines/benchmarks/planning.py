"""The order of an epoch of 665,298 samples: time, and what of its batches is padding or waiting.

Beside our policies stand LLaVA's own order, made by the same code that equals its sampler index for
index, prismatic's rule, and two that tell what keeping modalities apart does by itself: a
permutation, and a permutation of each modality. The floor of the time is one sort of the lengths.

Lengths are drawn like LLaVA-1.5's: 576 image tokens and a log-normal text for all but 40,688
records. LLaVA and prismatic count words, not tokens: a sample's are drawn from its text tokens
(without the template's) at 1.15 to 1.65 tokens a word. `--dataset` takes a built dataset's own.

`--order_windows` compares orders of one epoch made in windows of so many samples, 0 for one order:
what a rank takes for them, and how well they mix samples of ten sources one behind the other.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.collate import choose_buckets
from lapilli.data.batches.sampler import EpochPlan, assign, plan_epoch
from lapilli.data.batches.windows import WindowedPlan, plan_windows
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.shards.manifest import read_manifest
from pipelines.benchmarks.harness import (
    Bar,
    Kind,
    Spread,
    add_row,
    by_turns,
    clock,
    draw_bars,
    provenance,
    publish,
    table,
)
from pipelines.benchmarks.sides.orders import ORDERS, Samples, Shape
from pipelines.cli.command import parse, say

__all__ = ["IMAGE_TOKENS", "TEMPLATE_TOKENS", "TEXT_ONLY", "PlanConfig", "drawn", "main", "waste"]

TEXT_ONLY = 40_688
IMAGE_TOKENS = 576
TEMPLATE_TOKENS = 40
OURS = ("random", "grouped")
BLOCK = 8192  # samples of a token shard
SOURCES = 10


@dataclass(frozen=True)
class PlanConfig:
    """What is measured.

    Attributes:
        samples: Samples of the epoch.
        ranks: Workers.
        micro_batch_size: Samples a worker has at once.
        accumulation: Micro-batches of a worker in a step.
        max_shapes: Shapes that batches may have in all.
        rounds: Turns that count.
        dataset: A built dataset whose lengths, words and modalities are taken; empty draws them.
        order_windows: Compare orders in windows of so many samples, 0 for one order, instead.
        plot: A PNG, SVG or PDF file for the picture.
        save: Add rows to `results/plan.csv`, or of windows to `results/windows.csv`.
    """

    samples: int = 665_298
    ranks: int = 8
    micro_batch_size: int = 16
    accumulation: int = 1
    max_shapes: int = 16
    rounds: int = 7
    dataset: str = ""
    order_windows: tuple[int, ...] = ()
    plot: str = ""
    save: bool = True

    @property
    def shape(self) -> Shape:
        """How a step is shared."""
        return Shape(self.ranks, self.micro_batch_size, self.accumulation)


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each order."""
    config = parse(PlanConfig, argv, "The plan of an epoch: its time, its padding, its waiting.")
    head = provenance(("numpy",), "plan", argv)
    samples = _of_dataset(config.dataset) if config.dataset else drawn(config.samples)
    if config.order_windows:
        rows = [windowed(config, samples, window) for window in config.order_windows]
        title = f"{samples.tokens.size:,} samples, global batches of {rows[0]['global_batch']}"
        publish("windows", head, rows, WINDOWED, title=title, save=config.save)
        return 0
    rows = measure(config, samples)
    columns = ("order", "s", "share", "pad %", "bucket", "wait %", "shapes", "/llava", "/none")
    digits = {
        "policy": 0, "seconds": 3, "assign_seconds": 2, "padded_percent": 1,
        "bucket_padded_percent": 1, "waiting_percent": 1, "shapes": 0, "of_llava": 3,
        "of_ungrouped": 3,
    }  # fmt: skip
    title = f"{samples.tokens.size:,} samples, {config.ranks} ranks x {config.micro_batch_size}"
    shown = [[_short(row[name], places) for name, places in digits.items()] for row in rows]
    table(title, columns, shown)
    say(
        "/: tokens that an epoch computes, padding and waiting in them, of those of LLaVA's order "
        f"and of one without grouping; bucket: padding with {config.max_shapes} shapes in all"
    )
    if config.plot:
        _draw(Path(config.plot), config, rows, int(samples.tokens.sum()))
    if config.save:
        path = [add_row("plan", head | row) for row in rows][-1]
        say(f"{len(rows)} rows added to {path}")
    return 0


def measure(config: PlanConfig, samples: Samples) -> list[dict[str, Any]]:
    """Every order by turns, then what its batches are like."""
    clocks: dict[str, Callable[[], float]] = {
        name: partial(_seconds, partial(order, samples, config.shape))
        for name, order in ORDERS.items()
    }
    clocks["one sort"] = lambda: _seconds(lambda: np.argsort(samples.tokens, kind="stable"))
    spreads = by_turns(clocks, config.rounds)
    costs = {
        name: waste(order(samples, config.shape), samples, config) for name, order in ORDERS.items()
    }
    return [_row(name, spread, costs, config, samples) for name, spread in spreads.items()]


WINDOWED = {
    "order": "policy", "MB": "peak_megabytes", "start s": "start_seconds",
    "resume s": "resume_seconds", "pad %": "padded_percent", "same shard %": "same_shard_percent",
    "apart %": "neighbours_percent", "source sd %": "source_spread_percent",
}  # fmt: skip


def windowed(config: PlanConfig, samples: Samples, window: int) -> dict[str, Any]:
    """An order in windows: its memory and time for a rank, its padding and its mixing.

    Seconds are of a processor: until the first step's batch, and until that of the step in the
    middle of a run that resumes there. `same_shard_percent`: of the pairs of samples in a global
    batch, those of one shard. `neighbours_percent`: how far apart in the epoch samples come that
    are neighbours in the dataset, of what a permutation of all gives. `source_spread_percent`:
    standard deviation, over global batches, of a source's share in them.
    """
    size = config.shape.global_batch_size
    images = samples.has_image.astype(np.int64)
    count = samples.tokens.size

    def batch(step: float) -> EpochPlan | WindowedPlan:
        settings: dict[str, Any] = {
            "global_batch_size": size, "seed": 0, "epoch": 0, "sampler": "grouped",
        }  # fmt: skip
        if window:
            blocks = np.append(np.arange(0, count, BLOCK), count)
            plan = plan_windows(samples.tokens, images, blocks, order_window=window, **settings)
        else:
            plan = plan_epoch(samples.tokens, samples.has_image, **settings)
        plan.global_batch(int(step * (plan.num_steps - 1)))
        return plan

    start, _ = clock(lambda: batch(0.0))
    resume, _ = clock(lambda: batch(0.5))
    tracemalloc.start()
    plan = batch(0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batches = np.stack([plan.global_batch(step) for step in range(plan.num_steps)])
    tokens = np.where(batches >= 0, samples.tokens[batches], 0)
    held = int(tokens.max(axis=1).sum()) * size
    return {
        "policy": f"windowed {window:,}" if window else "one order", "samples": count,
        "global_batch": size, "steps": plan.num_steps,
        "windows": plan.num_windows if isinstance(plan, WindowedPlan) else 1,
        "peak_megabytes": round(peak / 1e6, 1), "start_seconds": round(start.cpu, 2),
        "resume_seconds": round(resume.cpu, 2),
        "padded_percent": round(100 * (1 - int(tokens.sum()) / held), 2),
        **{name: round(100 * value, 4) for name, value in mixing(batches, count).items()},
    }  # fmt: skip


def mixing(batches: NDArray[np.int64], count: int) -> dict[str, float]:
    """How well global batches [steps, G] of all `count` samples mix; see `windowed`."""
    places = np.empty(count, np.int64)
    filled = batches >= 0
    places[batches[filled]] = np.flatnonzero(filled)
    shards = np.where(filled, batches // BLOCK, -1 - np.arange(batches.shape[1]))
    shards.sort(axis=1)
    same, run = 0, np.zeros(len(batches), np.int64)
    for column in range(1, batches.shape[1]):  # a shard's k-th sample in a batch makes k pairs
        run = np.where(shards[:, column] == shards[:, column - 1], run + 1, 0)
        same += int(run.sum())
    held = filled.sum(axis=1)
    sources = np.where(filled, batches * SOURCES // count, -1)
    spreads = [float(((sources == one).sum(axis=1) / held).std()) for one in range(SOURCES)]
    return {
        "same_shard_percent": same / int((held * (held - 1) // 2).sum()),
        "neighbours_percent": float(np.abs(np.diff(places)).mean()) / (count / 3),
        "source_spread_percent": float(np.mean(spreads)),
    }


def _short(value: float | str, digits: int) -> float | str:
    return round(value, digits) if isinstance(value, float) else value


def _row(
    name: str,
    spread: Spread,
    costs: dict[str, dict[str, float]],
    config: PlanConfig,
    samples: Samples,
) -> dict[str, Any]:
    cost = costs.get(name)

    def of(other: str) -> float | str:
        return round(cost["computed"] / costs[other]["computed"], 4) if cost else ""

    return {
        "policy": name, "samples": samples.tokens.size, "ranks": config.ranks,
        "micro_batch": config.micro_batch_size, "accumulation": config.accumulation,
        "rounds": config.rounds, "seconds": round(spread.median, 4),
        "low": round(spread.low, 4), "high": round(spread.high, 4),
        "steps": int(cost["steps"]) if cost else "",
        "padded_percent": round(100 * cost["padded"], 3) if cost else "",
        "waiting_percent": round(100 * cost["waiting"], 3) if cost else "",
        "of_llava": of("llava"), "of_ungrouped": of("ungrouped"),
        "bucket_padded_percent": round(100 * cost["bucket_padded"], 3) if cost else "",
        "shapes": int(cost["shapes"]) if cost else "",
        "bucket_shapes": int(cost["bucket_shapes"]) if cost else "",
        "assign_seconds": round(cost["assign_seconds"], 4) if cost else "",
        "computed_tokens": int(cost["computed"]) if cost else "",
    }  # fmt: skip


def waste(plan: EpochPlan, samples: Samples, config: PlanConfig) -> dict[str, float]:
    """What of an epoch is not work.

    Returns:
        `steps`; `padded`, the share of padding among the tokens of all micro-batches, each as long
        as its longest row; `waiting`, by how much all ranks together would compute more if each had
        as many tokens as the one with most in its micro-step; `computed`, tokens an epoch takes
        with both, which is what its time follows; `bucket_padded`, the share of padding where a
        micro-batch is as long as the bucket that holds it; `shapes` and `bucket_shapes`, pairs of
        length and modality that occur without and with buckets; `assign_seconds`, how long it takes
        to share all steps of the epoch.
    """
    share = partial(
        assign, plan, lengths=samples.tokens, world_size=config.ranks,
        micro_batch_size=config.micro_batch_size,
    )  # fmt: skip
    started = time.perf_counter()
    shared = [share(step) for step in range(plan.num_steps)]
    assign_seconds = time.perf_counter() - started
    ids = np.array(shared).swapaxes(1, 2)  # [steps, accumulation, ranks, micro-batch]
    tokens = np.where(ids >= 0, samples.tokens[ids], 0)
    pictured = (ids >= 0) & samples.has_image[ids]
    with_image: NDArray[np.bool_] = np.any(pictured, axis=-1)
    longest = tokens.max(axis=-1)
    in_bucket = _in_buckets(longest, with_image, config.max_shapes)
    real, held = int(tokens.sum()), int(longest.sum()) * config.micro_batch_size
    computed = int(longest.max(axis=-1).sum()) * config.ranks * config.micro_batch_size
    return {
        "steps": plan.num_steps, "padded": 1 - real / held, "waiting": computed / held - 1,
        "computed": computed,
        "bucket_padded": 1 - real / (int(in_bucket.sum()) * config.micro_batch_size),
        "shapes": _distinct(longest, with_image), "bucket_shapes": _distinct(in_bucket, with_image),
        "assign_seconds": assign_seconds,
    }  # fmt: skip


def _in_buckets(
    longest: NDArray[np.int64], with_image: NDArray[np.bool_], count: int
) -> NDArray[np.int64]:
    """The bucket of each micro-batch; what is empty keeps its length of 0."""
    text_only = ~with_image & (longest > 0)
    padded = np.zeros_like(longest)
    buckets = choose_buckets(longest[with_image], longest[text_only], count=count)
    for these, ends in zip((with_image, text_only), buckets, strict=True):
        padded[these] = np.array(ends)[np.searchsorted(ends, longest[these])] if ends else 0
    return padded


def _distinct(lengths: NDArray[np.int64], with_image: NDArray[np.bool_]) -> int:
    return np.unique(np.where(with_image, lengths, -lengths)[lengths > 0]).size


def drawn(count: int) -> Samples:
    draw = np.random.default_rng(0)
    has_image = draw.permutation(count) >= round(count * TEXT_ONLY / 665_298)
    text = np.where(has_image, draw.lognormal(5.4, 0.65, count), draw.lognormal(6.9, 0.7, count))
    tokens = np.minimum(text.astype(np.int64) + 8 + IMAGE_TOKENS * has_image, 2048)
    said = np.maximum(text - TEMPLATE_TOKENS, 2) / draw.uniform(1.15, 1.65, count)
    return Samples(tokens, np.maximum(said.astype(np.int64), 1), has_image)


def _of_dataset(path: str) -> Samples:
    view = next(iter(read_manifest(Path(path)).views))
    dataset = open_dataset(path, view=view, image_tokens=IMAGE_TOKENS, max_length=2048)
    tokens = dataset.lengths.astype(np.int64)
    return Samples(tokens, np.abs(dataset.llava_lengths).astype(np.int64), dataset.has_images)


def _draw(path: Path, config: PlanConfig, rows: Sequence[dict[str, Any]], real: int) -> None:
    def kind(name: str) -> Kind:
        return "ours" if name in OURS else "other"

    bars = [Bar("every token once", Spread(real / 1e6, real / 1e6, real / 1e6), "floor")]
    counted = sorted((row for row in rows if row["steps"]), key=lambda row: row["computed_tokens"])
    for row in counted:
        millions = row["computed_tokens"] / 1e6
        label = f"lapilli, {row['policy']}" if row["policy"] in OURS else row["policy"]
        note = f"x {millions * 1e6 / real:.2f}"
        bars.append(Bar(label, Spread(millions, millions, millions), kind(row["policy"]), note))
    draw_bars(
        path, f"What an epoch of {rows[0]['samples']:,} samples computes", "million tokens", bars,
        f"{config.ranks} ranks x {config.micro_batch_size} samples x {config.accumulation}; "
        "padding to the longest of a micro-batch and waiting for the rank with most are in it. "
        f"Lengths: {'a dataset' if config.dataset else 'drawn like LLaVA-1.5'}'s.",
    )  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
