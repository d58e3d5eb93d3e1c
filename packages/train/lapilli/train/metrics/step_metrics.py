"""Compute a step's metrics: loss per sample, throughput, utilisation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lapilli.model.attention.forward import holds_all_scores
from lapilli.model.flops import BatchNumbers, model_numbers, step_flops
from lapilli.model.peak import measured_peak, peak_flops
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.device import device_name
from lapilli.train.run_folder.sample_losses import SampleLoss, read_worst, write_worst
from lapilli.train.steps.feed import Feed, StepBatches
from lapilli.train.steps.rows import MicroRows, row_pairs, row_tokens
from lapilli.train.steps.step import DeviceBatch

__all__ = [
    "StepMeter",
    "StepSpeed",
    "Worst",
    "group_means",
    "padded_numbers",
    "slot_losses",
]  # fmt: skip

KEPT = 20  # samples in it
WINDOW = 200  # steps it looks back
REWRITTEN = 50  # steps from one writing to the next


def slot_losses(
    slots: Sequence[NDArray[np.int64]], batches: Sequence[DeviceBatch], size: int
) -> Tensor:
    """This rank's summed losses by place in the global batch, 0 elsewhere, on the device.

    The sum over ranks has every sample's loss unrounded: one rank's number and zeros.

    Args:
        slots: The place of each sample (`StepBatches.slots`).
        batches: The micro-batches, after the model has filled `sample_losses`.
        size: Samples of a global batch.

    Returns:
        fp32 [size].
    """
    losses = batches[0].inputs["sample_losses"].new_zeros(size)
    for places, batch in zip(slots, batches, strict=True):
        if len(places):  # consecutive: empty slots of a micro-batch are its last
            start = int(places[0])
            losses[start : start + len(places)] = batch.inputs["sample_losses"][: len(places)]
    return losses


def padded_numbers(step: StepBatches, feed: Feed) -> list[BatchNumbers]:
    """What every rank's micro-batches are padded to, from lengths alone: no rank is asked.

    The same rules as those of `lapilli.data.batches.collate.collate`, without reading other ranks'
    samples.

    Args:
        step: The step.
        feed: Whose dataset, shape and number of ranks are used.

    Returns:
        One a micro-batch, rank by rank.
    """
    found: list[BatchNumbers] = []
    shape = feed.shape
    sized = [[_real_sizes(micro, feed) for micro in micros] for micros in step.rows]
    for micros in sized:
        for number, (lengths, pairs, images, targets) in enumerate(micros):
            together = feed.carries_images(step.rows, number)
            length = shape.length_of(max(lengths, default=0), has_images=together)
            assert length is not None, "the collator has refused it"
            rows = shape.rows_at(length)
            found.append(BatchNumbers(
                row_lengths=lengths, images=images, targets=targets,
                padded_rows=rows,
                padded_length=length,
                padded_images=shape.padded_images(images, rows, has_images=together),
                padded_targets=shape.padded_targets(targets),
                pairs=pairs,
            ))  # fmt: skip
    return found


def _real_sizes(micro: MicroRows, feed: Feed) -> tuple[list[int], int, int, int]:
    """Tokens of each row, pairs that see each other, images, trained positions."""
    dataset, prefixes = feed.dataset, feed.plans.shared_tokens
    trees = [tree for row in micro for tree in row]
    return (
        [row_tokens(row, dataset.lengths, prefixes) for row in micro],
        sum(row_pairs(row, dataset.lengths, prefixes) for row in micro),
        sum(int(dataset.num_images[tree[0]]) for tree in trees),
        sum(int(dataset.num_trained[tree].sum()) for tree in trees),
    )


@dataclass(frozen=True, kw_only=True)
class StepSpeed:
    """Throughput and utilization of a step.

    Attributes:
        tokens: Of the global batch, the images' own included.
        rows: Of the global batch, where they hold several samples; else None.
        images: Of the global batch, likewise.
        flops: What the mathematics of the real tokens needs.
        mfu: Its share of the devices' peak rate; None where no peak is known.
        hardware_flops: What all ranks execute, padding and recomputation included.
        hfu: Its share of the peak rate.
    """

    tokens: int
    rows: int | None
    images: int | None
    flops: float
    mfu: float | None
    hardware_flops: float
    hfu: float | None


class StepMeter:
    """Computes rank 0's part of a metrics row. Never reads the device.

    Args:
        feed: The run's data, the shapes of its batches, and the number of devices.
        module: The model, as the engine holds it.
        device: What it computes on.
    """

    def __init__(self, feed: Feed, module: VisionLanguageModel, device: torch.device) -> None:
        self._feed = feed
        self._dataset = feed.dataset
        self._numbers = model_numbers(module)
        is_eager = holds_all_scores(module.language)
        self._attention: Literal["eager", "flash"] = "eager" if is_eager else "flash"
        is_cpu = device.type == "cpu"
        peak = measured_peak(device) if is_cpu else peak_flops(device_name(device))
        self._peak = peak and peak * feed.world_size

    def speed(self, step: StepBatches, seconds: float) -> StepSpeed:
        """Tokens, operations and the share of the devices' peak rate they make.

        Args:
            step: The step.
            seconds: How long it took, with waiting for data.
        """
        counted = padded_numbers(step, self._feed)
        micros = [
            step_flops(
                self._numbers,
                numbers,
                attention=self._attention,
                skips_future=self._attention == "flash" and not self._feed.shape.has_trees,
            )
            for numbers in counted
        ]
        flops = sum(micro.model.total for micro in micros)
        executed = sum(micro.hardware.total for micro in micros)
        tokens = sum(sum(numbers.row_lengths) for numbers in counted)
        possible = seconds * self._peak if self._peak else None
        shares = self._feed.config.shares_rows
        return StepSpeed(
            tokens=tokens,
            rows=sum(len(numbers.row_lengths) for numbers in counted) if shares else None,
            images=sum(numbers.images for numbers in counted) if shares else None,
            flops=flops,
            mfu=flops / possible if possible else None,
            hardware_flops=executed,
            hfu=executed / possible if possible else None,
        )

    def samples(self, step: StepBatches, losses: Sequence[float]) -> list[SampleLoss]:
        """Each sample's loss; empty if the loss has no parts (Liger).

        Args:
            step: The step.
            losses: Summed losses by place in the global batch.
        """
        found: list[SampleLoss] = []
        for index, loss in zip(step.placed.tolist(), losses, strict=False):
            tokens = int(self._dataset.num_trained[index]) if index >= 0 else 0
            if tokens and not math.isnan(loss):
                name = self._dataset.sample_id(index)
                has_images = bool(self._dataset.num_images[index])
                found.append(
                    SampleLoss(
                        step=step.step,
                        index=index,
                        sample_id=name,
                        has_images=has_images,
                        total=loss,
                        tokens=tokens,
                    )
                )
        return found


def group_means(samples: Sequence[SampleLoss], by: str) -> dict[str, tuple[float, int]]:
    """Mean loss over trained tokens, and their number, by `source` or `modality`."""
    sums: dict[str, tuple[float, int]] = {}
    for sample in samples:
        total, tokens = sums.get(getattr(sample, by), (0.0, 0))
        sums[getattr(sample, by)] = total + sample.total, tokens + sample.tokens
    return {name: (total / tokens, tokens) for name, (total, tokens) in sorted(sums.items())}


class Worst:
    """The samples of highest mean loss of the last steps, in `worst.jsonl`."""

    def __init__(self, run: Path, start: int) -> None:
        self._run = run
        before = [sample for sample in read_worst(run) if sample.step < start]
        self._steps: deque[list[SampleLoss]] = deque([before] if before else [], maxlen=WINDOW)

    def add(self, samples: Sequence[SampleLoss]) -> None:
        """Remember a step; now and then write."""
        self._steps.append(_highest(samples))
        if len(self._steps) == 1 or (samples and samples[0].step % REWRITTEN == 0):
            self.write()

    def write(self) -> None:
        """Replace the file."""
        highest = _highest([sample for step in self._steps for sample in step])
        write_worst(self._run, highest)


def _highest(samples: Sequence[SampleLoss]) -> list[SampleLoss]:
    """The first `KEPT`, a sample once, with its highest loss."""
    found: dict[int, SampleLoss] = {}
    for sample in sorted(samples, key=lambda s: (-s.mean, s.step, s.index)):
        found.setdefault(sample.index, sample)
        if len(found) == KEPT:
            break
    return list(found.values())
