"""Estimate a run's memory, disk and time before it starts; needs no Ray and no weights.

lapilli estimate --config RECIPE --dataset DIR --output DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from lapilli.data.batches.sampler import EpochPlan
from lapilli.data.batches.tree_plan import TreePlan
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.io.access import exists
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.remote_path import open_output
from lapilli.data.shards.manifest import NAME as MANIFEST
from lapilli.model.attention.choice import choose_attention
from lapilli.model.config import ActivationPolicy
from lapilli.model.flops import BatchNumbers, model_numbers, step_flops
from lapilli.model.parts.language import language_settings
from lapilli.model.peak import peak_flops
from lapilli.model.vlm import read_outline
from lapilli.train.checkpoint.at_hand import local_model
from lapilli.train.config import RunConfig
from lapilli.train.device import Device, device_memory
from lapilli.train.driver.communication import communication_seconds
from lapilli.train.driver.fake_model import Sketch
from lapilli.train.driver.memory_estimate import (
    Estimate,
    estimate_run,
    row_sizes,
    sketch_run,
)
from lapilli.train.driver.memory_policy import choose_memory, memory_budget
from lapilli.train.engine.fragments import checkpoint_share
from lapilli.train.steps.rows import EpochPlans, RowSamples, planned_rows, row_pairs, row_tokens
from lapilli.train.worker.compatibility import check_model
from pipelines.cli.command import parse, run, say
from pipelines.cli.terminal import print_table
from pipelines.reports.ticks import duration_text

__all__ = ["estimate", "main", "sample_operations"]

USUAL_MFU = 0.4  # an assumption, said with the time that follows from it
LOOKED_AT = 2000  # rows


def estimate(config: RunConfig) -> None:
    """Print memory by part and ZeRO stage, activations, disk and time."""
    config = replace(config, model=local_model(config.model))
    dataset = _open(config)
    language = config.model.language
    if note := choose_attention(language.attention, language_settings(language)).note:
        say(note)
    sketch = sketch_run(config)
    plans = EpochPlans(dataset, config) if dataset else None
    planned = planned_rows(plans.sampled, dataset) if plans and dataset else None
    sizes = row_sizes(config, planned, dataset)
    device: Device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    estimate = estimate_run(config, sketch, sizes, device=device)

    def estimator(changed: RunConfig) -> Estimate:
        model = sketch if changed.model == config.model else sketch_run(changed)
        return estimate_run(changed, model, sizes, device=device)

    budget = memory_budget(config, device, device_memory)
    config, memory = choose_memory(config, device, budget, estimator)
    policy = memory.activations
    print_table(_stages(config, estimate, policy))
    say(memory.note)
    rows = [estimate.batch_bytes(n, policy) for n in (1, 2)]
    say(
        f"a row of {sizes.length} tokens takes {bytes_text(rows[1] - rows[0])} until its backward, "
        f"any micro-batch {bytes_text(2 * rows[0] - rows[1])} more"
    )
    say(config.batch_note)
    learning = sum(trained for _, trained in estimate.parameters.values())
    held = checkpoint_share(learning, config.num_workers)
    say(
        f"host memory: {bytes_text(held)} a worker while a checkpoint is saved, and as much while "
        f"one is restored: a copy of its share of {bytes_text(estimate.checkpoint_bytes)}"
    )
    disk = estimate.checkpoint_bytes * (config.checkpoint.keep_last + 1)
    say(
        f"disk: {bytes_text(estimate.checkpoint_bytes)} a checkpoint, "
        f"{bytes_text(disk)} with {config.checkpoint.keep_last} kept and one being written"
    )
    if every := config.checkpoint.archive_every:
        size = bytes_text(estimate.checkpoint_bytes // 3)
        say(f"disk: {size} more every {every:,} steps, for a milestone")
    if config.num_workers > 1:
        link = config.communication.link_gbps or 100.0
        seconds = communication_seconds(config, estimate.parameters, link)
        say(
            f"communication: {seconds:.2g} s a step where a worker sends {link:g} Gbit/s "
            "(communication.link_gbps), unless computing hides it"
        )
    if dataset and plans and planned:
        if config.shares_rows:
            say(planned.note)
            if note := planned.padding_note(config.micro_batch_size, config.num_workers):
                say(note)
        _print_time(config, sketch, dataset, plans)


def _print_time(config: RunConfig, sketch: Sketch, dataset: Dataset, plans: EpochPlans) -> None:
    """Steps, operations, and the hours that these take at a rate."""
    samples = len(dataset)
    steps = plans.first.num_steps * config.epochs
    steps = min(steps, config.max_steps) if config.max_steps else steps
    operations = sample_operations(sketch, dataset, plans) * steps * config.global_batch_size
    say(
        f"{samples:,} samples x {config.epochs} epochs: about {steps:,} steps, "
        f"{operations:.2g} operations"
    )
    is_gpu = config.device != "cpu" and torch.cuda.is_available()
    peak = peak_flops(torch.cuda.get_device_name()) if is_gpu else None
    if peak:
        seconds = operations / (config.num_workers * peak * USUAL_MFU)
        say(
            f"time: about {duration_text(seconds)} where {config.num_workers} workers reach "
            f"{USUAL_MFU:.0%} MFU of {peak / 1e12:,.0f} TFLOP/s each"
        )
    else:
        seconds = operations / 1e14
        say(f"time: about {duration_text(seconds)} for each 100 TFLOP/s that all workers reach")


def sample_operations(sketch: Sketch, dataset: Dataset, plans: EpochPlans) -> float:
    """Operations of an average sample's forward and backward, without padding.

    Args:
        sketch: The run's model.
        dataset: Its samples.
        plans: Of its epochs, of whose rows some from all over are looked at.
    """
    rows = _some_rows(plans.sampled)
    trees = [tree for row in rows for tree in row]
    lengths = [row_tokens(row, dataset.lengths, plans.shared_tokens) for row in rows]
    images = sum(int(dataset.num_images[tree[0]]) for tree in trees)
    targets = sum(int(dataset.num_trained[tree].sum()) for tree in trees)
    numbers = BatchNumbers(
        row_lengths=lengths,
        images=images,
        targets=targets,
        padded_rows=len(lengths),
        padded_length=max(lengths),
        padded_images=images,
        padded_targets=targets,
        pairs=sum(row_pairs(row, dataset.lengths, plans.shared_tokens) for row in rows),
    )
    return step_flops(model_numbers(sketch.model), numbers).model.total / sum(map(len, trees))


def _some_rows(plan: EpochPlan | TreePlan) -> list[RowSamples]:
    """Rows from all over an epoch."""
    if isinstance(plan, TreePlan):
        count = len(plan.rows) - 1
        return [plan.row(int(row)) for row in _spread(count)]
    order = plan.order[plan.order >= 0]
    return [[order[place : place + 1]] for place in _spread(len(order))]


def _spread(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, LOOKED_AT).astype(np.int64))


def _open(config: RunConfig) -> Dataset | None:
    """The run's dataset as its model sees it, if it is there yet."""
    if not exists(open_output(config.dataset) / MANIFEST):
        say(f"{config.dataset} is no dataset yet: rows of max_length, {config.max_length} tokens")
        return None
    model = read_outline(config.model) or sketch_run(config).model
    dataset = open_dataset(
        config.dataset,
        view=config.view,
        image_tokens=model.image_tokens,
        max_length=config.max_length,
        cache=config.cache.folder,
        cache_limit=config.cache.limit,
    )
    check_model(model, dataset)
    return dataset


def _stages(config: RunConfig, estimate: Estimate, policy: ActivationPolicy) -> Table:
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
    tokens = config.micro_batch_tokens
    rows = config.micro_batch_size or max(1, tokens // estimate.length)
    held = bytes_text(estimate.batch_bytes(rows, policy))
    of = f"{tokens} tokens" if tokens else str(rows)
    table.add_row(f"activations of {of}", "", "", *[held] * 4)
    sums = [bytes_text(estimate.worker_bytes(stage, rows, policy)) for stage in estimate.states]
    table.add_row("a worker", "", "", *sums, style="bold")
    table.caption = f"zero_stage is {config.zero_stage}, {config.precision}"
    if config.offload.to != "none":
        for what, name in (("in the host's memory", "host"), ("on its disk", "disk")):
            sizes = [
                sum(getattr(part, name) for part in parts.values())
                for parts in estimate.states.values()
            ]
            if any(sizes):
                table.add_row(what, "", "", *[bytes_text(size) for size in sizes])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        RunConfig, argv, "Estimate a training run's memory, disk and time.",
        addresses=["dataset", "output", "init_from", "pretrained"],
    )  # fmt: skip
    estimate(config)
    return 0


if __name__ == "__main__":
    run(main)
