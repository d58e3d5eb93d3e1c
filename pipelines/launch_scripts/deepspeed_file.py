"""Read what a DeepSpeed config, or accelerate's, decides of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lapilli.data.io.whole_file import read_whole
from lapilli.data.io.yaml_text import load_yaml
from pipelines.cli.command import UsageError

__all__ = ["ZeroSettings", "launcher_settings", "read_deepspeed"]

# transformers fills `auto` from the flag and refuses another value than the flag's.
EQUAL = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
OPTIMIZERS = ("Adam", "AdamW")
SIZES = (
    "overlap_comm", "reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "zero_hpz_partition_size",
)  # fmt: skip
# Of DeepSpeed's sections, those that are read, and those that decide no result.
READ = {
    "train_batch_size", "zero_optimization", "optimizer", "scheduler",
    *(name.partition(".")[0] for name in EQUAL),
}  # fmt: skip
SPEED = {
    "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "activation_checkpointing", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "aio", "dump_state", "memory_breakdown",
    "prescale_gradients", "communication_data_type", "checkpoint", "elasticity",
}  # fmt: skip
LOSSY = (
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
)


@dataclass(frozen=True)
class ZeroSettings:
    """What a file says of ZeRO.

    Attributes:
        stage: ZeRO stage.
        offload: `none`, `cpu` or `nvme`.
        nvme_path: Folder for `nvme`.
        schedule: Schedule of the file, which wins over `--lr_scheduler_type`; empty for none.
        communication: Sizes of collectives that it gives.
    """

    stage: int = 0
    offload: str = "none"
    nvme_path: str = ""
    schedule: str = ""
    communication: dict[str, Any] = field(default_factory=dict[str, Any])


# Of LLaVA's own files and LLaMA-Factory's, by name, for a script that is read elsewhere.
FILES = {
    "zero3_offload": ZeroSettings(stage=3, offload="cpu", schedule="constant"),
    "zero3": ZeroSettings(stage=3),
    "zero2": ZeroSettings(stage=2),
    "ds_z3_offload_config": ZeroSettings(stage=3, offload="cpu"),
    "ds_z3_config": ZeroSettings(stage=3),
    "ds_z2_offload_config": ZeroSettings(stage=2, offload="cpu"),
    "ds_z2_config": ZeroSettings(stage=2),
    "ds_z0_config": ZeroSettings(),
}
# What ms-swift calls its own files.
PRESETS = {
    "zero0": ZeroSettings(),
    "zero1": ZeroSettings(stage=1),
    "zero2": ZeroSettings(stage=2),
    "zero3": ZeroSettings(stage=3),
    "zero2_offload": ZeroSettings(stage=2, offload="cpu"),
    "zero3_offload": ZeroSettings(stage=3, offload="cpu"),
}


def read_deepspeed(path: Path, flags: Mapping[str, Any]) -> ZeroSettings:
    """The settings of a file; where it is not there, those of LLaVA's file with that name.

    Args:
        path: The file.
        flags: LLaVA's flags, with which its numbers must agree.

    Raises:
        UsageError: No such file, no such config, a number that is not the flag's, or a section
            that has no counterpart.
    """
    if not path.is_file():
        known = FILES.get(path.stem) if path.suffix else PRESETS.get(path.name)
        if known is None:
            raise UsageError(
                f"--deepspeed: {path} is not there; expected the file, or one called "
                f"{', '.join(FILES)}.json"
            )
        return known
    try:
        config: Any = json.loads(read_whole(path))
        _check(config, flags)
        return _settings(config)
    except UsageError as error:
        raise UsageError(f"--deepspeed: {path}: {error}") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"--deepspeed: {path} is no DeepSpeed config ({error})") from None


def _check(config: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    if unknown := sorted(config.keys() - READ - SPEED):
        raise UsageError(f"section {unknown[0]!r} is not supported; remove it")
    for name, flag in EQUAL.items():
        value: Any = config
        for key in name.split("."):
            value = value.get(key, "auto") if isinstance(value, Mapping) else "auto"
        if value != "auto" and value != flags[flag]:
            raise UsageError(
                f"{name} {value} with --{flag} {flags[flag]}; transformers expects the same "
                "number, or auto"
            )
    optimizer = config.get("optimizer", {}).get("type", OPTIMIZERS[0])
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"optimizer {optimizer!r} is not supported; expected AdamW")
    for name in LOSSY:
        if config.get("zero_optimization", {}).get(name):
            raise UsageError(f"{name} is not supported; remove it")


def _settings(config: Mapping[str, Any]) -> ZeroSettings:
    zero = config.get("zero_optimization", {})
    devices = [zero.get(f"offload_{what}", {}) for what in ("optimizer", "param")]
    chosen = next((one for one in devices if one.get("device", "none") != "none"), {})
    scheduler = config.get("scheduler", {}).get("type", "")
    if scheduler and scheduler not in SCHEDULES:
        raise UsageError(
            f"scheduler {scheduler!r} is not supported; expected one of {', '.join(SCHEDULES)}"
        )
    sizes = {name: zero[name] for name in SIZES if zero.get(name, "auto") != "auto"}
    return ZeroSettings(
        stage=int(zero.get("stage", 0)),
        offload=chosen.get("device", "none"),
        nvme_path=str(chosen.get("nvme_path", "")),
        schedule=SCHEDULES.get(scheduler, ""),
        communication={n: v if n == "overlap_comm" else int(v) for n, v in sizes.items()},
    )


def launcher_settings(launcher: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The flags of `accelerate launch`, those of its `--config_file` below them.

    Raises:
        UsageError: A file that is not accelerate's, or one that shards by FSDP.
    """
    found: dict[str, str] = {}
    if name := launcher.get("config_file", ""):
        path = folder / name
        try:
            config: Any = load_yaml(read_whole(path).decode())
            flat = {**config, **config.get("deepspeed_config", {})}
        except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
            raise UsageError(f"--config_file: {path} is no accelerate config ({error})") from None
        if "fsdp_config" in config or config.get("distributed_type") == "FSDP":
            raise UsageError(f"--config_file: {path}: FSDP is not supported; zero_stage 3 shards")
        found = {key: str(value) for key, value in flat.items()}
    return found | {key.replace("-", "_"): value for key, value in launcher.items()}
