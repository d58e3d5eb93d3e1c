"""Start a run: Ray Train's workers, replaced when they are lost, or one worker in this process."""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib.util
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from lapilli.data.cluster import RayDied, watched
from lapilli.data.errors import DataError
from lapilli.data.manifest import read_manifest
from lapilli.data.shards import write_json
from lapilli.model.errors import ModelError
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train import checkpoint
from lapilli.train.config import RunConfig
from lapilli.train.device import Device, choose_device, device_memory
from lapilli.train.errors import TrainError
from lapilli.train.estimate import (
    StateBytes,
    estimate_run,
    follow,
    sketch_run,
    state_bytes,
    time_micro_batch,
)
from lapilli.train.feed import Feed
from lapilli.train.folders import CONFIG, STATE
from lapilli.train.hang import hang_line
from lapilli.train.held_out import check_same_tokenizer, open_held_out
from lapilli.train.loop import build_start, check_model, check_start, fit, open_for, setup
from lapilli.train.metrics import read_metrics, read_new
from lapilli.train.notes import notes_end, notes_from
from lapilli.train.sketch import sketch_model
from lapilli.train.step import to_device
from lapilli.train.stopping import forget_stop, is_stop_asked, stops_on_signals
from lapilli.train.uploads import fetch_newest, store_config, stored_config

__all__ = [
    "CONFIG",
    "FACTS",
    "MISTAKE",
    "Preflight",
    "finished_steps",
    "join_alone",
    "launch",
    "preflight",
]

FACTS = "facts.json"  # what `Preflight` found, for those who look at a run from outside
MISTAKE = "mistake.txt"  # what a worker says before it stops for a user's mistake
MEASURED = 100_000_000  # a model with fewer parameters is timed on this machine before it starts
# What may differ when a run is resumed: it decides speed and not the loss.
RESUMABLE = {
    "output", "dataset", "micro_batch", "zero_stage", "offload", "workers", "device", "save_every",
    "keep", "max_failures", "launcher", "min_workers", "hang_seconds", "max_spike", "loggers",
    "eval_every", "eval_samples", "eval_dataset", "milestone_every", "mirror",
}  # fmt: skip
Progress = Callable[[dict[str, Any], int], None]


@dataclass(frozen=True)
class Preflight:
    """What is known before anything starts.

    Attributes:
        config: The run's settings, its local paths absolute: workers have folders of their own.
        total_steps: Optimizer steps of the run.
        start: Step it goes on with.
        samples: Samples of the dataset that are used.
        too_long: Samples left out because they exceed `max_length`.
        parameters: Parameters by part: total and trained.
        memory: What a worker holds for each part; activations come on top.
        step_seconds: Forward and backward of an optimizer step, measured on one core of this
            machine; None where workers compute on something else.
        device: What the workers compute on.
        image_tokens: Tokens an image takes in the sequence.
    """

    config: RunConfig
    total_steps: int
    start: int
    samples: int
    too_long: int
    parameters: dict[str, tuple[int, int]]
    memory: dict[str, StateBytes]
    step_seconds: float | None
    device: Device
    image_tokens: int

    @property
    def is_done(self) -> bool:
        """Whether an earlier run came to the end."""
        return self.start >= self.total_steps


def _check_loggers(config: RunConfig) -> None:
    for name in config.loggers:
        if importlib.util.find_spec(name) is None:
            raise TrainError(
                f"loggers: {name} is not installed; pip install 'lapilli[{name}]', or leave it out"
            )


def preflight(config: RunConfig, on_note: Callable[[str], None] = lambda line: None) -> Preflight:
    """Check everything that can be checked before workers start; launcher `ray` needs a Ray.

    A newer checkpoint that the run has at its `mirror` is fetched; `on_note` is called with a line.

    Raises:
        DataError, ModelError, TrainError: What does not fit, and the remedy.
    """
    _check_loggers(config)
    config = _absolute(config)
    device = _find_device(config)
    model, start_weights = _look_at(config)
    dataset = open_for(model, config)
    check_start(start_weights, dataset)
    if held_out := open_held_out(config, dataset.image_tokens):
        check_model(model, held_out)
        check_same_tokenizer(dataset, held_out)
    longest = int(dataset.lengths.max())
    config = follow(
        config, None if config.micro_batch else device_memory(device),
        lambda: estimate_run(config, sketch_run(config), length=longest),
    )  # fmt: skip
    run = Path(config.output)
    _check_config(run, config)
    feed = Feed(dataset, config, rank=0, world_size=config.workers)
    every, kept = config.milestone_every, config.keep + bool(config.mirror)  # one is being copied
    checkpoint.check_disk(run, model, kept, feed.total_steps // every if every else 0)
    found = checkpoint.latest_checkpoint(run)
    start = found.step if found else 0
    if config.mirror:
        start = _fetch(config, start, on_note)
    parameters = {
        name: (
            sum(p.numel() for p in part.parameters()),
            sum(p.numel() for p in part.parameters() if p.requires_grad),
        )
        for name, part in model.named_children()
    }
    memory = {
        name: state_bytes(
            *counts,
            stage=config.zero_stage,
            workers=config.workers,
            precision=config.precision,
            offload=config.offload,
        )
        for name, counts in parameters.items()
    }
    is_small = sum(total for total, _ in parameters.values()) < MEASURED
    step_seconds = None
    if device == "cpu" and is_small and start < feed.total_steps:
        step_seconds = _time_step(model, feed)
    return Preflight(
        config, feed.total_steps, start, len(dataset), dataset.too_long, parameters, memory,
        step_seconds, device, dataset.image_tokens,
    )  # fmt: skip


def _look_at(config: RunConfig) -> tuple[VisionLanguageModel, checkpoint.Checkpoint | None]:
    """The model to check a run against; one that no worker will hold whole is not built here.

    Of such a model only shapes are known; whether a start fits is then found by the workers.
    """
    if config.zero_stage == 3:
        sketch = sketch_model(config.model)
        if sum(total for total, _ in sketch.parameters().values()) >= MEASURED:
            return sketch.model, None
    return build_start(config)


def _find_device(config: RunConfig) -> Device:
    """What the workers compute on, of which there must be enough."""
    if config.launcher == "process":
        return choose_device(config.device, torch.cuda.device_count())
    import ray

    available = ray.cluster_resources()
    device = choose_device(config.device, int(available.get("GPU", 0)))
    slots = int(available.get("GPU" if device == "cuda" else "CPU", 0))
    fewest = config.min_workers or config.workers
    if fewest > slots:
        raise TrainError(
            f"{'min_workers' if config.min_workers else 'workers'}: {fewest}; Ray has {slots} "
            f"{'GPUs' if device == 'cuda' else 'cores'}; lower it or add nodes"
        )
    return device


def _time_step(model: VisionLanguageModel, feed: Feed) -> float:
    """Forward and backward of the step in the middle of the run: neither longest nor shortest."""
    middle = feed.make(feed.total_steps // 2)
    batch = to_device(middle.batches[0], torch.device("cpu"))
    return time_micro_batch(model, batch) * len(middle.batches)


def finished_steps(config: RunConfig) -> int | None:
    """Steps of the run, if an earlier one with the same settings and data came to its end.

    Needs neither Ray nor the model.

    Raises:
        DataError, TrainError: The dataset cannot be read, or the folder belongs to other settings.
    """
    config = _absolute(config)
    run = Path(config.output)
    _check_config(run, config)
    found = checkpoint.latest_checkpoint(run)
    if found is None or not (run / FACTS).exists():
        return None
    total: int = json.loads((run / FACTS).read_text(encoding="utf-8"))["total_steps"]
    is_same = found.state["dataset"] == read_manifest(Path(config.dataset)).fingerprint
    return total if is_same and found.step >= total else None


def _absolute(config: RunConfig) -> RunConfig:
    """Make every path of this machine absolute; a name that is no folder here may be a hub's."""

    def local(name: str) -> str:
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name

    model = config.model
    return replace(
        config,
        dataset=str(Path(config.dataset).resolve()),
        output=str(Path(config.output).resolve()),
        start_from=_existing(config.start_from),
        eval_dataset=local(config.eval_dataset),
        model=replace(
            model,
            vision=replace(model.vision, pretrained=local(model.vision.pretrained)),
            language=replace(model.language, pretrained=local(model.language.pretrained)),
        ),
    )


def _existing(path: str) -> str:
    """Absolute where it is there: a folder, or a file such as `mm_projector.bin`."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def _check_config(run: Path, config: RunConfig) -> None:
    """A run folder belongs to one config; what decides the loss may not change."""
    path = run / CONFIG
    if (run / STATE).exists():
        raise TrainError(
            f"output: {run} is a checkpoint and no run; a milestone has no optimizer moments to go "
            f"on from; set start_from: {run} and choose another --output"
        )
    if run.exists() and not run.is_dir():
        raise TrainError(f"output: {run} is a file; expected a folder; choose another --output")
    if not path.exists():
        if run.exists() and any(run.iterdir()):
            raise TrainError(f"output: {run} is not empty and no run; choose another --output")
        return
    _check_same(json.loads(path.read_text(encoding="utf-8")), config, run)


def _fetch(config: RunConfig, start: int, on_note: Callable[[str], None]) -> int:
    """Bring what this machine has not got of a run from its mirror; the step it goes on from."""
    run, before = Path(config.output), stored_config(config.mirror)
    if before is None:
        return start
    _check_same(before, config, config.mirror)
    write_json(run / CONFIG, asdict(config))  # the folder is this run's, whatever comes of it
    return fetch_newest(run, config.mirror, start, on_note)


def _check_same(before: dict[str, Any], config: RunConfig, where: Path | str) -> None:
    now: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    is_cut_fixed = config.policy == "llava" or config.loss == "means"
    may_change = RESUMABLE - ({"micro_batch"} if is_cut_fixed else set())
    changed = [key for key in now if key not in may_change and before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise TrainError(
            f"{key}: {where} was started with {before.get(key)!r}, now {now[key]!r}; "
            f"choose another --{'mirror' if where == config.mirror else 'output'} or the same value"
        )


def launch(
    ready: Preflight,
    on_step: Progress = lambda row, total: None,
    on_stop: Callable[[], None] = lambda: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run to the end, on Ray Train (which needs a running Ray) or in this process.

    A worker of Ray's that is lost is replaced and the run goes on from its last checkpoint, up to
    `max_failures` times. At Ctrl-C and SIGTERM the run saves and ends.

    Args:
        ready: What `preflight` found.
        on_step: Called with each step's metrics and the number of steps.
        on_stop: Called at the first Ctrl-C or SIGTERM.
        on_note: Called with each line the workers have to say.

    Returns:
        The metrics of every step.

    Raises:
        TrainError: A user's mistake that a worker came to, or too many workers lost.
        KeyboardInterrupt: The run was stopped; says at which step it was saved.
    """
    run = Path(ready.config.output)
    found = asdict(ready)
    write_json(run / CONFIG, found.pop("config"))
    write_json(run / FACTS, found)
    if not ready.is_done:
        if ready.config.mirror:
            store_config(run, ready.config.mirror)
        forget_stop(run)
        stop = threading.Event()
        follower = threading.Thread(
            target=_follow, args=(run, ready, on_step, on_note, stop), name="follow", daemon=True
        )
        follower.start()
        try:
            with stops_on_signals(run, on_stop):
                fit_on = _fit_on_ray if ready.config.launcher == "ray" else _fit_here
                fit_on(ready.config, ready.device)
        finally:
            stop.set()
            follower.join()
        if is_stop_asked(run):
            found = checkpoint.latest_checkpoint(run)
            raise KeyboardInterrupt(f"saved at step {found.step}" if found else "")
    return read_metrics(run)


def _follow(
    run: Path,
    ready: Preflight,
    on_step: Progress,
    on_note: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Pass new metrics and notes on to the person who waits; workers only write the files."""
    seen, position, ended = ready.start - 1, 0, False
    noted = notes_end(run)
    while not ended:
        ended = stop.wait(0.5)
        lines, noted = notes_from(run, noted)
        for line in lines:
            on_note(line)
        rows, position = read_new(run, position)
        for row in rows:
            if row["step"] > seen:
                seen = row["step"]
                on_step(row, ready.total_steps)


def _fit_on_ray(config: RunConfig, device: Device) -> None:
    import ray.train
    from ray.train.torch import TorchConfig

    from lapilli.train.ray_trainer import Trainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = {"CPU": 1, **({"GPU": 1} if device == "cuda" else {})}
    trainer = Trainer(
        _worker,
        train_loop_config={"config": config, "device": device},
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(config.min_workers, config.workers)
            if config.min_workers
            else config.workers,
            use_gpu=device == "cuda",
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=config.output,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
        ),
    )
    run, started = Path(config.output), time.time()
    mistake = run / MISTAKE
    mistake.unlink(missing_ok=True)
    try:
        # In the main thread Ray would take Ctrl-C for itself.
        list(watched(lambda: [trainer.fit()], leave=0))
    except RayDied as error:
        raise TrainError(f"{error}, it goes on from the last checkpoint") from None
    except Exception as error:
        if mistake.exists():
            raise TrainError(_read_mistake(mistake)) from None
        if hung := hang_line(run, started):
            raise TrainError(hung) from None
        if _is_bug(error):
            raise
        raise TrainError(
            f"workers were lost more than max_failures = {config.max_failures} times; the same "
            f"command goes on from the last checkpoint; Ray says: {error}"
        ) from error


def _read_mistake(path: Path) -> str:
    """The line a worker left; on a full disk there was no room for it and the file is empty."""
    said = path.read_text(encoding="utf-8")
    return said or f"output: {path.parent} is on a full disk; free space and run the same again"


def _write_mistake(path: Path, error: Exception) -> None:
    with contextlib.suppress(OSError):
        path.write_text(str(error), encoding="utf-8")


def _is_bug(error: Exception) -> bool:
    """Whether code of ours raised in every worker; when one is killed, Ray reports that loss."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    raised = [type(failure).__name__.startswith("UserException") for failure in failures.values()]
    return not raised or all(raised)


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: its process group is there already.

    Ray restarts workers whatever they stopped for. A user's mistake is written down, so that the
    next start ends at once instead of coming to it again.
    """
    import ray.train

    config: RunConfig = settings["config"]
    mistake = Path(config.output) / MISTAKE
    if mistake.exists():
        raise TrainError(_read_mistake(mistake))
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    config = replace(config, workers=world_size)  # Ray may have started fewer, see `min_workers`
    try:
        _train(config, settings["device"], rank, world_size)
    except (DataError, ModelError, TrainError) as error:
        _write_mistake(mistake, error)
        raise


def _train(config: RunConfig, device: Device, rank: int, world_size: int) -> None:
    """One worker's part of a run; a full disk is a user's mistake."""
    try:
        fit(setup(config, device, rank=rank, world_size=world_size))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainError(
            f"{config.output}: {error.strerror}; free space and run the same again"
        ) from None


def _fit_here(config: RunConfig, device: Device) -> None:
    """The only worker, in this process; DeepSpeed wants a process group even of one.

    The group stays until the process ends: DeepSpeed keeps it in places that a second run of the
    same process would find.
    """
    join_alone(device)
    _train(config, device, rank=0, world_size=1)


def join_alone(device: Device) -> None:
    """A process group of this process alone, if there is none yet."""
    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed reads them
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
