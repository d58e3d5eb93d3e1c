"""Settings of a training run, read from a recipe's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lapilli.model.config import ModelConfig
from lapilli.model.parts.trainable import GROUPS
from lapilli.train.device import DeviceChoice
from lapilli.train.errors import TrainError

__all__ = [
    "LoggerName",
    "OptimConfig",
    "RunConfig",
]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: Peak learning rate.
        lrs: Another peak rate for `projector`, `language`, `vision` or `adapters`.
        schedule: What follows the warm-up: `cosine` or `linear` to 0, or `constant`.
        warmup_ratio: Share of the steps over which the rate rises from 0.
        warmup_steps: Their number instead; 0 leaves it to `warmup_ratio`.
        weight_decay: On matrices; biases and norms get none.
        betas: AdamW's decay rates of the moments.
        grad_clip: Largest norm of the whole gradient; 0 leaves it.
    """

    lr: float = 1e-3
    lrs: dict[str, float] = field(default_factory=dict[str, float])
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
        for name, rate in self.lrs.items():
            if name not in GROUPS:
                raise TrainError(f"optim.lrs: {name!r}; expected some of {', '.join(GROUPS)}")
            if rate < 0:
                raise TrainError(f"optim.lrs.{name}: {rate}; expected 0 or more")
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
        dataset: Folder of a dataset.
        output: Folder of the run; one process at a time trains in it.
        view: The dataset's view that the tower reads.
        model: The model.
        optim: The optimizer.
        global_batch: Samples in one optimizer step, over all workers.
        micro_batch: Samples on one worker at once; accumulation follows. 0 follows too: the
            largest that the device's memory is estimated to hold, or on a CPU up to 8.
        epochs: Passes over the dataset.
        max_steps: End earlier, after so many steps; 0 for the whole epochs.
        max_length: Longest sequence with its image tokens; longer samples are left out, counted.
        truncate: Cut the text of longer samples instead. Left out, true under policy `llava`.
        start_from: Folder of an earlier run whose weights this one starts from, as LLaVA's second
            stage does from its first; or a checkpoint of LLaVA's or of transformers' LLaVA, whole
            or as PEFT adapters with their base.
        policy: Order of an epoch (`lapilli.data.batches.sampler`). `llava` is that of LLaVA's
            trainer, in which the micro-batches are part of the order; the learning rate then
            starts at 0 too.
        group_by_modality_length: LLaVA's flag, for policy `llava`; false for its order without it,
            which its pretrain script has. Left out, true.
        llava_processes: For policy `llava`, how many processes the LLaVA run has whose order and
            end of an epoch are taken; 0 for `workers`. Set it to go on with other workers.
        remainder: What becomes of a global batch that the samples do not fill: `pad` with empty
            slots, `short` with fewer micro-steps, or `drop` until another epoch. Policy `llava`
            takes `pad`, or `llava`: what LLaVA's trainer does, which repeats or drops samples.
            `auto` is `llava` for that policy and `pad` for the others.
        loss: What is averaged: `tokens`, over all trained tokens of the global batch, or `means`,
            over the means of its micro-batches, as LLaVA's trainer does. With `means` or policy
            `llava` a resumed run keeps its `micro_batch`.
        seed: Seed of the order and of whatever is random in the model.
        zero_stage: DeepSpeed's ZeRO stage.
        offload: What the device has no room for lies in the host's memory (`cpu`): the optimizer's
            state, and at ZeRO stage 3 the weights too. Needs ZeRO stage 1 to 3. With `nvme` the
            optimizer's state lies on a disk and the weights in the host's memory, at stage 3.
        offload_path: Where on a disk: a folder that every worker's machine has for itself.
        precision: `fp32`, `bf16` or `fp16` (weights and moments stay fp32 in the optimizer). `fp16`
            is for GPUs older than bf16; it scales the loss so that gradients do not vanish.
        workers: Processes, one a device; on a CPU, one a core or fewer.
        device: `auto` takes GPUs when there are any, else Gaudi's HPUs (`hpu`), else the CPU.
        launcher: `ray`, or `process`: one worker in the process that was started, without Ray,
            for a profiler, a debugger or a machine that has no Ray.
        save_every: Steps between checkpoints.
        keep: Newest checkpoints that are kept.
        milestone_every: Steps between milestones, the weights alone, which are kept for ever in
            the run's `milestones`; 0 for none.
        mirror: Address, such as `s3://bucket/run`, that checkpoints and milestones are copied to
            while the run goes on; a machine without them goes on from there. Empty for none.
        max_failures: How often lost workers are replaced before the run gives up.
        buckets: Shapes (sequence length, with or without images) that batches may have in all.
        min_workers: Fewest workers the run goes on with when machines are lost (`workers` is the
            most); 0 waits until there are `workers` again.
        hang_seconds: A step that takes longer ends every worker, after it has written its stacks;
            0 waits for ever.
        max_spike: Stop at a loss of more than so many times the median of the last 100 steps; 0
            takes any.
        loggers: What the metrics are also sent to, of `tensorboard`, `wandb` and `mlflow`.
        eval_every: Steps between two looks at the loss on held-out samples; 0 for none.
        eval_samples: How many of them, from all over; the same ones each time.
        eval_dataset: Where they are from; left out, from what `dataset` holds out.
        generate_every: Steps between two times that the model answers some held-out samples' first
            questions, greedily; 0 for none.
        generate_samples: How many of them, from all over; the same ones each time.
        generate_tokens: Longest answer; one ends sooner at the longest expected answer's length.
    """

    dataset: str
    output: str
    view: str
    model: ModelConfig
    global_batch: int
    micro_batch: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    start_from: str = ""
    epochs: int = 1
    max_steps: int = 0
    max_length: int = 2048
    truncate: bool | None = None
    policy: Literal["grouped", "random", "llava"] = "grouped"
    group_by_modality_length: bool | None = None
    llava_processes: int = 0
    remainder: Literal["auto", "pad", "short", "drop", "llava"] = "auto"
    loss: Literal["tokens", "means"] = "tokens"
    seed: int = 42
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_path: str = ""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = 1
    device: DeviceChoice = "auto"
    launcher: Literal["ray", "process"] = "ray"
    save_every: int = 500
    keep: int = 2
    milestone_every: int = 0
    mirror: str = ""
    max_failures: int = 3
    buckets: int = 16
    # What to do when something goes wrong; none of it decides the loss.
    min_workers: int = 0
    hang_seconds: float = 600.0
    max_spike: float = 0.0
    loggers: tuple[LoggerName, ...] = ()
    eval_every: int = 0
    eval_samples: int = 256
    eval_dataset: str = ""
    generate_every: int = 0
    generate_samples: int = 8
    generate_tokens: int = 128

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("global_batch", "epochs", "workers", "save_every", "keep",
            "max_length", "buckets", "eval_samples", "generate_samples", "generate_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise TrainError(f"{name}: {getattr(self, name)}; expected at least 1")
        for name in (
            "micro_batch", "max_steps", "max_failures", "seed", "min_workers", "hang_seconds",
            "max_spike", "eval_every", "milestone_every", "generate_every", "llava_processes",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise TrainError(f"{name}: {getattr(self, name)}; expected 0 or more")
        if self.mirror and "://" not in self.mirror:
            raise TrainError(f"mirror: {self.mirror!r}; expected an address like s3://bucket/run")
        if 0 < self.max_spike <= 1:
            raise TrainError(f"max_spike: {self.max_spike}; expected 0, or more than 1")
        if not self.micro_batch and (self.policy == "llava" or self.loss == "means"):
            raise TrainError(
                "micro_batch: 0 with policy llava or loss means, to which the micro-batches "
                "belong; set it"
            )
        _check_weights(self)
        _check_workers(self)
        _check_order(self)

    @property
    def truncates(self) -> bool:
        """Whether samples longer than `max_length` are cut and not left out."""
        return self.policy == "llava" if self.truncate is None else self.truncate

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker works through in one optimizer step; needs a micro-batch."""
        return self.global_batch // (self.workers * self.micro_batch)


def _check_weights(config: RunConfig) -> None:
    """Precision, ZeRO stage and the weights' own type go together."""
    if config.precision != "fp32" and config.zero_stage == 0:
        raise TrainError(
            f"zero_stage: 0 with precision {config.precision} keeps no fp32 weights; set "
            "zero_stage 1 to 3"
        )
    if config.offload != "none" and config.zero_stage == 0:
        raise TrainError(
            f"offload: {config.offload} with zero_stage 0, which keeps all where it is; set "
            "zero_stage 1 to 3"
        )
    if config.offload == "nvme" and config.zero_stage != 3:
        raise TrainError(
            f"offload: nvme with zero_stage {config.zero_stage}; DeepSpeed does it at stage 3; set "
            "zero_stage 3, or offload: cpu"
        )
    if (config.offload == "nvme") != bool(config.offload_path):
        raise TrainError(
            f"offload: {config.offload} with offload_path {config.offload_path!r}; nvme needs a "
            "folder on a disk of the worker's machine, the others take none"
        )
    if config.zero_stage == 3 and config.model.language.quantize != "none":
        raise TrainError(
            "zero_stage: 3 with model.language.quantize nf4: what stage 3 cuts in pieces are "
            "numbers, and 4-bit weights are packed bytes with tables beside them; set "
            "zero_stage 2"
        )
    if config.precision != "bf16" and config.model.dtype == "bf16":
        raise TrainError(
            f"model.dtype: bf16 with precision {config.precision} would compute with weights "
            "rounded to bf16; set precision bf16, or model.dtype fp32"
        )


def _check_order(config: RunConfig) -> None:
    """LLaVA's flags go with its order, and its processes cut the global batch."""
    grouping = config.group_by_modality_length
    if config.policy != "llava":
        if config.llava_processes:
            raise TrainError(
                f"llava_processes: {config.llava_processes} with policy {config.policy}; only "
                "policy llava has LLaVA's processes; leave it out"
            )
        if grouping is not None and grouping != (config.policy == "grouped"):
            raise TrainError(
                f"group_by_modality_length: {str(grouping).lower()} with policy {config.policy}; "
                "leave it out, or set policy llava"
            )
        return
    rows = (config.llava_processes or config.workers) * config.micro_batch
    if config.global_batch % rows:
        raise TrainError(
            f"llava_processes: {config.llava_processes} x micro_batch {config.micro_batch} = "
            f"{rows} does not divide global_batch {config.global_batch}; set one that does"
        )


def _check_workers(config: RunConfig) -> None:
    """Every number of workers that is allowed cuts the global batch."""
    if config.launcher == "process" and config.workers != 1:
        raise TrainError(
            f"workers: {config.workers} with launcher process, which is one; set workers 1 or "
            "launcher ray"
        )
    if config.min_workers > config.workers:
        raise TrainError(
            f"min_workers: {config.min_workers} with workers {config.workers}, which is the most; "
            "lower min_workers or raise workers"
        )
    _check_batch(config.global_batch, config.workers, config.micro_batch)
    sizes = range(config.min_workers or config.workers, config.workers + 1)
    micro = config.micro_batch or 1
    fit = [size for size in sizes if config.global_batch % (size * micro) == 0]
    if len(fit) < len(sizes):
        raise TrainError(
            f"min_workers: {config.min_workers} to workers {config.workers} has sizes that do not "
            f"cut global_batch {config.global_batch} into micro-batches of {config.micro_batch}; "
            f"of these {', '.join(map(str, fit))} would; change global_batch or micro_batch, "
            "or raise min_workers"
        )


def _check_batch(global_batch: int, workers: int, micro_batch: int) -> None:
    """The global batch can be cut; else say which numbers fit."""
    rows = workers * max(1, micro_batch)
    if global_batch % rows == 0:
        return
    sizes = {global_batch // rows * rows, -(-global_batch // rows) * rows} - {0}
    remedy = " or ".join(map(str, sorted(sizes))) + " would fit"
    share, left = divmod(global_batch, workers)
    if not left:
        fitting = [str(size) for size in range(1, share + 1) if share % size == 0]
        remedy += f", or a micro_batch of {', '.join(fitting)}"
    raise TrainError(
        f"global_batch: {global_batch} is no multiple of workers x micro_batch = "
        f"{workers} x {max(1, micro_batch)} = {rows}; {remedy}"
    )


LoggerName = Literal["tensorboard", "wandb", "mlflow"]
