"""Replay a saved step in one process to find the sample, module and weight that went wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.data.batches.collate import Batch, collate
from lapilli.model.auxiliary.target_loss import AuxInputs
from lapilli.model.config import KEEP_ALL
from lapilli.model.parts.recomputation import apply_policy
from lapilli.model.parts.trainable import set_modes
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.config import OffloadConfig, RunConfig
from lapilli.train.device import choose_device, visible_devices
from lapilli.train.driver.workers import join_alone
from lapilli.train.errors import TrainError
from lapilli.train.health.step_dump import KeptStep
from lapilli.train.run_folder.settings import read_run_info
from lapilli.train.steps.aux_targets import aux_inputs, joined
from lapilli.train.steps.device_copy import send_ahead
from lapilli.train.steps.feed import Feed
from lapilli.train.steps.step import seed_step, to_device
from lapilli.train.worker.compatibility import build_start
from lapilli.train.worker.setup import Setup, setup
from lapilli.train.worker.taken_step import take_step

__all__ = ["Finding", "examine", "rerun"]


@dataclass(frozen=True)
class Finding:
    """Findings about a replayed step.

    Attributes:
        start: Step of the checkpoint it was approached from.
        loss: Mean over the global batch's trained tokens, with the losses of predictors.
        samples: Sample ids with the mean loss of their trained tokens, highest first.
        weight: The first parameter with a NaN or Inf; "" if all are finite.
        output: The first module whose output does, in the order of execution.
        gradient: The first module at whose output the gradient does, from the loss backwards.
        operation: The operation whose backward made it, as autograd's anomaly detection names it.
        leaves_predictors_out: Whether a model's predictors were left out: the run's plan now has
            other micro-batches.
    """

    start: int
    loss: float
    samples: list[tuple[str, float]]
    weight: str
    output: str
    gradient: str
    operation: str
    leaves_predictors_out: bool = False


def rerun(
    config: RunConfig, kept: KeptStep, on_step: Callable[[int], None] = lambda step: None
) -> Finding:
    """Run from the last checkpoint before a saved step to it, and examine it.

    Args:
        config: The run's settings.
        kept: The step.
        on_step: Called with each step taken on the way.

    Raises:
        DataError, ModelError, TrainError: The run or its dataset is no longer what it was.
    """
    newest = latest_checkpoint(kept.run)
    if newest and newest.step > kept.step:
        raise TrainError(
            f"replay: {kept.run} has continued to step {newest.step}; expected a checkpoint of "
            f"step {kept.step} or before, to run step {kept.step + 1} from"
        )
    config = replace(
        config,
        output=str(kept.run),
        num_workers=1,
        launcher="process",
        recovery=replace(config.recovery, min_workers=0),
        zero_stage=0 if config.precision == "fp32" else 1,
        offload=OffloadConfig(),
    )
    device = choose_device(config.device, visible_devices())
    join_alone(device)
    info = read_run_info(kept.run)
    activations = info.activations if info else KEEP_ALL
    ready = setup(config, device, rank=0, world_size=1, activations=activations)
    _step_to(ready, kept.step, on_step)
    # DeepSpeed's hooks stay with its own copy.
    model, _ = build_start(config)
    model.to(ready.device).load_state_dict(ready.engine.module.state_dict())
    apply_policy(model, activations)
    set_modes(model)
    losses = _sample_losses(model, ready.feed, kept, ready.device)
    ranks = kept.batches()
    aux = _predicted(ready.feed, kept, ranks, ready.device)
    finding = examine(model, ranks, ready.device, config.seed, kept.step, aux)
    return replace(
        finding, start=ready.start, samples=losses, loss=finding.loss / max(1, kept.global_tokens),
        leaves_predictors_out=bool(config.model.aux.heads) and not aux,
    )  # fmt: skip


def _predicted(
    feed: Feed, kept: KeptStep, ranks: Sequence[Sequence[Batch]], device: torch.device
) -> list[list[AuxInputs]]:
    """What predictors take beside each micro-batch, by rank; empty where nothing is predicted.

    The dataset's plan says which images a micro-batch has. Empty too where it says others now: a
    run of other settings is replayed without its predictors.
    """
    heads = len(feed.config.model.aux.heads)
    if not heads:
        return []
    again = Feed(feed.dataset, feed.config, rank=0, world_size=len(ranks), plans=feed.plans)
    rows = again.make(kept.step).rows
    ids = [
        [[feed.dataset.sample_id(int(i)) for row in micro for tree in row for i in tree]
         for micro in of_rank]
        for of_rank in rows
    ]  # fmt: skip
    if ids != kept.sample_ids:
        return []
    records = sum(index >= 0 for index in kept.sample_indices)
    found = [
        again.targets_of(rows, rank, records=records, tokens=kept.global_tokens)
        for rank in range(len(ranks))
    ]
    own = [one for one in found if one is not None]
    return [
        aux_inputs(joined(own, rank), batches, heads, device) for rank, batches in enumerate(ranks)
    ]


def _step_to(ready: Setup, step: int, on_step: Callable[[int], None]) -> None:
    """Take the steps before it again; nothing is written."""
    if ready.start == step:
        return
    with closing(ready.feed.steps(ready.start)) as steps:  # type: ignore[type-var]
        heads = len(ready.config.model.aux.heads)
        for batches in send_ahead(steps, ready.device, heads):
            if batches.step == step:
                return
            take_step(ready, batches)
            on_step(batches.step)


def _sample_losses(
    model: nn.Module, feed: Feed, kept: KeptStep, device: torch.device
) -> list[tuple[str, float]]:
    """Loss of each sample alone in a batch; NaN and Inf first."""
    found: list[tuple[str, float]] = []
    for index in kept.sample_indices:
        if index < 0:
            continue
        if index >= len(feed.dataset):
            raise TrainError(
                f"replay: {kept.path} names sample {index} of {len(feed.dataset)}; expected the "
                "run's own dataset"
            )
        sample = feed.dataset.sample(index)
        batch = collate([sample], feed.shape, feed.dataset.image_size)
        with torch.no_grad():
            loss = float(model(**to_device(batch, device).inputs)) / max(1, batch.num_targets)
        found.append((sample.sample_id, loss))
    return sorted(found, key=lambda pair: (pair[1] == pair[1], -pair[1]))


def examine(
    model: nn.Module,
    ranks: Sequence[Sequence[Batch]],
    device: torch.device,
    seed: int,
    step: int,
    aux: Sequence[Sequence[AuxInputs]] = (),
) -> Finding:
    """Forward and backward over all micro-batches, with every module's output watched.

    `aux` has what predictors take beside each micro-batch; without it they do not run.

    Returns:
        A finding whose `loss` is the sum over trained tokens, without the samples'.
    """
    weights = (name for name, value in model.named_parameters() if not _is_finite(value))
    outputs: list[str] = []
    gradients: list[str] = []
    handles = [
        module.register_forward_hook(_watch(name, outputs, gradients))
        for name, module in model.named_modules()
        if name
    ]
    total, operation = 0.0, ""
    try:
        for rank, batches in enumerate(ranks):
            seed_step(seed, step, rank)
            for number, batch in enumerate(batches):
                beside = {"aux": aux[rank][number]} if aux else {}
                loss = model(**to_device(batch, device).inputs, **beside)
                total += float(loss.detach())
                operation = operation or _backward(loss)
    finally:
        for handle in handles:
            handle.remove()
    first = [next(iter(names), "") for names in (outputs, gradients)]
    return Finding(
        start=0,
        loss=total,
        samples=[],
        weight=next(weights, ""),
        output=first[0],
        gradient=first[1],
        operation=operation,
    )


def _watch(name: str, outputs: list[str], gradients: list[str]) -> Callable[..., None]:
    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        for tensor in _tensors(output):
            if not _is_finite(tensor):
                outputs.append(name)
            if tensor.requires_grad:
                tensor.register_hook(check)

    def check(gradient: Tensor) -> None:
        if not _is_finite(gradient):
            gradients.append(name)

    return after


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)] if output is not None else []


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _backward(loss: Tensor) -> str:
    """The operation that autograd's anomaly detection stops at; "" if none."""
    try:
        with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings(action="ignore"):
            loss.backward()  # what torch would warn of is what is found
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "returned nan" not in text:
            raise
        return text
    return ""
