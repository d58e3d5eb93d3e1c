"""Time a CPU step on samples of which three lie on an image, with the image once and three times.

Both ways train the same samples from the same weights; every round takes one step of each. Seconds
are the processor's, so that other work on the machine counts for neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lapilli.data.batches.collate import Batch, BatchShape, collate, collate_rows
from lapilli.data.batches.tree_rows import Row
from lapilli.data.dataset.dataset import Sample
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.parts.trainable import set_modes
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.config import OptimConfig
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from pipelines.benchmarks.harness import add_row, by_turns, provenance, table
from pipelines.benchmarks.step.shapes import decoder, tower
from pipelines.cli.command import parse

__all__ = ["ShareStepConfig", "main"]


@dataclass(frozen=True)
class ShareStepConfig:
    """What is timed.

    Attributes:
        images: Images of a step.
        records: Samples of each.
        prefix: Tokens of text before an image.
        text: Fewest and most tokens behind it.
        hidden: Size of the decoder.
        layers: Of the decoder.
        rounds: Steps of each way, one after another.
        save: Add a row to `results/share_step.csv`.
    """

    images: int = 4
    records: int = 3
    prefix: int = 35
    text: tuple[int, int] = (30, 120)
    hidden: int = 512
    layers: int = 8
    rounds: int = 5
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Take steps by turns, tell, and add a row."""
    config = parse(ShareStepConfig, argv, "A CPU step with an image's samples in one row.")
    torch.set_num_threads(1)
    trees = _samples(config)
    ways = {"one sample a row": _apart(trees), "share_images": _shared(trees)}
    losses: dict[str, list[float]] = {way: [] for way in ways}
    sides = {way: _step(config, batch, losses[way]) for way, batch in ways.items()}
    seconds = {way: spread.median for way, spread in by_turns(sides, config.rounds).items()}
    apart, shared = (np.array(of) for of in losses.values())
    difference = float((np.abs(shared - apart) / apart).max())
    samples = config.images * config.records
    first = seconds["one sample a row"]
    columns = ("way", "images", "tokens", "computed", "samples/s", "ratio")
    rows = [
        [
            way, ways[way].num_images, int(ways[way].row_lengths.sum()), ways[way].input_ids.size,
            f"{samples / seconds[way]:.2f}", f"{first / seconds[way]:.2f}",
        ]
        for way in ways
    ]  # fmt: skip
    table(f"{samples} samples a step; losses differ by {difference:.1e}", columns, rows)
    if config.save:
        head = provenance(("torch", "transformers"), "share_step", argv)
        for way in ways:
            add_row("share_step", head | {
                "way": way, "images": ways[way].num_images, "samples": samples,
                "tokens": int(ways[way].row_lengths.sum()), "computed": ways[way].input_ids.size,
                "cpu_seconds": round(seconds[way], 3),
                "samples_per_second": round(samples / seconds[way], 3),
                "ratio": round(first / seconds[way], 3), "loss_difference": f"{difference:.1e}",
            })  # fmt: skip
    return 0


def _model(config: ShareStepConfig) -> ModelConfig:
    """A tower of 196 tokens an image, frozen, and a decoder that learns."""
    hidden = config.hidden
    return ModelConfig(
        vision=VisionConfig(settings=tower(384, layers=8, heads=6, image=SIDE, patch=16)),
        language=LanguageConfig(settings=decoder(
            hidden, config.layers, heads=hidden // 64, vocabulary=8192, positions=1024
        )),
        trainable=("projector", "language"),
    )  # fmt: skip


SIDE, TOKENS = 224, 196


def _samples(config: ShareStepConfig) -> list[list[Sample]]:
    """By image: the same ids up to it, and behind it each sample's own text, half of it trained."""
    draw = np.random.default_rng(0)
    trees: list[list[Sample]] = []
    for image in range(config.images):
        prefix = np.append(draw.integers(1, 8192, config.prefix), -200)
        pixels = draw.integers(0, 256, (1, SIDE, SIDE, 3)).astype(np.uint8)
        tree: list[Sample] = []
        for record in range(config.records):
            size = int(draw.integers(*config.text))
            ids = np.append(prefix, draw.integers(1, 8192, size)).astype(np.int32)
            spans = np.array([[len(ids) - size // 2, len(ids)]], np.int32)
            tree.append(Sample(f"{image}-{record}", ids, spans, pixels))
        trees.append(tree)
    return trees


def _apart(trees: Sequence[Sequence[Sample]]) -> Batch:
    samples = [one for tree in trees for one in tree]
    longest = max(len(one.input_ids) for one in samples) + TOKENS - 1
    return collate(samples, _shape(len(samples), longest), SIDE)


def _shared(trees: Sequence[Sequence[Sample]]) -> Batch:
    rows: list[Row] = [[tree] for tree in trees]
    longest = max(
        len(tree[0].input_ids) + sum(len(one.input_ids) - _place(one) for one in tree[1:])
        for tree in trees
    ) + TOKENS - 1  # fmt: skip
    return collate_rows(rows, _shape(len(rows), longest, has_trees=True), SIDE)


def _shape(rows: int, longest: int, *, has_trees: bool = False) -> BatchShape:
    length = -(-longest // 8) * 8
    return BatchShape(rows=rows, buckets=(length,), image_tokens=TOKENS, has_trees=has_trees)


def _place(sample: Sample) -> int:
    """Ids up to the image."""
    return int(np.argmin(sample.input_ids)) + 1


def _step(config: ShareStepConfig, batch: Batch, losses: list[float]) -> Callable[[], float]:
    """Takes a step; adds its loss, and returns its seconds of the processor."""
    model: VisionLanguageModel = build_model(_model(config))
    set_modes(model)
    engine = PlainEngine(model, build_optimizer(model, OptimConfig(lr=1e-5)), grad_clip=1.0)
    sent = [to_device(batch, torch.device("cpu"))]

    def step() -> float:
        started = time.process_time()
        total = train_step(engine, sent, global_tokens=batch.num_targets, world_size=1)
        losses.append(float(total) / batch.num_targets)
        return time.process_time() - started

    return step
