"""Groups of a run's settings that decide memory, speed or what is traced, and never the loss."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lapilli.data.dataset.shard_cache import parse_bytes
from lapilli.data.errors import DataError
from lapilli.train.errors import TrainError

__all__ = [
    "LAZY_MODE", "CacheConfig", "CheckpointConfig", "CommunicationConfig", "HpuConfig",
    "OffloadConfig", "ProfileConfig", "RecoveryConfig", "ValidationConfig", "check_numbers",
]  # fmt: skip

LAZY_MODE = "PT_HPU_LAZY_MODE"  # read by Gaudi's bridge as it is imported


@dataclass(frozen=True)
class CacheConfig:
    """A node's cache of shards.

    Attributes:
        folder: Folder of the node's own disk for shards of a dataset at an address, shared by its
            workers; empty for `$LAPILLI_CACHE`, else `~/.cache/lapilli`.
        limit: Most bytes of all datasets in it, like `500GB`; what is needed last makes room. Empty
            for `$LAPILLI_CACHE_LIMIT`, else none.
        warm_up: What each node fetches before the first step: bytes (`100GB`), a share of what it
            reads (`50%`), or `all`.
        read_ahead: Steps whose shards are fetched before they are due; 0 fetches each when it is
            read.
        requests: Shards that a node's workers fetch at a time.
    """

    folder: str = ""
    limit: str = ""
    warm_up: str = "0"
    read_ahead: int = 2
    requests: int = 8

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        check_numbers("cache", self, ("requests",), ("read_ahead",))
        try:
            limit = parse_bytes(self.limit, "cache.limit") if self.limit else None
            warm_up = self.warm_up_bytes(0)
        except DataError as error:
            raise TrainError(str(error)) from None
        if limit is not None and warm_up > limit:
            raise TrainError(
                f"cache.warm_up: {self.warm_up} is more than cache.limit {self.limit}; lower it, "
                "or raise the limit"
            )

    def warm_up_bytes(self, total: int) -> int:
        """What is fetched before the first step.

        Args:
            total: Bytes of all shards that the run reads.
        """
        if self.warm_up == "all":
            return total
        share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", self.warm_up)
        if share and float(share[1]) <= 100:
            return int(total * float(share[1]) / 100)
        try:
            return parse_bytes(self.warm_up, "cache.warm_up")
        except DataError:
            raise TrainError(
                f"cache.warm_up: {self.warm_up!r}; expected bytes like 100GB, a share like 50%, "
                "or all"
            ) from None


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and how much of it is kept.

    Attributes:
        every: Steps between checkpoints.
        keep_last: Newest checkpoints that are kept.
        archive_every: Steps between milestones, the weights alone, which are kept for ever in the
            run's `milestones`; 0 for none.
        upload: Address, such as `s3://bucket/run`, that checkpoints and milestones are copied to
            during training; a machine without them resumes from there. Empty for none.
    """

    every: int = 500
    keep_last: int = 2
    archive_every: int = 0
    upload: str = ""

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        check_numbers("checkpoint", self, ("every", "keep_last"), ("archive_every",))
        if self.upload and "://" not in self.upload:
            raise TrainError(
                f"checkpoint.upload: {self.upload!r}; expected an address like s3://bucket/run"
            )


@dataclass(frozen=True)
class OffloadConfig:
    """Where what the device has no room for lies.

    Attributes:
        to: `cpu` keeps the optimizer's state in the host's memory, and at ZeRO stage 3 the weights
            too. Needs ZeRO stage 1 to 3. `nvme` keeps the optimizer's state on a disk and the
            weights in the host's memory, at stage 3.
        nvme_path: Where on a disk: a folder that every worker's machine has for itself.
    """

    to: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str = ""

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if (self.to == "nvme") != bool(self.nvme_path):
            raise TrainError(
                f"offload.to: {self.to} with offload.nvme_path {self.nvme_path!r}; nvme needs a "
                "folder on a disk of the worker's machine, the others take none"
            )


@dataclass(frozen=True)
class CommunicationConfig:
    """Sizes of ZeRO's collectives, by DeepSpeed's names; null or 0 follows the model's size.

    Attributes:
        overlap_comm: Reduce gradients while backward goes on.
        reduce_scatter: Reduce a share to the worker that holds it, and not all to all.
        allgather_partitions: Gather updated weights by all-gather, not by broadcasts (stages 1, 2).
        reduce_bucket_size: Numbers reduced at once.
        allgather_bucket_size: Numbers gathered at once after an update (stages 1 and 2).
        stage3_prefetch_bucket_size: Numbers fetched ahead of the layer that needs them.
        stage3_param_persistence_threshold: Weights of up to so many numbers stay whole.
        zero_hpz_partition_size: Workers that share a copy of stage 3's weights (arXiv 2306.10209).
        link_gbps: Gigabits a second that a worker sends, for `estimate`.
    """

    overlap_comm: bool | None = None
    reduce_scatter: bool | None = None
    allgather_partitions: bool | None = None
    reduce_bucket_size: int = 0
    allgather_bucket_size: int = 0
    stage3_prefetch_bucket_size: int = 0
    stage3_param_persistence_threshold: int = 0
    zero_hpz_partition_size: int = 0
    link_gbps: float = 0.0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        switches = {"overlap_comm", "reduce_scatter", "allgather_partitions"}
        check_numbers("communication", self, (), tuple(vars(self).keys() - switches))


@dataclass(frozen=True)
class HpuConfig:
    """What is Intel Gaudi's own.

    Attributes:
        lazy: Lazy mode: operations are gathered into a graph until a micro-batch's backward ends.
            Eager mode otherwise.
        graphs: Record the decoder's graphs and replay them; lazy mode alone.
        optimizer: torch's AdamW, or Habana's FusedAdamW with the same moments.
        environment: Variables that are set in each worker before Gaudi's bridge is imported.
    """

    lazy: bool = False
    graphs: bool = False
    optimizer: Literal["AdamW", "FusedAdamW"] = "AdamW"
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.graphs and not self.lazy:
            raise TrainError(
                "hpu.graphs: true with hpu.lazy false; Gaudi records graphs in lazy mode alone; "
                "set hpu.lazy true, or leave hpu.graphs out"
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise TrainError(
                    f"hpu.environment: {name!r}; expected the name of an environment variable"
                )
        if LAZY_MODE in self.environment:
            raise TrainError(f"hpu.environment.{LAZY_MODE}: set hpu.lazy instead")


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps and ranks are profiled.

    Attributes:
        steps: Steps, counted from 0, of which a trace for Chrome or Perfetto is written to
            `profile/`.
        ranks: Workers that write one.
        memory: Write a snapshot of torch's allocator too; CUDA alone.
    """

    steps: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)
    memory: bool = False

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("steps", "ranks"):
            for value in getattr(self, name):
                if value < 0:
                    raise TrainError(f"profile.{name}: {value}; expected 0 or more")
        if self.memory and not self.steps:
            raise TrainError("profile.memory: true without profile.steps; name steps")


@dataclass(frozen=True)
class ValidationConfig:
    """Loss and answers on samples that are not trained on.

    Attributes:
        every: Steps between two computations of the validation loss; 0 for none.
        samples: Samples it is computed on, from all over the dataset; the same ones each time.
        dataset: Folder of their dataset; empty for what the run's own dataset holds out.
        answers_every: Steps between two times that the model answers some samples' first questions,
            greedily; 0 for none.
        answers: Questions it answers, from all over; the same ones each time.
        answer_tokens: Longest answer; one ends sooner at the longest expected answer's length.
    """

    every: int = 0
    samples: int = 256
    dataset: str = ""
    answers_every: int = 0
    answers: int = 8
    answer_tokens: int = 128

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        check_numbers(
            "validation", self, ("samples", "answers", "answer_tokens"), ("every", "answers_every")
        )


@dataclass(frozen=True)
class RecoveryConfig:
    """Reactions to failures; none of them decides the loss.

    Attributes:
        max_failures: How often lost workers are replaced before the run gives up.
        min_workers: Fewest workers the run continues with when machines are lost (`num_workers` is
            the most); 0 waits until there are `num_workers` again.
        step_timeout: Seconds; a step that takes longer ends every worker, after it has written its
            stacks. 0 waits for ever.
        loss_spike_factor: Stop at a loss above this multiple of the median of the last 100 steps; 0
            never stops.
    """

    max_failures: int = 3
    min_workers: int = 0
    step_timeout: float = 600.0
    loss_spike_factor: float = 0.0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        names = ("max_failures", "min_workers", "step_timeout", "loss_spike_factor")
        check_numbers("recovery", self, (), names)
        if 0 < self.loss_spike_factor <= 1:
            raise TrainError(
                f"recovery.loss_spike_factor: {self.loss_spike_factor}; expected 0, or more than 1"
            )


def check_numbers(
    group: str, config: object, positive: tuple[str, ...], natural: tuple[str, ...]
) -> None:
    """Require at least 1 of the positive fields, 0 or more of the natural ones."""
    for names, least, expected in ((positive, 1, "at least 1"), (natural, 0, "0 or more")):
        for name in names:
            if getattr(config, name) < least:
                full = f"{group}.{name}" if group else name
                raise TrainError(f"{full}: {getattr(config, name)}; expected {expected}")
