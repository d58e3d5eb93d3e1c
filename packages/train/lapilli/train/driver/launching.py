"""Launch a run and follow it: Ray Train's workers, or one worker in this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from lapilli.data.dataset.shard_cache import dataset_folder
from lapilli.data.errors import DataError
from lapilli.data.io.access import exists
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.io.writer_lock import only_writer
from lapilli.train.checkpoint.store import (
    newest_checkpoint,
    store_config,
    store_records,
    stored_config,
)
from lapilli.train.checkpoint.upload import Uploads
from lapilli.train.config import RunConfig
from lapilli.train.driver.devices import wait_for_workers
from lapilli.train.driver.preflight import Preflight
from lapilli.train.driver.same_run import check_same_settings, with_absolute_paths
from lapilli.train.driver.signals import stops_on_signals
from lapilli.train.driver.workers import fit_here, fit_on_ray
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.dataset_files import keep_data
from lapilli.train.run_folder.messages import notes_end, notes_from
from lapilli.train.run_folder.metrics_file import StepMetrics, read_metrics, read_new
from lapilli.train.run_folder.names import CONFIG
from lapilli.train.run_folder.scratch import in_scratch, lies_in_store
from lapilli.train.run_folder.settings import write_run_config, write_run_info
from lapilli.train.run_folder.stop_request import forget_stop, is_stop_asked

__all__ = [
    "copy_rest",
    "launch",
    "only_trainer",
]

Progress = Callable[[StepMetrics, int], None]


@contextmanager
def only_trainer(config: RunConfig) -> Generator[None]:
    """Lock a run's folder for this process, and hold a lease on its store.

    `launch` does this itself; a caller that inspects the folder first may do it earlier. Two
    processes would remove each other's checkpoints. Readers are not blocked.

    Raises:
        DataError: On entering, where another process trains there, or it cannot be written.
    """
    config = in_scratch(config)
    address = config.checkpoint.upload
    setting = "output" if lies_in_store(config) else "checkpoint.upload"
    with only_writer(Path(config.output), "trained"):
        if not address:
            yield
            return
        with only_writer(RemotePath(address.rstrip("/")), "trained", setting=setting):
            yield


def copy_rest(config: RunConfig, step: int) -> list[str]:
    """Upload what a finished run could not copy to `checkpoint.upload`; existing copies stay.

    Args:
        config: The run's settings.
        step: Its newest checkpoint.

    Returns:
        Lines for the user.

    Raises:
        DataError: The address cannot be read or written.
        TrainError: It is another run's.
    """
    config = with_absolute_paths(config)
    run = Path(config.output)
    if before := stored_config(config.checkpoint.upload):
        check_same_settings(before, config, config.checkpoint.upload)
    said = notes_end(run)
    with only_trainer(config):
        store_config(run, config.checkpoint.upload)
        with Uploads(run, config.checkpoint.upload, keep=config.checkpoint.keep_last, start=step):
            pass  # its end waits for the copies
    return notes_from(run, said)[0]


def launch(
    ready: Preflight,
    on_step: Progress = lambda row, total: None,
    on_stop: Callable[[], None] = lambda: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> list[StepMetrics]:
    """Run to the end, on Ray Train (which needs a running Ray) or in this process.

    A worker of Ray's that is lost is replaced and the run resumes from its last checkpoint, up to
    `recovery.max_failures` times. At Ctrl-C and SIGTERM the run saves and ends.

    Args:
        ready: What `preflight` found.
        on_step: Called with each step's metrics and the number of steps.
        on_stop: Called at the first Ctrl-C or SIGTERM.
        on_note: Called with each line the workers have to say.

    Returns:
        The metrics of every step.

    Raises:
        DataError: Another process trains in the run's folder.
        TrainError: An error of the user found by a worker, too many workers were lost, or the run's
            folder was removed.
        KeyboardInterrupt: The run was stopped; says at which step it was saved.
    """
    run = Path(ready.config.output)
    with only_trainer(ready.config):
        write_run_config(run, ready.config)
        write_run_info(run, ready.info())
        folder = dataset_folder(ready.config.dataset, ready.config.cache.folder)
        keep_data(run, folder, ready.config.view, anew=not ready.start)
        if ready.is_done:
            return read_metrics(run)
        if ready.config.checkpoint.upload:
            store_config(run, ready.config.checkpoint.upload)
        forget_stop(run)
        try:
            wait_for_workers(ready.config, ready.device, on_note)  # a signal ends this at once
            with _followed(run, ready, on_step, on_note), stops_on_signals(run, on_stop):
                fit_on = fit_on_ray if ready.config.launcher == "ray" else fit_here
                fit_on(ready.config, ready.device, ready.memory_policy)
        except BaseException as error:
            if isinstance(error, Exception):
                _require_there(ready.config)
            with contextlib.suppress(DataError, OSError):  # what ended the run is what is told
                _store_records(ready.config)
            raise
        _require_there(ready.config)
        _store_records(ready.config)
        if is_stop_asked(run):
            newest = newest_checkpoint(ready.config)
            raise KeyboardInterrupt(f"saved at step {newest.step}" if newest else "")
        return read_metrics(run)


def _require_there(config: RunConfig) -> None:
    """Nothing but a removal takes the settings from a run's folder while it is locked.

    Raises:
        TrainError: They are gone.
    """
    run, address = Path(config.output), config.checkpoint.upload
    if not exists(run / CONFIG):
        raise TrainError(
            f"output: {run} was removed while it was trained; remove what is left of it, and "
            + (f"the same command goes on from {address}" if address else "train again")
        ) from None


def _store_records(config: RunConfig) -> None:
    if lies_in_store(config):
        store_records(Path(config.output), config.checkpoint.upload)


@contextmanager
def _followed(
    run: Path, ready: Preflight, on_step: Progress, on_note: Callable[[str], None]
) -> Generator[None]:
    """Report new metrics and messages, which workers write to files."""
    stop = threading.Event()
    seen, position, noted = ready.start - 1, 0, notes_end(run)

    def follow() -> None:
        nonlocal seen, position, noted
        ended = False
        while not ended:
            ended = stop.wait(0.5)
            lines, noted = notes_from(run, noted)
            for line in lines:
                on_note(line)
            rows, position = read_new(run, position)
            for row in rows:
                if row.step > seen:
                    seen = row.step
                    on_step(row, ready.total_steps)

    follower = threading.Thread(target=follow, name="follow", daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
