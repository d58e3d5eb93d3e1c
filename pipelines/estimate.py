"""`train --estimate`: what a run takes, told before it starts; needs no Ray and no weights."""

from __future__ import annotations

from pathlib import Path

import torch
from rich import box
from rich.table import Table

from lapilli.data.dataset import open_dataset
from lapilli.data.manifest import NAME as MANIFEST
from lapilli.train.config import RunConfig
from lapilli.train.device import device_memory
from lapilli.train.estimate import Estimate, estimate_run, follow, sketch_run
from lapilli.train.sketch import Sketch
from pipelines.command import console, say
from pipelines.describe import bytes_text

__all__ = ["ESTIMATE", "tell_estimate"]

ESTIMATE = "--estimate"


def tell_estimate(config: RunConfig) -> None:
    """Say memory by part and ZeRO stage, what a micro-batch adds, and disk."""
    sketch = sketch_run(config)
    length, samples = _longest(config, sketch)
    estimate = estimate_run(config, sketch, length=length)
    has_gpu = config.device != "cpu" and torch.cuda.is_available()
    device_bytes = device_memory("cuda") if has_gpu and not config.micro_batch else None
    config = follow(config, device_bytes, lambda: estimate)
    console.print(_stages(config, estimate))
    kept = "each layer's input kept" if config.model.gradient_checkpointing else "everything kept"
    say(
        f"a row of {length} tokens keeps {bytes_text(estimate.row_bytes)} for backward ({kept}), "
        f"any micro-batch {bytes_text(estimate.fixed_bytes)} for the head"
    )
    say(
        f"global batch {config.global_batch} = {config.workers} workers x micro-batch "
        f"{config.micro_batch} x accumulation {config.accumulation}"
    )
    disk = estimate.checkpoint_bytes * (config.keep + 1)
    say(
        f"disk: {bytes_text(estimate.checkpoint_bytes)} a checkpoint, "
        f"{bytes_text(disk)} with {config.keep} kept and one being written"
    )
    if every := config.milestone_every:
        size = bytes_text(estimate.checkpoint_bytes // 3)
        say(f"disk: {size} more every {every:,} steps, for a milestone")
    if samples:
        steps = -(-samples // config.global_batch) * config.epochs
        steps = min(steps, config.max_steps) if config.max_steps else steps
        say(f"{samples:,} samples x {config.epochs} epochs: about {steps:,} steps")


def _longest(config: RunConfig, sketch: Sketch) -> tuple[int, int]:
    """Tokens of the longest sample and number of samples; `max_length` and 0 without a dataset."""
    if not (Path(config.dataset) / MANIFEST).exists():
        say(f"{config.dataset} is no dataset yet: rows of max_length, {config.max_length} tokens")
        return config.max_length, 0
    tokens = sketch.model.vision.num_tokens
    dataset = open_dataset(
        config.dataset, view=config.view, image_tokens=tokens, max_length=config.max_length
    )
    return int(dataset.lengths.max()), len(dataset)


def _stages(config: RunConfig, estimate: Estimate) -> Table:
    """A row a part, a column a ZeRO stage; then activations and the sum."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("part", "parameters", "trained"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for stage in estimate.states:
        style = "bold" if stage == config.zero_stage else None
        table.add_column(f"ZeRO-{stage}", justify="right", header_style=style)
    for part, (total, trained) in estimate.parameters.items():
        held = [bytes_text(states[part].total) for states in estimate.states.values()]
        table.add_row(part, f"{total / 1e6:,.1f} M", f"{trained / 1e6:,.1f} M", *held)
    rows = config.micro_batch * estimate.row_bytes + estimate.fixed_bytes
    table.add_row(f"activations of {config.micro_batch}", "", "", *[bytes_text(rows)] * 4)
    sums = [
        bytes_text(estimate.worker_bytes(stage, config.micro_batch)) for stage in estimate.states
    ]
    table.add_row("a worker", "", "", *sums, style="bold")
    table.caption = f"zero_stage is {config.zero_stage}, {config.precision}"
    if config.offload != "none":
        for what, name in (("in the host's memory", "host"), ("on its disk", "disk")):
            sizes = [
                sum(getattr(part, name) for part in parts.values())
                for parts in estimate.states.values()
            ]
            if any(sizes):
                table.add_row(what, "", "", *[bytes_text(size) for size in sizes])
    return table
