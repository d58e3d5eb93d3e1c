"""Settings of a pool: the nodes that do a verb's work, and what a worker asks of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lapilli.data.errors import DataError

__all__ = ["PoolConfig", "matches"]


@dataclass(frozen=True)
class PoolConfig:
    """Which nodes do the work.

    What a worker asks of one is in Ray's terms. None of it decides a result.

    Attributes:
        label_selector: Labels that a node must have (`{pool: cpu}`); values as Ray takes them:
            `cpu`, `!cpu`, `in(a,b)`, `!in(a,b)`.
        resources: What a worker asks for beside its core and device (`{CPU: 8}`), by Ray's names.
        memory: GiB of a node's memory that a worker asks for; 0 lets a build ask by the largest
            image that a shard may hold, and training ask for none.
        node_timeout: Seconds to wait for nodes that an autoscaler adds.
    """

    label_selector: dict[str, str] = field(default_factory=dict[str, str])
    resources: dict[str, float] = field(default_factory=dict[str, float])
    memory: float = 0.0
    node_timeout: float = 1800.0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("memory", "node_timeout"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise DataError(f"{name}: {getattr(self, name)}; expected 0 or more")
        for name, value in self.resources.items():
            if name == "memory":
                raise DataError(f"resources: memory {value}; set memory beside it, in GiB")
            if not 0 <= value < float("inf"):
                raise DataError(f"resources.{name}: {value}; expected 0 or more")

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return int(self.memory * 2**30)

    def bundle(self, **own: float) -> dict[str, float]:
        """What a worker asks of a node: `own` resources, changed and added to by the settings."""
        asked = {**own, **self.resources}
        if self.memory:
            asked["memory"] = float(self.memory_bytes)
        return {name: value for name, value in asked.items() if value}


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a label selector, by Ray's rules."""
    return all(_is_one(labels.get(name), wanted) for name, wanted in selector.items())


def _is_one(label: str | None, wanted: str) -> bool:
    negated = wanted.startswith("!")
    wanted = wanted.removeprefix("!")
    is_list = wanted.startswith("in(") and wanted.endswith(")")
    values = [value.strip() for value in wanted[3:-1].split(",")] if is_list else [wanted]
    return (label in values) is not negated
