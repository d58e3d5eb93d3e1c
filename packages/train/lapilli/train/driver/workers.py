"""Start a run's workers: Ray Train's, or one in this process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lapilli.data.errors import DataError
from lapilli.data.io.access import blame
from lapilli.data.ray_session import RayDied, leave_working_folder, watched
from lapilli.model.errors import ModelError
from lapilli.train.config import RunConfig
from lapilli.train.device import BACKEND, Device, know_collectives
from lapilli.train.driver.devices import worker_demand
from lapilli.train.driver.memory_estimate import Estimate, RowSizes, estimate_run, sketch_run
from lapilli.train.driver.memory_policy import MemoryPolicy, shortage_line
from lapilli.train.engine.deepspeed_engine import forget_swapped
from lapilli.train.errors import TrainError
from lapilli.train.gaudi import hpu_environment
from lapilli.train.health.watchdog import hang_line
from lapilli.train.run_folder.names import MISTAKE
from lapilli.train.run_folder.relay import Mailbox, Relay
from lapilli.train.run_folder.scratch import in_scratch, lies_in_store, of_store
from lapilli.train.steps.step import OutOfMemory
from lapilli.train.worker.loop import fit
from lapilli.train.worker.setup import setup

__all__ = [
    "fit_here",
    "fit_on_ray",
    "join_alone",
]

PATIENCE = 60.0  # seconds that a worker waits for the driver's node


def fit_on_ray(config: RunConfig, device: Device, memory: MemoryPolicy) -> None:
    """Ray Train's workers; lost ones are replaced, up to `recovery.max_failures` times.

    Raises:
        TrainError: An error of the user found by a worker, a hang, or too many workers were lost.
    """
    import ray.train
    from ray.train.torch import TorchConfig

    from lapilli.train.driver.ray_internals import Trainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    run, started = Path(config.output), time.time()
    mistake = run / MISTAKE
    mistake.unlink(missing_ok=True)
    fewest, is_hpu = config.recovery.min_workers, device == "hpu"
    trainer = Trainer(
        _worker,
        train_loop_config={
            "config": of_store(config),
            "mailbox": _open_mailbox(run) if lies_in_store(config) else None,
            "device": device,
            "memory": memory,
            "working_folder": str(Path.cwd()),
        },
        torch_config=TorchConfig(backend=BACKEND[device]),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(fewest, config.num_workers) if fewest else config.num_workers,
            use_gpu=device == "cuda",
            resources_per_worker=dict(worker_demand(config, device).bundle),
            label_selector=config.train.label_selector or None,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=config.output,
            failure_config=ray.train.FailureConfig(max_failures=config.recovery.max_failures),
            # before anything in the worker imports the bridge, as Ray itself does
            worker_runtime_env={"env_vars": hpu_environment(config.hpu)} if is_hpu else None,
        ),
    )
    try:
        # In the main thread Ray would take Ctrl-C for itself.
        list(watched(lambda: [trainer.fit()], leave=0))
    except RayDied as error:
        raise TrainError(f"{error}, it resumes from the last checkpoint") from None
    except Exception as error:
        if mistake.exists():
            raise TrainError(_read_mistake(mistake)) from None
        if hung := hang_line(run, started):
            raise TrainError(hung) from None
        if _is_bug(error):
            raise
        raise TrainError(
            "workers were lost more than recovery.max_failures = "
            f"{config.recovery.max_failures} times; the same command resumes from the last "
            f"checkpoint; Ray says: {error}"
        ) from error


def _open_mailbox(run: Path) -> Any:
    """An actor on this node that workers of others bring their files to."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Mailbox)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote(str(run))


def _caller(mailbox: Any) -> Callable[..., Any] | None:
    """Call the mailbox's methods by name, from a worker; None where there is no mailbox."""
    if mailbox is None:
        return None
    import ray

    def call(name: str, *given: Any) -> Any:
        return ray.get(getattr(mailbox, name).remote(*given), timeout=PATIENCE)

    return call


def _read_mistake(path: Path) -> str:
    """The line a worker left; on a full disk there was no room for it and the file is empty."""
    said = path.read_text(encoding="utf-8")
    return (
        said
        or f"output: {path.parent} is on a full disk; free space and run the same command again"
    )


def _write_mistake(path: Path, error: Exception) -> None:
    with contextlib.suppress(OSError):
        path.write_text(str(error), encoding="utf-8")


def _is_bug(error: Exception) -> bool:
    """Whether code of ours raised in every worker; when one is killed, Ray reports that loss."""
    from lapilli.train.driver.ray_internals import raised_by_worker

    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return all(raised_by_worker(failure) for failure in failures.values())


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: its process group is there already.

    Ray restarts workers whatever they stopped for. A user's mistake is written down, so that the
    next start ends at once instead of coming to it again.
    """
    import ray.train

    from lapilli.train.driver.ray_internals import preemption_notice

    leave_working_folder(settings["working_folder"])
    config: RunConfig = in_scratch(settings["config"])
    call = _caller(settings["mailbox"])
    mistake = Path(config.output) / MISTAKE
    if call and (said := call("mistake")):
        raise TrainError(said)
    if call is None and mistake.exists():
        raise TrainError(_read_mistake(mistake))
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    config = replace(config, num_workers=world_size)  # fewer where `recovery.min_workers` allows it
    device, memory = settings["device"], settings["memory"]
    try:
        with _blaming(config, rank, memory, device):
            relay = Relay(Path(config.output), call, is_first=rank == 0) if call else None
            ready = setup(
                config, device, rank=rank, world_size=world_size, activations=memory.activations
            )
            brings = relay is not None and ready.places.is_leader and relay.is_needed()
            with relay if relay and brings else contextlib.nullcontext():
                fit(ready, preemption_notice)
    except (DataError, ModelError, TrainError) as error:
        if call:
            call("put", MISTAKE, 0, str(error).encode())
        else:
            _write_mistake(mistake, error)
        raise


@contextlib.contextmanager
def _blaming(config: RunConfig, rank: int, memory: MemoryPolicy, device: Device) -> Generator[None]:
    """Around a worker's part of a run: a full disk, missing rights, no memory are one line."""

    def estimate(config: RunConfig) -> Estimate:
        images = -(-shortage.images // shortage.rows)
        rows = RowSizes(shortage.tokens, images=max(1, images))
        return estimate_run(config, sketch_run(config), rows, device=device)

    try:
        yield
    except OutOfMemory as error:
        shortage = error
        raise TrainError(shortage_line(config, memory, error, estimate)) from None
    except OSError as error:
        if (line := blame(error, config.output)) is None:
            raise
        raise TrainError(line) from None
    finally:
        forget_swapped(config, rank)


def fit_here(config: RunConfig, device: Device, memory: MemoryPolicy) -> None:
    """The only worker, in this process; DeepSpeed wants a process group even of one.

    The group stays until the process ends: DeepSpeed keeps it in places that a second run of the
    same process would find.
    """
    join_alone(device)
    with _blaming(config, 0, memory, device):
        fit(setup(config, device, rank=0, world_size=1, activations=memory.activations))


def join_alone(device: Device) -> None:
    """A process group of this process alone, if there is none yet."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them
    if dist.is_initialized():
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    else:
        os.environ.update(alone)
        know_collectives(device)
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(BACKEND[device], store=store, rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
