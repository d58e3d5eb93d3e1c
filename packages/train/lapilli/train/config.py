"""Settings of a training run, read from a recipe's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.renamed import Renamed
from lapilli.model.config import GROUPS, ModelConfig
from lapilli.train.config_groups import (
    CacheConfig,
    CheckpointConfig,
    CommunicationConfig,
    HpuConfig,
    OffloadConfig,
    ProfileConfig,
    RecoveryConfig,
    ValidationConfig,
    check_numbers,
)
from lapilli.train.errors import TrainError
from lapilli.train.renamed import RUN_NAMES

__all__ = [
    "CacheConfig",
    "CheckpointConfig",
    "CommunicationConfig",
    "DeviceChoice",
    "HpuConfig",
    "LoggerName",
    "OffloadConfig",
    "OptimConfig",
    "ProfileConfig",
    "RecoveryConfig",
    "RunConfig",
    "ValidationConfig",
    "fixed_settings",
]

DeviceChoice = Literal["auto", "cpu", "cuda", "hpu"]
# Of a setting that may differ when a run is resumed: it decides speed and not the loss.
RESUMABLE: Mapping[str, Any] = {"resumable": True}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: Peak learning rate.
        lr_by_part: Another peak rate for a part that learns, or for `adapters`.
        schedule: Decay after the warm-up: `cosine` or `linear` to 0, or `constant`.
        warmup_ratio: Share of the steps over which the rate rises from 0.
        warmup_steps: Their number instead; 0 leaves it to `warmup_ratio`.
        weight_decay: Applied to matrices; not to biases and norms.
        betas: AdamW's decay rates of the moments.
        grad_clip: Largest norm of the whole gradient; 0 leaves it.
    """

    lr: float = 1e-3
    lr_by_part: dict[str, float] = field(default_factory=dict[str, float])
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.lr <= 0:
            raise TrainError(f"optim.lr: {self.lr}; expected more than 0")
        for name, rate in self.lr_by_part.items():
            if name not in GROUPS:
                raise TrainError(
                    f"optim.lr_by_part: {name!r}; expected some of {', '.join(GROUPS)}"
                )
            if rate < 0:
                raise TrainError(f"optim.lr_by_part.{name}: {rate}; expected 0 or more")
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise TrainError(f"optim.warmup_ratio: {self.warmup_ratio}; expected 0 to below 1")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise TrainError(f"optim.betas: {self.betas}; expected 0 to below 1 each")
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            if getattr(self, name) < 0:
                raise TrainError(f"optim.{name}: {getattr(self, name)}; expected 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    What decides the loss (model, data, order, optimizer, batch) is fixed when the run starts; the
    rest may differ when it is resumed.

    Attributes:
        dataset: Folder of a dataset, or its address.
        output: Folder or store address of the run; one process at a time trains in it.
        view: The dataset's view that the tower reads.
        model: The model.
        optim: The optimizer.
        global_batch_size: Samples in one optimizer step, over all workers.
        micro_batch_size: Samples in one forward pass of a worker; accumulation follows. 0 takes the
            largest that `memory` is estimated to hold, on a CPU up to 8.
        micro_batch_tokens: Tokens in one forward pass of a worker instead, padding among them:
            short rows are then more than long ones.
        epochs: Passes over the dataset.
        max_steps: Stop after this many steps; 0 for all epochs.
        max_length: Longest sequence with image tokens; longer samples are left out and counted.
        truncate: Cut the text of longer samples instead; the default of sampler `llava`.
        init_from: Folder or address of an earlier run whose weights this one starts from; or a
            checkpoint of LLaVA's or of transformers' LLaVA, whole or as PEFT adapters.
        sampler: Order of an epoch (`lapilli.data.batches.sampler`). `llava` is that of LLaVA's
            trainer, in which the micro-batches are part of the order; the learning rate then
            starts at 0 too.
        order_window: Samples of the windows in which an epoch is ordered; 0 for one order, `auto`
            for one up to 10 million samples, else windows of 4 million.
        group_by_modality_length: LLaVA's flag, for sampler `llava`, where true is the default.
        llava_processes: For sampler `llava`, the processes of the LLaVA run that is reproduced; 0
            for `num_workers`. Set it to resume with other workers.
        remainder: An incomplete global batch: `pad` with empty slots, `short` with fewer
            micro-steps, or `drop` until another epoch. Sampler `llava` takes `pad`, or `llava`,
            which repeats or drops samples as LLaVA's trainer does. `auto` is `llava` for that
            sampler and `pad` for the others.
        share_images: Put samples of one image that begin alike into one row: their common prefix
            is computed once, and none sees another. The order is then drawn over images, and an
            epoch's last global batches are `short`.
        pack: Fill rows of `row_length` tokens with samples that do not see each other.
        row_length: Longest row of several samples, in tokens; 0 for `max_length`.
        max_branches: Most samples that share an image in a row.
        loss_reduction: `token_mean`, over all trained tokens of the global batch, or
            `micro_batch_mean`, over the means of its micro-batches, as LLaVA's trainer does. With
            the latter, or sampler `llava`, a resumed run keeps its `micro_batch_size`.
        seed: Seed of the order and of all randomness in the model.
        zero_stage: DeepSpeed's ZeRO stage.
        memory: GiB that a worker may use on its device. As many layers are recomputed in backward
            as that takes; where it is not enough, their inputs go to host memory. `auto` is 90 % of
            a GPU's memory, on a CPU unlimited.
        offload: What is kept in host memory or on a disk.
        precision: `fp32`, `bf16` or `fp16` (weights and moments stay fp32 in the optimizer). `fp16`
            is for GPUs older than bf16; its loss is scaled.
        tf32: Whether NVIDIA GPUs compute fp32 products in TF32: faster, and rounded.
        num_workers: Processes, one a device; on a CPU, one a core or fewer.
        device: `auto` takes GPUs when there are any, else Gaudi's HPUs (`hpu`), else the CPU.
        launcher: `ray`, or `process`: one worker in the process that was started, without Ray,
            for a profiler, a debugger or a machine that has no Ray.
        checkpoint: What is saved, and how much of it is kept.
        validation: Loss and answers on held-out samples.
        recovery: Reactions to failures.
        profile: Which steps and ranks are profiled.
        communication: Sizes of ZeRO's collectives.
        hpu: What is Intel Gaudi's own.
        max_shapes: Shapes (length, with or without images) of all batches. With 1 they have
            `max_length` tokens, pixels and one count of targets.
        loggers: Where metrics go too: `tensorboard`, `wandb`, `mlflow`.
        cache: A node's cache of shards.
        train: The nodes that train, and what each worker asks of one.
    """

    old_names: ClassVar[Renamed] = RUN_NAMES

    dataset: str = field(metadata=RESUMABLE)
    output: str = field(metadata=RESUMABLE)
    view: str
    model: ModelConfig
    global_batch_size: int
    micro_batch_size: int = field(default=0, metadata=RESUMABLE)
    micro_batch_tokens: int = field(default=0, metadata=RESUMABLE)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init_from: str = ""
    epochs: int = 1
    max_steps: int = 0
    max_length: int = 2048
    truncate: bool | None = None
    sampler: Literal["grouped", "random", "llava"] = "grouped"
    order_window: Literal["auto"] | int = "auto"
    group_by_modality_length: bool | None = None
    llava_processes: int = 0
    remainder: Literal["auto", "pad", "short", "drop", "llava"] = "auto"
    share_images: bool = False
    pack: bool = False
    row_length: int = 0
    max_branches: int = 8
    loss_reduction: Literal["token_mean", "micro_batch_mean"] = "token_mean"
    seed: int = 42
    zero_stage: Literal[0, 1, 2, 3] = field(default=2, metadata=RESUMABLE)
    memory: Literal["auto"] | float = field(default="auto", metadata=RESUMABLE)
    offload: OffloadConfig = field(default_factory=OffloadConfig, metadata=RESUMABLE)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = False
    num_workers: int = field(default=1, metadata=RESUMABLE)
    device: DeviceChoice = field(default="auto", metadata=RESUMABLE)
    launcher: Literal["ray", "process"] = field(default="ray", metadata=RESUMABLE)
    max_shapes: int = 16
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=RESUMABLE)
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=RESUMABLE)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig, metadata=RESUMABLE)
    profile: ProfileConfig = field(default_factory=ProfileConfig, metadata=RESUMABLE)
    communication: CommunicationConfig = field(
        default_factory=CommunicationConfig, metadata=RESUMABLE
    )
    hpu: HpuConfig = field(default_factory=HpuConfig, metadata=RESUMABLE)
    loggers: tuple[LoggerName, ...] = field(default=(), metadata=RESUMABLE)
    cache: CacheConfig = field(default_factory=CacheConfig, metadata=RESUMABLE)
    train: PoolConfig = field(default_factory=PoolConfig, metadata=RESUMABLE)

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        check_numbers(
            "", self,
            ("global_batch_size", "epochs", "num_workers", "max_length", "max_shapes",
             "max_branches"),
            ("micro_batch_size", "micro_batch_tokens", "max_steps", "seed", "llava_processes",
             "row_length"),
        )  # fmt: skip
        if self.memory != "auto" and not 0 < self.memory < float("inf"):
            raise TrainError(f"memory: {self.memory:g}; expected auto, or more than 0 GiB")
        if not self.micro_batch_size and (
            self.sampler == "llava" or self.loss_reduction == "micro_batch_mean"
        ):
            raise TrainError(
                "micro_batch_size: 0 with sampler llava or loss_reduction micro_batch_mean, to "
                "which the micro-batches belong; set it, and no micro_batch_tokens"
            )
        if self.model.aux.heads and self.loss_reduction != "token_mean":
            raise TrainError(
                f"loss_reduction: {self.loss_reduction} with model.aux.layers, whose losses are "
                "means over the global batch; set token_mean"
            )
        _check_weights(self)
        _check_communication(self)
        _check_workers(self)
        _check_order(self)
        _check_rows(self)
        _check_tokens(self)

    @property
    def shares_rows(self) -> bool:
        """Whether a row may hold several samples."""
        return self.share_images or self.pack

    @property
    def is_static(self) -> bool:
        """Whether every batch has one shape, with rows of one sample."""
        return self.max_shapes == 1 and not (self.shares_rows or self.micro_batch_tokens)

    @property
    def truncates(self) -> bool:
        """Whether samples longer than `max_length` are cut and not left out."""
        return self.sampler == "llava" if self.truncate is None else self.truncate

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker works through in one optimizer step; needs a micro-batch.

        Under `micro_batch_tokens` the most, which rows of the greatest length make.
        """
        share = self.global_batch_size // self.num_workers
        if not self.micro_batch_tokens:
            return share // self.micro_batch_size
        longest = -(-self.longest_row // 64) * 64  # sequence lengths are multiples of 8 to 64
        return -(-share // max(1, self.micro_batch_tokens // longest))

    @property
    def batch_note(self) -> str:
        """How a global batch is cut, in words."""
        if self.micro_batch_tokens:
            return (
                f"global batch {self.global_batch_size} = {self.num_workers} workers, "
                f"micro-batches of up to {self.micro_batch_tokens:,} tokens"
            )
        return (
            f"global batch {self.global_batch_size} = {self.num_workers} workers x micro-batch "
            f"{self.micro_batch_size} x accumulation {self.accumulation}"
        )

    @property
    def longest_row(self) -> int:
        """Most tokens of a row."""
        return self.row_length or self.max_length


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that must not differ when a run is resumed, by dotted name."""
    found = _not_resumable(config, "")
    if config.sampler == "llava" or config.loss_reduction == "micro_batch_mean":
        found["micro_batch_size"] = config.micro_batch_size
    if config.sampler == "llava":  # the order is that of so many processes, whoever computes it
        found["llava_processes"] = config.llava_processes or config.num_workers
    return found


def _not_resumable(config: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in fields(config):
        name, value = prefix + item.name, getattr(config, item.name)
        if item.metadata.get("resumable"):
            continue
        found |= _not_resumable(value, f"{name}.") if is_dataclass(value) else {name: value}
    return found


def _check_weights(config: RunConfig) -> None:
    """Precision, ZeRO stage and the weights' own type go together."""
    if config.precision != "fp32" and config.zero_stage == 0:
        raise TrainError(
            f"zero_stage: 0 with precision {config.precision} keeps no fp32 weights; set "
            "zero_stage 1 to 3"
        )
    if config.offload.to != "none" and config.zero_stage == 0:
        raise TrainError(
            f"offload.to: {config.offload.to} with zero_stage 0, which partitions nothing; set "
            "zero_stage 1 to 3"
        )
    if config.offload.to == "nvme" and config.zero_stage != 3:
        raise TrainError(
            f"offload.to: nvme with zero_stage {config.zero_stage}; DeepSpeed does it at stage 3; "
            "set zero_stage 3, or offload.to: cpu"
        )
    if config.zero_stage == 3 and config.model.language.quantize != "none":
        raise TrainError(
            f"zero_stage: 3 with model.language.quantize {config.model.language.quantize}: stage 3 "
            "partitions numbers, and such weights are packed bytes with tables beside them; set "
            "zero_stage 2"
        )
    if config.precision != "bf16" and config.model.dtype == "bf16":
        raise TrainError(
            f"model.dtype: bf16 with precision {config.precision} would compute with weights "
            "rounded to bf16; set precision bf16, or model.dtype fp32"
        )


def _check_communication(config: RunConfig) -> None:
    """What of ZeRO's collectives belongs to some stages; groups of hpZ cut the workers."""
    if config.communication.allgather_partitions is not None and config.zero_stage not in (1, 2):
        raise TrainError(
            f"communication.allgather_partitions: {config.communication.allgather_partitions} with "
            f"zero_stage {config.zero_stage}; stages 1 and 2 gather partitions; leave it out"
        )
    size, fewest = config.communication.zero_hpz_partition_size, config.recovery.min_workers
    if not size:
        return
    if config.zero_stage != 3 or config.num_workers % size or fewest not in (0, config.num_workers):
        raise TrainError(
            f"communication.zero_hpz_partition_size: {size} with zero_stage {config.zero_stage}, "
            f"num_workers {config.num_workers} and recovery.min_workers {fewest}; expected stage "
            "3, a size that divides num_workers, and no other number of workers; or leave it out"
        )


def _check_order(config: RunConfig) -> None:
    """LLaVA's flags go with its order, and its processes cut the global batch."""
    if config.order_window != "auto":
        check_numbers("", config, (), ("order_window",))
        whole = [name for name in ("share_images", "pack") if getattr(config, name)]
        whole += ["sampler llava"] if config.sampler == "llava" else []
        if config.order_window and whole:
            raise TrainError(
                f"order_window: {config.order_window} with {' and '.join(whole)}, whose order is "
                "one of the whole epoch; set order_window 0, or leave it out"
            )
    grouping = config.group_by_modality_length
    if config.sampler != "llava":
        if config.llava_processes:
            raise TrainError(
                f"llava_processes: {config.llava_processes} with sampler {config.sampler}; only "
                "sampler llava has LLaVA's processes; leave it out"
            )
        if grouping is not None and grouping != (config.sampler == "grouped"):
            raise TrainError(
                f"group_by_modality_length: {str(grouping).lower()} with sampler {config.sampler}; "
                "leave it out, or set sampler llava"
            )
        return
    rows = (config.llava_processes or config.num_workers) * config.micro_batch_size
    if config.global_batch_size % rows:
        raise TrainError(
            f"llava_processes: {config.llava_processes} x micro_batch_size "
            f"{config.micro_batch_size} = {rows} does not divide global_batch_size "
            f"{config.global_batch_size}; set one that does"
        )


def _check_workers(config: RunConfig) -> None:
    """Every number of workers that is allowed cuts the global batch."""
    if config.launcher == "process" and config.num_workers != 1:
        raise TrainError(
            f"num_workers: {config.num_workers} with launcher process, which is one; set "
            "num_workers 1 or launcher ray"
        )
    fewest, most = config.recovery.min_workers, config.num_workers
    if absent := [rank for rank in config.profile.ranks if rank >= most]:
        raise TrainError(
            f"profile.ranks: {absent[0]} with num_workers {most}; expected 0 to {most - 1}"
        )
    if fewest > most:
        raise TrainError(
            f"recovery.min_workers: {fewest} with num_workers {most}, which is the most; lower "
            "recovery.min_workers or raise num_workers"
        )
    _check_batch(config.global_batch_size, most, config.micro_batch_size)
    sizes = range(fewest or most, most + 1)
    micro = config.micro_batch_size or 1
    fit = [size for size in sizes if config.global_batch_size % (size * micro) == 0]
    if len(fit) < len(sizes):
        raise TrainError(
            f"recovery.min_workers: {fewest} to num_workers {most} has sizes that do not cut "
            f"global_batch_size {config.global_batch_size} into micro-batches of "
            f"{config.micro_batch_size}; of these {', '.join(map(str, fit))} would; change "
            "global_batch_size or micro_batch_size, or raise recovery.min_workers"
        )


def _check_batch(global_batch_size: int, num_workers: int, micro_batch_size: int) -> None:
    """Check that the global batch can be divided; the error names numbers that fit."""
    rows = num_workers * max(1, micro_batch_size)
    if global_batch_size % rows == 0:
        return
    sizes = {global_batch_size // rows * rows, -(-global_batch_size // rows) * rows} - {0}
    remedy = " or ".join(map(str, sorted(sizes))) + " would fit"
    share, left = divmod(global_batch_size, num_workers)
    if not left:
        fitting = [str(size) for size in range(1, share + 1) if share % size == 0]
        remedy += f", or a micro_batch_size of {', '.join(fitting)}"
    raise TrainError(
        f"global_batch_size: {global_batch_size} is no multiple of num_workers x "
        f"micro_batch_size = {num_workers} x {max(1, micro_batch_size)} = {rows}; {remedy}"
    )


LoggerName = Literal["tensorboard", "wandb", "mlflow"]


def _check_rows(config: RunConfig) -> None:
    """Rows of several samples and what cannot be with them."""
    chosen = " and ".join(name for name in ("share_images", "pack") if getattr(config, name))
    if not chosen:
        if config.row_length:
            raise TrainError(
                f"row_length: {config.row_length} without share_images or pack; set one of them, "
                "or max_length for rows of one sample"
            )
        return
    if config.max_shapes == 1 and not config.pack:
        raise TrainError(
            "share_images: true with max_shapes 1 and rows that vary in their images; add pack: "
            "true, or set max_shapes 2 or more"
        )
    if config.sampler != "grouped":
        raise TrainError(
            f"{chosen}: true with sampler {config.sampler}, whose order is one of single samples; "
            "set sampler grouped"
        )
    if config.loss_reduction != "token_mean":
        raise TrainError(
            f"{chosen}: true with loss_reduction {config.loss_reduction}, which weighs "
            "micro-batches of as many samples as rows; set token_mean"
        )
    if config.model.compile != "none":
        raise TrainError(
            f"{chosen}: true with model.compile {config.model.compile}, with which rows of several "
            "samples are not tested; set model.compile: none"
        )
    if config.remainder not in ("auto", "short", "drop"):
        raise TrainError(
            f"{chosen}: true with remainder {config.remainder}; expected auto, short or drop"
        )
    if 0 < config.row_length < config.max_length and config.pack:
        raise TrainError(
            f"row_length: {config.row_length} with pack is below max_length {config.max_length}; "
            "a row must hold the longest sample: raise it, or lower max_length"
        )


def _check_tokens(config: RunConfig) -> None:
    """A budget of tokens stands in place of rows, where the loss does not hang on these."""
    tokens = config.micro_batch_tokens
    if not tokens:
        return
    if config.micro_batch_size:
        raise TrainError(
            f"micro_batch_tokens: {tokens} with micro_batch_size {config.micro_batch_size}; set one"
        )
    if config.pack and tokens < config.longest_row:
        raise TrainError(
            f"micro_batch_tokens: {tokens} holds no packed row of {config.longest_row} tokens; "
            "set at least that, or a smaller row_length"
        )
