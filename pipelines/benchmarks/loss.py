"""The head's loss in chunks against plain cross-entropy over all logits: memory and time.

The floor of the plain way is its logits in fp32, P x V x 4 bytes. Each measurement has a process of
its own, so that its peak is its own; the ways take turns, round by round; told are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from lapilli.data.images.buffers import peak_resident
from lapilli.model.loss import trained_loss
from pipelines.benchmarks.harness import add_row, clock, provenance
from pipelines.cli.command import parse, say

__all__ = ["LossConfig", "main"]

WAYS = ("plain", "chunked")


@dataclass(frozen=True)
class LossConfig:
    """What is measured; the defaults are LLaVA-1.5-7B's head, its width cut to a CPU's measure.

    Attributes:
        positions: Trained positions, P.
        hidden: D.
        vocabulary: V.
        chunk: Positions at once.
        rounds: How often each way is measured.
        save: Add rows to `results/loss.csv`.
    """

    positions: int = 4096
    hidden: int = 512
    vocabulary: int = 32000
    chunk: int = 1024
    rounds: int = 3
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each way."""
    config = parse(LossConfig, argv, "The loss in chunks against all logits at once.")
    head = provenance(("torch",), "loss", argv)
    found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    for _ in range(config.rounds):
        for way in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[way].append(pool.submit(measure, config, way).result())
    floor = round(config.positions * config.vocabulary * 4 / 2**20)
    for way, runs in found.items():
        seconds = round(statistics.median(cpu for cpu, _ in runs), 2)
        peak = round(statistics.median(memory for _, memory in runs) / 2**20)
        say(f"{way:>8}: {peak} MiB above its inputs (logits {floor}), {seconds} s of processor")
        row = {
            "way": way, "positions": config.positions, "hidden": config.hidden,
            "vocabulary": config.vocabulary, "chunk": config.chunk, "rounds": config.rounds,
            "logits_mib": floor, "peak_mib": peak, "processor_seconds": seconds,
        }  # fmt: skip
        if config.save:
            add_row("loss", head | row)
    return 0


def measure(config: LossConfig, way: str) -> tuple[float, int]:
    """Processor seconds of forward and backward, and bytes of memory beyond the inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(1, config.positions, config.hidden, requires_grad=True)
    head = torch.randn(config.vocabulary, config.hidden, requires_grad=True)
    positions = torch.arange(config.positions)
    targets = torch.randint(0, config.vocabulary, (config.positions,))

    def work() -> None:
        if way == "plain":
            logits = torch.nn.functional.linear(hidden[0], head)
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        else:
            loss = trained_loss(hidden, positions, targets, head, chunk=config.chunk)
        loss.backward()

    before = peak_resident()
    elapsed, _ = clock(work)
    return elapsed.cpu, peak_resident() - before
