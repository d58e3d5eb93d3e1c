"""Estimate what a step sends over the link between workers, and how long that takes."""

from __future__ import annotations

from collections.abc import Mapping

from lapilli.train.config import RunConfig

__all__ = ["communication_seconds", "sent_bytes"]


def sent_bytes(config: RunConfig, parameters: Mapping[str, tuple[int, int]]) -> float:
    """Bytes that one worker sends in an optimizer step, by ZeRO's own volumes.

    With N workers a reduce-scatter or an all-gather of M bytes sends M (N - 1) / N, an all-reduce
    twice that (Rajbhandari et al., arXiv 1910.02054, section 7). Stages 0 and 1 reduce the gradient
    once a step, stages 2 and 3 with every micro-batch. Stages 1 and 2 gather what was updated.
    Stage 3 gathers weights for every forward, and for every backward those of parts that gradients
    pass: all but a frozen tower's.

    Args:
        config: The run, with its micro-batch.
        parameters: By part, all and those that learn (`Estimate.parameters`).
    """
    workers = config.num_workers
    size = 4 if config.precision == "fp32" else 2
    trained = size * sum(learning for _, learning in parameters.values())
    once = (workers - 1) / workers
    if config.zero_stage == 0:
        return 2 * trained * once
    if config.zero_stage < 3:
        reduced = config.accumulation if config.zero_stage == 2 else 1
        return (reduced + 1) * trained * once
    gathered = size * sum(
        total * (1 if name == "vision" and not learning else 2)
        for name, (total, learning) in parameters.items()
    )
    return config.accumulation * (gathered + trained) * once


def communication_seconds(
    config: RunConfig, parameters: Mapping[str, tuple[int, int]], link_gbps: float
) -> float:
    """Seconds of a step's communication at a link's full rate, nothing of it hidden by computing.

    Args:
        config: The run, with its micro-batch.
        parameters: By part, all and those that learn.
        link_gbps: Gigabits a second that one worker sends.
    """
    return sent_bytes(config, parameters) * 8 / (link_gbps * 1e9)
