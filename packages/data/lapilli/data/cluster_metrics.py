"""Figures for whoever watches a cluster: Ray's metrics, which Prometheus reads from each node.

They are told by the processes that know them anyway, and nothing is measured for them. Where Ray
does not run, or `LAPILLI_METRICS` is 0, nothing is done.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

__all__ = ["METRICS", "ClusterMetric", "add", "exported_name", "put"]

SWITCH = "LAPILLI_METRICS"
OF = "of"  # the tag: a dataset or run, by the last part of its path or address


@dataclass(frozen=True)
class ClusterMetric:
    """A figure: a `counter` only grows, a `gauge` is the last value."""

    kind: Literal["counter", "gauge"]
    help: str


METRICS = {
    "lapilli_build_shards": ClusterMetric("counter", "Shards made"),
    "lapilli_build_images": ClusterMetric("counter", "Images made square and stored"),
    "lapilli_build_bytes": ClusterMetric("counter", "Bytes of shards written"),
    "lapilli_build_quarantined": ClusterMetric("counter", "Images that cannot be used"),
    "lapilli_train_step": ClusterMetric("gauge", "Optimizer steps done"),
    "lapilli_train_loss": ClusterMetric("gauge", "Loss of the last step"),
    "lapilli_train_samples": ClusterMetric("counter", "Samples trained on"),
    "lapilli_train_tokens": ClusterMetric("counter", "Tokens of the model's rows"),
    "lapilli_train_tokens_per_second": ClusterMetric("gauge", "Of the last step"),
    "lapilli_train_mfu": ClusterMetric("gauge", "Model FLOPs utilisation, 0 to 1"),
    "lapilli_train_step_seconds": ClusterMetric("gauge", "Seconds of the last step"),
    "lapilli_train_wait_seconds": ClusterMetric("gauge", "Of these, waiting for data"),
    "lapilli_train_checkpoint_seconds": ClusterMetric(
        "gauge", "Seconds the last checkpoint held training up"
    ),
    "lapilli_cache_hits": ClusterMetric("counter", "Shards found in the node's cache"),
    "lapilli_cache_misses": ClusterMetric("counter", "Shards copied when they were read"),
    "lapilli_cache_ahead": ClusterMetric("counter", "Shards copied before they were read"),
    "lapilli_cache_bytes": ClusterMetric("counter", "Bytes copied from the store"),
    "lapilli_cache_evictions": ClusterMetric("counter", "Shards removed to make room"),
    "lapilli_cache_wait_seconds": ClusterMetric("counter", "Waiting for shards, of all readers"),
}


def exported_name(name: str) -> str:
    """The name under which a node's endpoint serves a metric."""
    form = "ray_NAME_total" if METRICS[name].kind == "counter" else "ray_NAME"
    return form.replace("NAME", name)


def add(name: str, amount: float, of: str) -> None:
    """Let a counter grow.

    Args:
        name: Of `METRICS`.
        amount: By how much.
        of: The dataset's or run's path or address.
    """
    if amount > 0 and _is_on():
        _metric(name).inc(amount, {OF: _last(of)})


def put(name: str, value: float | None, of: str) -> None:
    """Set a gauge; None leaves it."""
    if value is not None and _is_on():
        _metric(name).set(float(value), {OF: _last(of)})


def _is_on() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and os.environ.get(SWITCH) != "0"


@cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind = metrics.Counter if METRICS[name].kind == "counter" else metrics.Gauge
    return kind(name, METRICS[name].help, (OF,))


def _last(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]
