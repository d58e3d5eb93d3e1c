"""Time a worker's micro-batches under orders of an epoch: nothing grouped, LLaVA's, and ours.

The epoch has 665,298 samples with lengths like LLaVA-1.5's (`planning`). Of each order the same
number of micro-batches, evenly spaced over the epoch, are trained in turns by one model on one
thread. Seconds are the processor's; what ranks wait for each other is not in them, see `plan`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.data.batches.sampler import assign
from lapilli.data.dataset.dataset import Sample
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.parts.trainable import set_modes
from lapilli.model.vlm import build_model
from lapilli.train.config import OptimConfig
from lapilli.train.engine.torch_engine import PlainEngine
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from pipelines.benchmarks.harness import add_row, provenance, table
from pipelines.benchmarks.planning import IMAGE_TOKENS, drawn
from pipelines.benchmarks.sides.orders import ORDERS, Samples, Shape
from pipelines.benchmarks.step.shapes import decoder, tower
from pipelines.cli.command import parse, say

__all__ = ["GroupConfig", "main"]

SIDE, PATCH, VOCABULARY = 384, 16, 8192  # 24 x 24 patches are an image's 576 tokens


@dataclass(frozen=True)
class GroupConfig:
    """What is timed.

    Attributes:
        steps: Micro-batches of each order.
        micro_batch_size: Samples of one.
        ranks: Workers that the orders are made for; the first one's micro-batches are taken.
        hidden: Size of the decoder.
        layers: Of the decoder.
        orders: Names of `sides.orders`.
        save: Add a row to `results/group.csv`.
    """

    steps: int = 24
    micro_batch_size: int = 16
    ranks: int = 8
    hidden: int = 128
    layers: int = 2
    orders: tuple[str, ...] = ("ungrouped", "llava", "grouped")
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Train micro-batches of each order by turns, tell, and add a row for each."""
    config = parse(GroupConfig, argv, "Samples a second of a worker under orders of an epoch.")
    torch.set_num_threads(1)
    samples = drawn(665_298)
    batches = {name: _batches(config, samples, name) for name in config.orders}
    engine = _engine(config)
    seconds = dict.fromkeys(config.orders, 0.0)
    for number in range(-1, config.steps):  # the first turn warms up
        for name, made in batches.items():
            seconds[name] += _train(engine, made[max(0, number)]) * (number >= 0)
    count = config.steps * config.micro_batch_size
    real = {name: sum(int(one.row_lengths.sum()) for one in made) for name, made in batches.items()}
    held = {name: sum(one.input_ids.size for one in made) for name, made in batches.items()}
    first = config.orders[0]
    rates = {name: count / seconds[name] for name in config.orders}
    per_token = {name: real[name] / seconds[name] for name in config.orders}
    rows = [
        [name, f"{rates[name]:.2f}", f"{per_token[name]:,.0f}", f"{1 - real[name] / held[name]:.1%}",
         f"{per_token[name] / per_token[first]:.3f}"]
        for name in config.orders
    ]  # fmt: skip
    columns = ("order", "samples/s", "tokens/s", "padding", f"of {first}")
    table(f"{config.steps} micro-batches of {config.micro_batch_size} samples", columns, rows)
    say("tokens/s: tokens that are no padding; seconds of the processor, one thread")
    if config.save:
        head = provenance(("torch", "transformers", "numpy"), "group", argv)
        for name in config.orders:
            add_row("group", head | {
                "order": name, "steps": config.steps, "micro_batch": config.micro_batch_size,
                "cpu_seconds": round(seconds[name], 3), "tokens": real[name],
                "computed": held[name], "samples_per_second": round(rates[name], 3),
                "tokens_per_second": round(per_token[name], 1),
                "ratio": round(per_token[name] / per_token[first], 4),
            })  # fmt: skip
    return 0


def _batches(config: GroupConfig, samples: Samples, name: str) -> list[Batch]:
    """The first rank's micro-batches at evenly spaced steps of an order."""
    plan = ORDERS[name](samples, Shape(config.ranks, config.micro_batch_size, 1))
    steps = np.linspace(0, plan.num_steps - 1, config.steps + 2).astype(int)[1:-1]
    made: list[Batch] = []
    for step in steps:
        ids = assign(
            plan, int(step), lengths=samples.tokens, world_size=config.ranks,
            micro_batch_size=config.micro_batch_size,
        )[0][0]  # fmt: skip
        made.append(_collated(samples, np.asarray(ids), config.micro_batch_size))
    return made


def _collated(samples: Samples, ids: NDArray[np.int64], rows: int) -> Batch:
    draw = np.random.default_rng(int(ids.max()))
    chosen: list[Sample] = []
    for number in ids[ids >= 0].tolist():
        has_image = bool(samples.has_image[number])
        text = int(samples.tokens[number]) - IMAGE_TOKENS * has_image
        tokens = draw.integers(1, VOCABULARY, text).astype(np.int32)
        if has_image:
            tokens = np.insert(tokens, min(8, text), -200).astype(np.int32)
        pixels = draw.integers(0, 256, (int(has_image), SIDE, SIDE, 3)).astype(np.uint8)
        spans = np.array([[len(tokens) - text // 2, len(tokens)]], np.int32)
        chosen.append(Sample(str(number), tokens, spans, pixels))
    longest = int(samples.tokens[ids[ids >= 0]].max())
    shape = BatchShape(rows=rows, buckets=(-(-longest // 8) * 8,), image_tokens=IMAGE_TOKENS)
    return collate(chosen, shape, SIDE)


def _engine(config: GroupConfig) -> PlainEngine:
    model = build_model(ModelConfig(
        vision=VisionConfig(settings=tower(64, layers=2, heads=2, image=SIDE, patch=PATCH)),
        language=LanguageConfig(settings=decoder(
            config.hidden, config.layers, heads=2, vocabulary=VOCABULARY, positions=2048
        )),
        trainable=("projector", "language"),
    ))  # fmt: skip
    set_modes(model)
    return PlainEngine(model, build_optimizer(model, OptimConfig(lr=1e-5)), grad_clip=1.0)


def _train(engine: PlainEngine, batch: Batch) -> float:
    sent = [to_device(batch, torch.device("cpu"))]
    started = time.process_time()
    train_step(engine, sent, global_tokens=batch.num_targets, world_size=1)
    return time.process_time() - started
