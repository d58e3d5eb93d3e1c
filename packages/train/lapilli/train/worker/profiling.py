"""Profile chosen steps of chosen ranks: a trace for Chrome or Perfetto, a memory snapshot."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lapilli.train.config import RunConfig
from lapilli.train.health.torch_internals import dump_memory, record_memory
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import PROFILE, profile_name

__all__ = ["profiled"]


@contextmanager
def profiled(config: RunConfig, step: int, rank: int, device: torch.device) -> Generator[None]:
    """Profile what is done inside if `config.profile` names this step and rank.

    Writes `profile/step-N-rank-R.json`, on CUDA and with `profile.memory` also `.pickle`. Such a
    step waits for the device at its end.
    """
    wanted = config.profile
    if step not in wanted.steps or rank not in wanted.ranks:
        yield
        return
    run = Path(config.output)
    (run / PROFILE).mkdir(exist_ok=True)
    has_memory = wanted.memory and device.type == "cuda"
    if wanted.memory and not has_memory:
        note(run, f"profile.memory: torch has memory snapshots on CUDA alone, not on {device.type}")
    activities = {ProfilerActivity.CPU}
    if device.type != "cpu":
        activities.add(getattr(ProfilerActivity, device.type.upper()))
    if has_memory:
        record_memory(on=True)
    try:
        with profile(activities=activities, record_shapes=True) as profiler:
            yield
        profiler.export_chrome_trace(str(run / profile_name(step, rank, "json")))
        if has_memory:
            dump_memory(run / profile_name(step, rank, "pickle"))
    finally:
        if has_memory:
            record_memory(on=False)
