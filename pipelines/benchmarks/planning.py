"""The order of an epoch of 665,298 samples: time, and what of its batches is padding or waiting.

The floor is one sort of the lengths. Beside the policies stands LLaVA's own order, made by the same
code that equals its sampler index for index, and a plan without grouping. Lengths are drawn like
LLaVA-1.5's: 576 image tokens and a log-normal text for all but 40,688 records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lapilli.data.sampler import EpochPlan, Policy, assign, plan_epoch
from pipelines.benchmarks.harness import Spread, add_row, by_turns, provenance, table
from pipelines.command import parse, say

__all__ = ["PlanConfig", "main", "waste"]

TEXT_ONLY = 40_688
POLICIES = ("grouped", "llava", "random")


@dataclass(frozen=True)
class PlanConfig:
    """What is measured.

    Attributes:
        samples: Samples of the epoch.
        ranks: Workers.
        micro_batch: Samples a worker has at once.
        accumulation: Micro-batches of a worker in a step.
        rounds: Turns that count.
        save: Add rows to `results/plan.csv`.
    """

    samples: int = 665_298
    ranks: int = 8
    micro_batch: int = 16
    accumulation: int = 1
    rounds: int = 7
    save: bool = True

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.ranks * self.micro_batch * self.accumulation


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each policy."""
    config = parse(PlanConfig, argv, "The plan of an epoch: its time, its padding, its waiting.")
    head = provenance(("numpy",), "plan", argv)
    rows = measure(config)
    columns = ("policy", "seconds", "steps", "padded %", "waiting %", "tokens a step of LLaVA's")
    names = ("policy", "seconds", "steps", "padded_percent", "waiting_percent", "of_llava")
    title = f"{config.samples:,} samples, {config.ranks} ranks x {config.micro_batch}"
    table(title, columns, [[row[name] for name in names] for row in rows])
    if config.save:
        path = [add_row("plan", head | row) for row in rows][-1]
        say(f"{len(rows)} rows added to {path}")
    return 0


def measure(config: PlanConfig) -> list[dict[str, Any]]:
    """Every policy by turns, then what its batches are like."""
    lengths, has_image = _lengths(config.samples)
    clocks: dict[str, Callable[[], float]] = {
        name: lambda name=name: _seconds(lambda: _plan(name, lengths, has_image, config))
        for name in POLICIES
    }
    clocks["one sort"] = lambda: _seconds(lambda: np.argsort(lengths, kind="stable"))
    spreads = by_turns(clocks, config.rounds)
    costs = {
        name: waste(_plan(name, lengths, has_image, config), lengths, config) for name in POLICIES
    }
    return [_row(name, spread, costs, config) for name, spread in spreads.items()]


def _row(
    name: str, spread: Spread, costs: dict[str, dict[str, float]], config: PlanConfig
) -> dict[str, Any]:
    cost = costs.get(name, {})
    return {
        "policy": name, "samples": config.samples, "ranks": config.ranks,
        "micro_batch": config.micro_batch, "accumulation": config.accumulation,
        "rounds": config.rounds, "seconds": round(spread.median, 4),
        "low": round(spread.low, 4), "high": round(spread.high, 4),
        "steps": int(cost["steps"]) if cost else "",
        "padded_percent": round(100 * cost["padded"], 3) if cost else "",
        "waiting_percent": round(100 * cost["waiting"], 3) if cost else "",
        "of_llava": round(cost["computed"] / costs["llava"]["computed"], 4) if cost else "",
    }  # fmt: skip


def waste(plan: EpochPlan, lengths: NDArray[np.int64], config: PlanConfig) -> dict[str, float]:
    """What of an epoch is not work.

    Returns:
        `steps`; `padded`, the share of padding among the tokens of all micro-batches, each as long
        as its longest row; `waiting`, by how much all ranks together would compute more if each had
        as many tokens as the one with most in its micro-step; `computed`, tokens an epoch takes
        with both, which is what its time follows.
    """
    held = real = computed = 0
    for step in range(plan.num_steps):
        ranks = assign(plan, step, lengths, world_size=config.ranks, micro_batch=config.micro_batch)
        ids = np.array([[np.pad(m, (0, config.micro_batch - len(m)), constant_values=-1)
                         for m in rank] for rank in ranks])  # fmt: skip
        tokens = np.where(ids >= 0, lengths[ids], 0)
        micro = tokens.max(axis=2) * config.micro_batch  # [ranks, accumulation]
        real += int(tokens.sum())
        held += int(micro.sum())
        computed += int(micro.max(axis=0).sum()) * config.ranks
    return {
        "steps": plan.num_steps, "padded": 1 - real / held, "waiting": computed / held - 1,
        "computed": computed,
    }  # fmt: skip


def _plan(
    name: str, lengths: NDArray[np.int64], has_image: NDArray[np.bool_], config: PlanConfig
) -> EpochPlan:
    is_llava = name == "llava"
    return plan_epoch(
        lengths, has_image, global_batch=config.global_batch, seed=0, epoch=0,
        policy=cast("Policy", name), llava_micro_batch=config.micro_batch if is_llava else None,
    )  # fmt: skip


def _lengths(samples: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    draw = np.random.default_rng(0)
    has_image = draw.permutation(samples) >= round(samples * TEXT_ONLY / 665_298)
    text = np.where(
        has_image, draw.lognormal(5.4, 0.65, samples), draw.lognormal(6.9, 0.7, samples)
    )
    lengths = np.minimum(text.astype(np.int64) + 8 + 576 * has_image, 2048)
    return lengths, has_image


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
