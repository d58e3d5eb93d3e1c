"""DeepSpeed's settings, and access to the state that it partitions."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapilli.data.io.printable import bytes_text
from lapilli.data.record import excerpt
from lapilli.model.config import GROUPS
from lapilli.model.deepspeed_internals import is_shared_out, shape_of
from lapilli.model.parts.pretrained import Loading
from lapilli.train.config import RunConfig
from lapilli.train.engine.deepspeed_internals import (
    allow_least_scale,
    create_moments,
    forgo_shared_memory,
    loss_scale,
    own_norms,
    swapped_optimizer,
)
from lapilli.train.errors import TrainError

__all__ = [
    "deepspeed_settings",
    "forget_swapped",
    "gathered",
    "initialize",
    "loading_of",
    "part_squares",
    "read_gradient",
    "set_learning_rate",
    "swap_folder",
]

# fp16: halved at every overflow, doubled after so many steps without one
SCALING = {"initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 1}
SUB_GROUP = 2 * 10**7  # numbers that are read from a disk and written to it at once


def deepspeed_settings(
    config: RunConfig, communication: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A run's settings as DeepSpeed spells them; `communication` as `communication_settings`."""
    hpz = config.communication.zero_hpz_partition_size
    zero = {"zero_hpz_partition_size": hpz} if hpz else {}  # `zero.Init` looks for it too
    return {
        # the sizes are for its logs alone: `train_step` says where a step ends
        "train_micro_batch_size_per_gpu": config.micro_batch_size or 1,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": {
            "stage": config.zero_stage,
            **zero,
            **(communication or {}),
            **_offloading(config),
        },
        # whether a gradient is a number is seen a step later (`StepGuard`), without asking here
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": config.precision == "fp16", **SCALING},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW on the host as well: DeepSpeed's would be compiled, and resumes 1e-4 off
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _offloading(config: RunConfig) -> dict[str, Any]:
    """What lies elsewhere: optimizer state, at stage 3 weights too."""
    if config.offload.to == "none":
        return {}
    found: dict[str, Any] = {"offload_optimizer": {"device": config.offload.to}}
    if config.zero_stage == 3:
        found["offload_param"] = {"device": "cpu"}
    if config.offload.to == "nvme":
        found["offload_optimizer"]["nvme_path"] = str(swap_folder(config))
        found["sub_group_size"] = SUB_GROUP
    return found


def swap_folder(config: RunConfig) -> Path:
    """Where a run's workers keep optimizer state on a disk; no other run's."""
    name = hashlib.sha256(config.output.encode()).hexdigest()[:12]
    return Path(config.offload.nvme_path) / f"lapilli-{name}"


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine over the process group that is there. Compiles nothing."""
    import deepspeed

    _quieten()
    if nvme_path := settings["zero_optimization"].get("offload_optimizer", {}).get("nvme_path"):
        _prepare_swapping(Path(nvme_path), model)
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    create_moments(engine)
    allow_least_scale(engine)
    return engine


def _quieten() -> None:
    """Set DeepSpeed up before first use: compile nothing, log little."""
    import deepspeed

    forgo_shared_memory()
    deepspeed.logger.setLevel("ERROR")
    # torch's new names for two collectives; DeepSpeed calls the old ones at every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)


def _prepare_swapping(folder: Path, model: nn.Module) -> None:
    """What offloading to a disk takes, on every worker. Collective.

    Raises:
        TrainError: The folder cannot be written past the cache, its disk is too small, or the
            operator cannot be compiled.
    """
    workers = dist.get_world_size() if dist.is_initialized() else 1
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    if workers > 1:
        dist.barrier()
    numbers = sum(math.prod(shape_of(p)) for p in model.parameters() if p.requires_grad)
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _check_disk(folder, 16 * numbers * workers_here // workers)  # fp32: weight, two moments, slope
    _load_async_io()


def _check_disk(folder: Path, needed: int) -> None:
    probe = folder / f"probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise TrainError(
            f"offload.nvme_path: {folder} cannot be written past the cache ({error.strerror}); "
            "choose a folder on a disk of the worker's machine"
        ) from None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    if needed > free:
        raise TrainError(
            f"offload.nvme_path: {folder} has {bytes_text(free)} free, this machine's workers "
            f"need {bytes_text(needed)}; free space or choose another folder"
        )


def _load_async_io() -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    builder = accelerator.get_op_builder("AsyncIOBuilder")()
    why = "libaio is not found"
    if builder.is_compatible(verbose=False):
        try:
            builder.load(verbose=False)
            return
        except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            why = excerpt(str(error), 200)
    raise TrainError(
        "offload.to: nvme needs DeepSpeed's async_io operator, which it compiles where a worker "
        f"runs, with g++, ninja and libaio's headers ({why}); apt-get install g++ "
        "ninja-build libaio-dev"
    )


def forget_swapped(config: RunConfig, rank: int) -> None:
    """Remove what a worker has kept on its disk, and the folders once they are empty."""
    if config.offload.to != "nvme":
        return
    run = swap_folder(config)
    own = run / swapped_optimizer(rank)
    shutil.rmtree(own, ignore_errors=True)
    for folder in (own.parent, own.parent.parent, run):
        with suppress(OSError):  # others are still in it
            folder.rmdir()


def loading_of(config: RunConfig) -> Loading:
    """How this run's pretrained weights are read: at ZeRO stage 3 no worker ever holds them whole.

    There transformers shares every layer among the workers as it is made, and rank 0 alone reads
    the files, a layer at a time. All workers build the model, in a process group.
    """
    if config.zero_stage < 3 or config.model.language.quantize != "none":
        return nullcontext
    return partial(_shared, config)


@contextmanager
def _shared(config: RunConfig) -> Generator[None]:
    import deepspeed.comm
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _quieten()
    deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)  # torch's, known to it
    settings = deepspeed_settings(config)
    # the weights' own type and not the engine's: what is frozen must be the same at every stage
    settings["bf16"] = {"enabled": config.model.dtype == "bf16"}
    settings["fp16"] = {"enabled": False}
    alive = HfDeepSpeedConfig(settings)  # transformers looks whether there is one
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def gathered(parameters: Sequence[nn.Parameter], *, changes: bool = False) -> Generator[None]:
    """Gather whole weights inside the context, also where ZeRO-3 partitions them. Collective.

    Args:
        parameters: Those needed; others are whole anyway.
        changes: Keep what is written inside; all ranks write the same.
    """
    shared = [parameter for parameter in parameters if is_shared_out(parameter)]
    if not shared:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(shared, modifier_rank=0 if changes else None):
        yield


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set every group's learning rate for the next step, each by its own factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def read_gradient(parameter: nn.Parameter) -> Tensor:
    """The whole gradient after the last backward of a step and before the update. Collective."""
    from deepspeed.utils import safe_get_full_grad

    found = safe_get_full_grad(parameter)
    if found is None:
        raise RuntimeError("no gradient: read it between backward and step")
    return found


def part_squares(engine: Any) -> Tensor:
    """This rank's share of the squared gradient norm, by part.

    To be read between a step's last backward and its update. Summed over ranks it is the square of
    the whole gradient's norm, before clipping, as `get_global_grad_norm` has it. Not collective.

    Args:
        engine: The engine.

    Returns:
        fp32 [len(GROUPS)] on the device; 0 for a part that does not learn.
    """
    sums = torch.zeros(len(GROUPS), device=engine.device)
    for part, norms in own_norms(engine):
        if norms:
            sums[GROUPS.index(part)] += torch.stack([*norms]).to(sums.device).square().sum()
    return sums / loss_scale(engine) ** 2
