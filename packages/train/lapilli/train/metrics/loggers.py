"""Log metrics to TensorBoard, Weights & Biases and MLflow.

Each has a thread and a bounded queue of its own, so that neither a network nor a disk holds up
training; one that fails says so in one line and the run continues without it.
"""

from __future__ import annotations

import importlib
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lapilli.train.config import LoggerName
from lapilli.train.run_folder.generations import QuestionAnswer
from lapilli.train.run_folder.messages import note

__all__ = [
    "MlflowSink",
    "SinkThread",
    "TensorboardSink",
    "WandbSink",
    "open_sinks",
]

WAITING = 10_000  # rows that may wait for a sink
PATIENCE = 30.0  # seconds a sink has to take what is left when the run ends


class Sink(Protocol):
    """A destination of metrics."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take one step's figures."""
        ...

    def show(self, step: int, answers: Sequence[QuestionAnswer]) -> None:
        """Take the answers to held-out questions after a step."""
        ...

    def close(self) -> None:
        """Take what is left."""
        ...


class TensorboardSink:
    """Event files in the run's folder `tensorboard`; a resumed run's later steps are purged."""

    def __init__(self, run: Path, start: int, config: Mapping[str, Any]) -> None:
        module: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer: Any = module.SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take one step's figures."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, answers: Sequence[QuestionAnswer]) -> None:
        """Take the answers to held-out questions after a step."""
        for one in answers:
            self._writer.add_text(f"held_out/{one.sample_id}", _as_markdown(one), step)

    def close(self) -> None:
        """Take what is left."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases, resumed by its id; offline unless a key or a mode is set.

    It ignores steps that it has: a resumed run repeats them with the same values.
    """

    def __init__(self, run: Path, start: int, config: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lapilli"), dir=str(run), name=run.name,
            id=_kept_id(run / "wandb.id"), resume="allow", mode=mode, config=dict(config),
            settings=wandb.Settings(silent=True),  # its lines would stand in the live line
        )  # fmt: skip

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take one step's figures."""
        self._run.log(dict(figures), step=step)

    def show(self, step: int, answers: Sequence[QuestionAnswer]) -> None:
        """Take the answers to held-out questions after a step."""
        wandb: Any = importlib.import_module("wandb")
        columns = ["sample_id", "question", "expected", "given"]
        rows = [[getattr(one, name) for name in columns] for one in answers]
        self._run.log({"held_out": wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        """Take what is left."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow at MLFLOW_TRACKING_URI, else in the run's folder `mlruns`.

    MLflow would keep a repeated step twice, so steps that it has are left out.
    """

    def __init__(self, run: Path, start: int, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._metric: Any = importlib.import_module("mlflow.entities").Metric
        address = os.environ.get("MLFLOW_TRACKING_URI") or (run / "mlruns").as_uri()
        self._client: Any = tracking.MlflowClient(tracking_uri=address)
        kept = run / "mlflow.id"
        if kept.exists():
            self._id = kept.read_text(encoding="utf-8").strip()
        else:
            found = self._client.get_experiment_by_name("lapilli")
            experiment = found.experiment_id if found else self._client.create_experiment("lapilli")
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            kept.write_text(self._id, encoding="utf-8")
            for name, value in config.items():
                self._client.log_param(self._id, name, str(value)[:500])
        history = self._client.get_metric_history(self._id, "loss")
        self._done = max((point.step for point in history), default=-1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take one step's figures."""
        if step <= self._done:
            return
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def show(self, step: int, answers: Sequence[QuestionAnswer]) -> None:
        """Take the answers to held-out questions after a step; a repeated step replaces its own."""
        text = "\n\n---\n\n".join(f"# {one.sample_id}\n\n{_as_markdown(one)}" for one in answers)
        self._client.log_text(self._id, text, f"held_out/step-{step:08d}.md")

    def close(self) -> None:
        """Take what is left."""
        self._client.set_terminated(self._id)


SINKS: dict[LoggerName, Callable[[Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorboardSink, "wandb": WandbSink, "mlflow": MlflowSink,
}  # fmt: skip


def _as_markdown(one: QuestionAnswer) -> str:
    return f"{one.question}\n\n**expected** {one.expected}\n\n**given** {one.given}"


def _kept_id(path: Path) -> str:
    """An id that a resumed run finds again."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class SinkThread:
    """A sink that never holds up who writes to it.

    Args:
        name: What it is called in notes.
        make: Opens it; called in the thread.
        run: The run's folder, for notes.
    """

    def __init__(self, name: str, make: Callable[[], Sink], run: Path) -> None:
        self._name = name
        self._run = run
        self._items: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(WAITING)
        self._failed = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(make,), name=f"sink {name}", daemon=True
        )
        self._thread.start()

    def _work(self, make: Callable[[], Sink]) -> None:
        try:
            sink = make()
            while (item := self._items.get()) is not None:
                item(sink)
            sink.close()
        except Exception as error:
            self._failed.set()
            note(
                self._run,
                f"{self._name}: {type(error).__name__}: {str(error)[:200]}; the run continues "
                "without it, metrics.jsonl has every step",
            )

    def write(self, row: Mapping[str, Any]) -> None:
        """Hand a metrics row over, or drop it where too many wait."""
        step, figures = int(row["step"]), figures_of(row)
        self._put(lambda sink: sink.write(step, figures))

    def show(self, step: int, answers: Sequence[QuestionAnswer]) -> None:
        """Hand the answers to held-out questions over; figures go on where these cannot be kept."""

        def show(sink: Sink) -> None:
            try:
                sink.show(step, answers)
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:200]}"
                note(self._run, f"{self._name}: no answers of step {step + 1}: {said}")

        self._put(show)

    def _put(self, item: Callable[[Sink], None]) -> None:
        if not self._failed.is_set():
            try:
                self._items.put_nowait(item)
            except queue.Full:
                self._failed.set()
                note(self._run, f"{self._name}: too slow, {WAITING} steps wait; it gets no more")

    def close(self) -> None:
        """Let it take what is left, for a while."""
        try:
            self._items.put(None, timeout=PATIENCE)
        except queue.Full:
            return
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            note(
                self._run, f"{self._name}: not done after {PATIENCE:.0f} s; its last steps are lost"
            )


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """A metrics row's finite numbers by name; a group's as `loss_by_source/NAME` (its mean)."""
    figures: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            groups: dict[str, Any] = value
            for key, item in groups.items():
                is_mean = isinstance(item, list | tuple)  # and the number of its tokens
                figures[f"{name}/{key}"] = float(item[0] if is_mean else item)
        elif isinstance(value, int | float) and name != "step":
            figures[name] = float(value)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def open_sinks(
    run: Path, start: int, names: Sequence[LoggerName], config: Mapping[str, Any]
) -> list[SinkThread]:
    """Start the sinks of a run.

    Args:
        run: The run's folder.
        start: The first step that will be written.
        names: Which ones.
        config: The run's settings, shown beside its curves.
    """

    def maker(name: LoggerName) -> Callable[[], Sink]:
        return lambda: SINKS[name](run, start, config)

    return [SinkThread(name, maker(name), run) for name in names]
