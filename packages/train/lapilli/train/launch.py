"""Start a run: Ray Train's workers, each in `loop.fit`, replaced when they are lost."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.model.errors import ModelError
from lapilli.model.vlm import build_model
from lapilli.train import checkpoint
from lapilli.train.config import RunConfig
from lapilli.train.device import Device, choose_device
from lapilli.train.errors import TrainError
from lapilli.train.feed import Feed
from lapilli.train.loop import fit, open_for, setup
from lapilli.train.metrics import read_metrics, read_new

__all__ = ["Preflight", "launch", "preflight"]

CONFIG = "config.json"
MISTAKE = "mistake.txt"  # what a worker says before it stops for a user's mistake
# What may differ when a run is resumed: it decides speed and not the loss.
RESUMABLE = {
    "output", "dataset", "micro_batch", "zero_stage", "workers", "device", "save_every", "keep",
    "max_failures", "max_steps",
}  # fmt: skip
Progress = Callable[[dict[str, Any], int], None]


@dataclass(frozen=True)
class Preflight:
    """What is known before anything starts.

    Attributes:
        total_steps: Optimizer steps of the run.
        start: Step it goes on with.
        samples: Samples of the dataset that are used.
        too_long: Samples left out because they exceed `max_length`.
        parameters: Parameters by part: total and trained.
        device: What the workers compute on.
    """

    total_steps: int
    start: int
    samples: int
    too_long: int
    parameters: dict[str, tuple[int, int]]
    device: Device


def preflight(config: RunConfig) -> Preflight:
    """Check everything that can be checked before workers start; needs a running Ray.

    Raises:
        DataError, ModelError, TrainError: What does not fit, and the remedy.
    """
    import ray

    available = ray.cluster_resources()
    device = choose_device(config.device, int(available.get("GPU", 0)))
    slots = int(available.get("GPU" if device == "cuda" else "CPU", 0))
    if config.workers > slots:
        raise TrainError(
            f"workers: {config.workers}; Ray has {slots} "
            f"{'GPUs' if device == 'cuda' else 'cores'}; lower workers or add nodes"
        )
    model = build_model(config.model)
    dataset = open_for(model, config)
    run = Path(config.output)
    _check_config(run, config)
    feed = Feed(dataset, config, rank=0, world_size=config.workers)
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.check_disk(run, model, config.keep)
    found = checkpoint.latest_checkpoint(run)
    parameters = {
        name: (
            sum(p.numel() for p in part.parameters()),
            sum(p.numel() for p in part.parameters() if p.requires_grad),
        )
        for name, part in model.named_children()
    }
    start = found.step if found else 0
    return Preflight(feed.total_steps, start, len(dataset), dataset.too_long, parameters, device)


def _check_config(run: Path, config: RunConfig) -> None:
    """A run folder belongs to one config; what decides the loss may not change."""
    path = run / CONFIG
    if not path.exists():
        if run.exists() and any(run.iterdir()):
            raise TrainError(f"output: {run} is not empty and no run; choose another --output")
        return
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    now: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    changed = [key for key in now if key not in RESUMABLE and before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise TrainError(
            f"{key}: {run} was started with {before.get(key)!r}, now {now[key]!r}; "
            "choose another --output or the same value"
        )


def launch(
    config: RunConfig, ready: Preflight, on_step: Progress = lambda row, total: None
) -> list[dict[str, Any]]:
    """Run to the end on Ray Train; needs a running Ray.

    A worker that is lost is replaced and the run goes on from its last checkpoint, up to
    `max_failures` times.

    Args:
        config: The run.
        ready: What `preflight` found.
        on_step: Called with each step's metrics and the number of steps.

    Returns:
        The metrics of every step.

    Raises:
        DataError, ModelError, TrainError: What a worker said; any other failure of the workers is
            a TrainError with Ray's account of it.
    """
    run = Path(config.output).resolve()
    path = run / CONFIG
    path.write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    if ready.start < ready.total_steps:
        stop = threading.Event()
        follower = threading.Thread(
            target=_follow, args=(run, ready, on_step, stop), name="follow", daemon=True
        )
        follower.start()
        try:
            _fit_on_ray(config, ready.device, run)
        finally:
            stop.set()
            follower.join()
    return read_metrics(run)


def _follow(run: Path, ready: Preflight, on_step: Progress, stop: threading.Event) -> None:
    """Pass new metrics on to the person who waits; workers only write the file."""
    seen, position, ended = ready.start - 1, 0, False
    while not ended:
        ended = stop.wait(0.5)
        rows, position = read_new(run, position)
        for row in rows:
            if row["step"] > seen:
                seen = row["step"]
                on_step(row, ready.total_steps)


def _fit_on_ray(config: RunConfig, device: Device, run: Path) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = {"CPU": 1, **({"GPU": 1} if device == "cuda" else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config, "device": device, "output": str(run)},
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(run),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    mistake = run / MISTAKE
    mistake.unlink(missing_ok=True)
    try:
        trainer.fit()
    except Exception as error:
        if mistake.exists():
            raise TrainError(mistake.read_text(encoding="utf-8")) from None
        raise TrainError(
            f"the workers failed more than max_failures = {config.max_failures} times; the run can "
            f"be resumed from its last checkpoint; Ray says: {error}"
        ) from error


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: its process group is there already.

    Ray restarts workers whatever they stopped for. A user's mistake is written down, so that the
    next start ends at once instead of coming to it again.
    """
    import ray.train

    mistake = Path(settings["output"]) / MISTAKE
    if mistake.exists():
        raise TrainError(mistake.read_text(encoding="utf-8"))
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    try:
        fit(setup(settings["config"], settings["device"], rank=rank, world_size=world_size))
    except (DataError, ModelError, TrainError) as error:
        mistake.write_text(str(error), encoding="utf-8")
        raise
