"""What TensorBoard, Weights & Biases and MLflow have got, read with their own readers."""

from __future__ import annotations

import importlib
import json
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lapilli.train.metrics.loggers import MlflowSink, SinkThread, TensorboardSink, WandbSink
from lapilli.train.run_folder.generations import QuestionAnswer
from lapilli.train.run_folder.names import NOTES

CONFIG = {"global_batch_size": 8, "seed": 3}
ANSWERS = [
    QuestionAnswer("a/7", "What colour?", "red", "blue"),
    QuestionAnswer("b/1", "A dog?", "no", "no"),
]


def write_and_resume(sink: Any, run: Path) -> None:
    """Steps 0 to 5, then, as a run that is resumed at step 3, 3 to 7."""
    run.mkdir(exist_ok=True)
    for start, end in ((0, 6), (3, 8)):
        opened = sink(run, start, CONFIG)
        for step in range(start, end):
            opened.write(step, {"loss": 10.0 - step, "loss_by_source/a": 0.5})
        opened.show(4, ANSWERS)
        opened.close()


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_and_resume(TensorboardSink, tmp_path / "run")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, 10.0 - step) for step in range(8)]
    assert "loss_by_source/a" in events.Tags()["scalars"]
    *_, told = events.Tensors("held_out/a/7/text_summary")  # its reader purges figures only
    text = told.tensor_proto.string_val[0].decode()
    assert told.step == 4
    assert all(words in text for words in ("What colour?", "**expected** red", "**given** blue"))


def test_mlflow_has_each_step_once_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking: Any = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    write_and_resume(MlflowSink, run)
    client = tracking.MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "lapilli"]
    (kept,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(kept.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(s, 10.0 - s) for s in range(8)]
    assert kept.data.params["global_batch_size"] == "8"
    (told,) = client.list_artifacts(kept.info.run_id, "held_out")
    text = Path(client.download_artifacts(kept.info.run_id, told.path)).read_text(encoding="utf-8")
    assert told.path == "held_out/step-00000004.md"
    assert all(words in text for words in ("# b/1", "A dog?", "**given** no", "**given** blue"))


@pytest.fixture
def offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder where nothing says that wandb may use a network."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "run"
    run.mkdir()
    return run


def test_wandb_is_offline_without_a_key_and_keeps_its_id(offline_run: Path) -> None:
    run = offline_run
    sink = WandbSink(run, 0, CONFIG)
    for step in range(4):
        sink.write(step, {"loss": 10.0 - step})
    sink.show(3, ANSWERS)
    sink.close()
    identity = (run / "wandb.id").read_text(encoding="utf-8")
    (file,) = (run / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    assert awaited(file) == [10.0, 9.0, 8.0, 7.0]
    (table,) = file.parent.glob("files/media/table/held_out_*.json")
    shown = json.loads(table.read_text(encoding="utf-8"))
    assert shown["columns"] == ["sample_id", "question", "expected", "given"]
    assert shown["data"] == [[a.sample_id, a.question, a.expected, a.given] for a in ANSWERS]


def test_a_resumed_run_is_the_same_run_of_wandb(offline_run: Path) -> None:
    """Offline each try is a file of its own; the run in it is one, so a sync joins them."""
    run = offline_run
    for start in (0, 2):
        sink = WandbSink(run, start, CONFIG)
        for step in range(start, start + 4):
            sink.write(step, {"loss": 10.0 - step})
        sink.close()
        time.sleep(1.1)  # folders have names to the second
    identity = (run / "wandb.id").read_text(encoding="utf-8")
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert [awaited(file) for file in files] == [[10.0, 9.0, 8.0, 7.0], [8.0, 7.0, 6.0, 5.0]]


def awaited(file: Path) -> list[float]:
    """Four losses, once wandb's own process has written them, which a busy machine makes late."""
    give_up = time.monotonic() + 30
    while len(found := wandb_losses(file)) < 4 and time.monotonic() < give_up:
        time.sleep(0.1)
    return found


def wandb_losses(file: Path) -> list[float]:
    """The loss of each record of an offline run: wandb's messages in LevelDB's log format."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, record, found = file.read_bytes(), 7, b"", list[float]()
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a block's rest that holds no header is padding
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or a last part
            parsed = messages.Record.FromString(record)
            record = b""
            for item in parsed.history.item:
                if "loss" in (item.key, *item.nested_key):
                    found.append(float(json.loads(item.value_json)))
    return found


def test_a_sink_that_fails_says_so_in_one_line(tmp_path: Path) -> None:
    def broken() -> Any:
        raise ConnectionError("no route\nto host")

    sink = SinkThread("wandb", broken, tmp_path)
    sink.close()
    sink.write({"step": 0, "loss": 1.0})
    (line,) = (tmp_path / NOTES).read_text(encoding="utf-8").splitlines()
    assert "wandb: ConnectionError: no route to host" in line


def test_answers_that_cannot_be_kept_cost_no_figure(tmp_path: Path) -> None:
    got: list[int] = []

    class Figures:
        def write(self, step: int, figures: Mapping[str, float]) -> None:
            got.append(step)

        def show(self, step: int, answers: Sequence[QuestionAnswer]) -> None:
            raise PermissionError("no store for artifacts")

        def close(self) -> None:
            pass

    sink = SinkThread("mlflow", Figures, tmp_path)
    for step in range(3):
        sink.write({"step": step, "loss": 1.0})
        sink.show(step, ANSWERS)
    sink.close()
    assert got == [0, 1, 2]
    lines = (tmp_path / NOTES).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "mlflow: no answers of step 1: PermissionError: no store for artifacts"


def test_a_sink_that_hangs_holds_up_no_step(tmp_path: Path) -> None:
    goes_on, got = threading.Event(), list[int]()

    class Slow:
        def write(self, step: int, figures: Mapping[str, float]) -> None:
            goes_on.wait()
            got.append(step)

        def show(self, step: int, answers: Sequence[QuestionAnswer]) -> None:
            pass

        def close(self) -> None:
            pass

    sink = SinkThread("slow", Slow, tmp_path)
    for step in range(100):
        sink.write({"step": step, "loss": 1.0})  # would never return if it waited
    assert got == []
    goes_on.set()
    sink.close()
    assert got == [*range(100)]
