"""Copy batches to the device one step ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch

from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.train.steps.aux_targets import aux_inputs
from lapilli.train.steps.feed import StepBatches
from lapilli.train.steps.step import DeviceBatch, to_device

__all__ = ["SentStep", "send_ahead"]


@dataclass(frozen=True)
class SentStep(StepBatches):
    """A step whose micro-batches are on the device, or on their way there.

    Attributes:
        on_device: The micro-batches as the model's forward takes them.
        aux: What the predictors take beside each, with this rank's targets alone.
    """

    on_device: list[DeviceBatch] = field(default_factory=list[DeviceBatch])
    aux: list[AuxInputs] = field(default_factory=list[AuxInputs])


def send_ahead(
    steps: Iterator[StepBatches], device: torch.device, heads: int = 0
) -> Iterator[SentStep]:
    """The same steps, each copied while the one before it is computed; `heads` predictors.

    On a GPU from pinned memory on a stream of its own; computing waits for the copy's event and not
    on the host. On a CPU the same steps without a copy.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    sent: tuple[SentStep, torch.cuda.Event | None] | None = None
    for step in steps:
        following = _send(step, device, stream, heads)
        if sent:
            yield _arrived(*sent)
        sent = following
    if sent:
        yield _arrived(*sent)


def _send(
    step: StepBatches, device: torch.device, stream: torch.cuda.Stream | None, heads: int
) -> tuple[SentStep, torch.cuda.Event | None]:
    """Start the copies of one step."""
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        moved = [
            to_device(batch, device, weight)
            for batch, weight in zip(step.batches, step.weights, strict=True)
        ]
        aux = aux_inputs(step.targets, step.batches, heads, device) if step.targets else []
    known = {one.name: getattr(step, one.name) for one in fields(StepBatches)}
    copied = torch.cuda.Event() if stream else None
    if copied:
        copied.record(stream)
    return SentStep(**known, on_device=moved, aux=aux), copied


def _arrived(step: SentStep, copied: torch.cuda.Event | None) -> SentStep:
    """Let the stream that computes wait for the copies; their memory is its own from here on."""
    if copied:
        here = torch.cuda.current_stream()
        here.wait_event(copied)
        for batch in step.on_device:
            for tensor in batch.inputs.values():
                tensor.record_stream(here)
        for tensor in {tensor for aux in step.aux for tensor in aux.tensors()}:
            tensor.record_stream(here)
    return step
