"""Two commands at once, files of other people, disks that are full: one line, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pipelines.check
import pipelines.evaluate
import pipelines.export
import pipelines.generate
import pipelines.preprocess
import pipelines.quickstart
import pipelines.show
import pipelines.train
from lapilli.data.io.atomic import sha256_file
from lapilli.data.io.writer_lock import LOCK
from lapilli.train.errors import TrainError
from lapilli.train.metrics.step_log import StepLog
from pipelines.cli.settings import EvaluateConfig
from tests.factories import image_bytes
from tests.open_directory import open_directory
from tests.pipelines.test_train import RECIPE, one_line
from tests.train.small_run import VIEW, small_dataset

Nobody = Callable[[], AbstractContextManager[None]]
VIEWED = f"--view={VIEW}"
Capture = pytest.CaptureFixture[str]
HOLD = """
import sys
from pathlib import Path
from lapilli.data.io.writer_lock import only_writer
with only_writer(Path(sys.argv[1]), "written", beside=sys.argv[2] == "beside"):
    print("held", flush=True)
    sys.stdin.read()
"""

PART = "part-00000-of-00001.safetensors"


@dataclass(frozen=True)
class Trained:
    """A run with two checkpoints and what was used for it."""

    folder: Path
    dataset: Path
    run: Path

    @property
    def train(self) -> list[str]:
        """The command that made it."""
        return [
            f"--config={self.folder / 'run.yaml'}",
            f"--dataset={self.dataset}",
            "--launcher=process",
            f"--output={self.run}",
            "--max_steps=2",
            "--checkpoint.every=1",
        ]

    def questions(self, output: Path) -> list[str]:
        """A command that asks two questions."""
        rows = [{"question_id": n, "image": "1.png", "text": "What?"} for n in range(2)]
        (self.folder / "1.png").write_bytes(image_bytes("png"))
        (self.folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return [
            str(self.run),
            f"--questions={self.folder / 'q.jsonl'}",
            f"--images={self.folder}",
            f"--output={output}",
            "--device=cpu",
            "--decoding.max_new_tokens=3",
        ]


@pytest.fixture(scope="module")
def trained() -> Iterator[Trained]:
    """In a folder that every user may enter."""
    with open_directory() as folder:
        dataset = small_dataset(folder, images=8, text_only=4)
        recipe = RECIPE.replace("{settings: {hidden_size: 24", "{settings: {hidden_size: 48")
        (folder / "run.yaml").write_text(recipe, encoding="utf-8")
        made = Trained(folder, dataset, folder / "run")
        assert pipelines.train.main(made.train) == 0
        yield made


@contextlib.contextmanager
def held(output: Path, where: str = "in") -> Generator[str]:
    """Another process holds an output meanwhile; what a line calls it."""
    command = [sys.executable, "-c", HOLD, str(output), where]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield f"process {process.pid} on {socket.gethostname()}"
        finally:
            process.kill()


def state_of(folder: Path) -> dict[str, str]:
    """Every file below with its bytes' hash, locks aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


# ---- two at once -------------------------------------------------------------------------------


def test_a_second_train_is_one_line_and_deletes_nothing_and_readers_go_on(
    trained: Trained, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    changed = [
        f"--output={run}",
        "--max_steps=2",
        "--checkpoint.every=5",
        "--checkpoint.keep_last=1",
    ]
    before = state_of(run)
    with held(run) as who:
        (run / "facts.json").unlink()  # as of a run that has not come to its end
        before.pop("facts.json")
        said = one_line(pipelines.train.main, [*trained.train, *changed], capsys)
        assert f"output: {run} is being trained by {who}; wait for it or choose another" in said
        assert pipelines.show.main([str(run)]) == 0
        output = tmp_path / "a.jsonl"
        asked = [str(run), *trained.questions(output)[1:]]
        assert pipelines.generate.main(asked) == 0
        assert len(output.read_text().splitlines()) == 2
        assert state_of(run) == before
    assert pipelines.train.main([*trained.train, *changed]) == 0  # the killed one holds nothing
    assert not (run / ".lock").exists()


def test_a_train_that_a_mistake_ends_leaves_no_folder(
    trained: Trained, tmp_path: Path, capsys: Capture
) -> None:
    arguments = [*trained.train, f"--output={tmp_path / 'deep' / 'run'}", "--view=other"]
    one_line(pipelines.train.main, arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_elses_files_gets_no_lock(
    trained: Trained, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    said = one_line(pipelines.train.main, [*trained.train, f"--output={tmp_path}"], capsys)
    assert "is not empty and no run" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("to", ["hf", "llava", "webdataset"])
def test_a_second_export_is_one_line(
    trained: Trained, tmp_path: Path, capsys: Capture, to: str
) -> None:
    output = tmp_path / "exports" / "e"
    arguments = [f"--to={to}", f"--output={output}", f"--dataset={trained.dataset}"]
    if to != "webdataset":
        arguments.insert(0, str(trained.run))
    with held(output, "beside") as who:
        said = one_line(pipelines.export.main, arguments, capsys)
    assert f"output: {output} is being written by {who}; wait for it or choose another" in said
    assert pipelines.export.main(arguments) == 0
    assert [path.name for path in output.parent.iterdir()] == ["e"]


def test_a_second_writer_of_answers_is_one_line_and_the_first_goes_on(
    trained: Trained, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "a.jsonl"
    evaluated = [f"--run={trained.run}", f"--dataset={trained.dataset}", VIEWED]
    evaluated.append(f"--output={output}")
    for main, arguments in (
        (pipelines.generate.main, trained.questions(output)),
        (pipelines.evaluate.main, evaluated),
    ):
        output.unlink(missing_ok=True)
        with held(output, "beside") as who:
            said = one_line(main, arguments, capsys)
        assert f"output: {output} is being written by {who}" in said
        assert not output.exists()
        assert main(arguments) == 0
        rows = output.read_text().splitlines()
        assert main(arguments) == 0
        assert output.read_text().splitlines() == rows
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_quickstart_and_check_hold_what_they_write(
    trained: Trained, tmp_path: Path, capsys: Capture
) -> None:
    with held(tmp_path / "quick") as who:
        said = one_line(pipelines.quickstart.main, [f"--output={tmp_path / 'quick'}"], capsys)
    assert f"quick is being written by {who}" in said
    config = f"--config={trained.dataset / 'config.json'}"
    with held(tmp_path / "q.parquet", "beside") as who:
        arguments = [config, f"--output={tmp_path / 'q.parquet'}"]
        said = one_line(pipelines.check.main, arguments, capsys)
    assert f"q.parquet is being written by {who}" in said


# ---- what may not be read ----------------------------------------------------------------------


def all_that_open(trained: Trained, run: Path) -> list[tuple[Callable[..., int], list[str]]]:
    """Every command that opens a run's weights."""
    train = [*trained.train[:-3], f"--output={run}", "--max_steps=2", "--checkpoint.every=1"]
    output = run.parent / "never"
    return [
        (pipelines.train.main, train),
        (pipelines.train.main, [*train, f"--output={output}", f"--init_from={run}"]),
        (pipelines.generate.main, [str(run), "--question=What?", "--device=cpu"]),
        (pipelines.evaluate.main, [f"--run={run}", f"--dataset={trained.dataset}", VIEWED]),
        (pipelines.export.main, [str(run), "--to=hf", f"--output={output}"]),
    ]


@pytest.mark.parametrize(
    "kept_back",
    [
        f"checkpoints/step-00000002/{PART}",
        "checkpoints/step-00000002/state.json",
        "checkpoints/step-00000002",
        "checkpoints",
    ],
)
def test_a_checkpoint_that_may_not_be_read_is_no_damaged_one(
    trained: Trained, open_folder: Path, as_nobody: Nobody, capsys: Capture, kept_back: str
) -> None:
    """By a real user without rights, who may write the folder: nothing is removed or begun anew."""
    run = open_folder / "run"
    shutil.copytree(trained.run, run)
    before = state_of(run)
    for path in (open_folder, run, *run.rglob("*")):
        path.chmod(0o777)
    (run / kept_back).chmod(0)
    for main, arguments in all_that_open(trained, run):
        with as_nobody():
            said = one_line(main, arguments, capsys)
        assert str(run / kept_back) in said, arguments
        assert "cannot be read (Permission denied)" in said, arguments
    (run / kept_back).chmod(0o777)
    assert state_of(run) == before
    assert [path.name for path in open_folder.iterdir()] == ["run"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_fails_is_no_damaged_checkpoint(
    trained: Trained, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    before = state_of(run)
    opened = Path.open

    def failing(self: Path, *given: Any, **more: Any) -> Any:
        if self.name == PART and "step-00000002" in self.parts:
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", failing)
        for main, arguments in all_that_open(trained, run):
            said = one_line(main, arguments, capsys)
            assert f"{PART}: cannot be read ({os.strerror(number)})" in said
    assert state_of(run) == before


@pytest.mark.parametrize("name", ["config.json", "facts.json", "metrics.jsonl"])
def test_a_run_whose_records_may_not_be_read_is_still_a_run(
    trained: Trained, open_folder: Path, as_nobody: Nobody, capsys: Capture, name: str
) -> None:
    run = open_folder / "run"
    shutil.copytree(trained.run, run)
    (run / name).chmod(0)
    with as_nobody():
        said = one_line(pipelines.show.main, [str(run)], capsys)
        assert f"{run / name}: " in said
        assert "Permission denied" in said


def test_a_damaged_checkpoint_still_is_passed_over(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    weights = run / "checkpoints" / "step-00000002" / PART
    weights.write_bytes(weights.read_bytes()[:-1])
    assert pipelines.train.main([*trained.train, f"--output={run}"]) == 0
    assert (
        state_of(run)[f"checkpoints/step-00000002/{PART}"]
        == (state_of(trained.run)[f"checkpoints/step-00000002/{PART}"])
    )


def test_an_evaluation_is_not_made_again_over_one_that_may_not_be_read(
    trained: Trained, open_folder: Path, as_nobody: Nobody
) -> None:
    open_folder.chmod(0o777)
    output = open_folder / "a.jsonl"
    config = EvaluateConfig(
        str(trained.run), str(trained.dataset), VIEW, output=str(output), device="cpu"
    )
    pipelines.evaluate.evaluate_once(config)
    before = output.read_bytes()
    output.chmod(0)
    with as_nobody(), pytest.raises(Exception, match=r"a\.jsonl: cannot be read \(Permission"):
        pipelines.evaluate.evaluate_once(config)
    assert output.read_bytes() == before


# ---- disks that are full, or read-only ---------------------------------------------------------


@contextlib.contextmanager
def files_up_to(size: int) -> Generator[None]:
    """No file of this process may become larger; Python hears of it as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


EXPORTS = (["--to=hf"], ["--to=llava"], ["--to=llava", "--files=bin"])


@pytest.mark.parametrize("form", EXPORTS, ids=" ".join)
def test_an_export_without_room_says_how_much_it_needs_before_it_begins(
    trained: Trained,
    tiny_disk: Path,
    capsys: Capture,
    form: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = shutil.disk_usage(tiny_disk).free
    (tiny_disk / "fill").write_bytes(b"\0" * (free - 200_000))
    output = tiny_disk / "e"
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.export.write_hf", None)  # nothing is begun
        patched.setattr("pipelines.exports.llava.write_llava", None)
        said = one_line(
            pipelines.export.main, [str(trained.run), *form, f"--output={output}"], capsys
        )
    assert f"output: {output} has " in said
    assert "kB free, the export needs " in said
    assert [path.name for path in tiny_disk.iterdir()] == ["fill"]


@pytest.mark.parametrize("form", EXPORTS, ids=" ".join)
def test_an_export_that_fills_the_disk_on_its_way_leaves_nothing(
    trained: Trained, tmp_path: Path, capsys: Capture, form: list[str]
) -> None:
    """A quota, say, of which no free space tells."""
    arguments = [str(trained.run), *form, f"--output={tmp_path / 'e'}"]
    with files_up_to(40_000):
        said = one_line(pipelines.export.main, arguments, capsys)
    assert f"output: {tmp_path / 'e'}: File too large; has " in said
    assert "free, the export needs " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["generate", "evaluate", "train", "preprocess", "export"])
def test_a_disk_that_is_full_or_read_only_is_one_line_with_the_path(
    trained: Trained, tiny_disk: Path, capsys: Capture, verb: str
) -> None:
    (tiny_disk / "old").mkdir()
    output = tiny_disk / "old" / "out"
    mains: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
        "generate": (pipelines.generate.main, trained.questions(output)),
        "evaluate": (
            pipelines.evaluate.main,
            [f"--run={trained.run}", f"--dataset={trained.dataset}", f"--output={output}", VIEWED],
        ),
        "train": (pipelines.train.main, [*trained.train, f"--output={output}"]),
        "preprocess": (
            pipelines.preprocess.main,
            [f"--config={trained.dataset / 'config.json'}", f"--output={output}"],
        ),
        "export": (pipelines.export.main, [str(trained.run), "--to=hf", f"--output={output}"]),
    }
    main, arguments = mains[verb]
    fill = tiny_disk / "fill"
    fill.write_bytes(b"\0" * shutil.disk_usage(tiny_disk).free)
    said = one_line(main, arguments, capsys)
    assert str(output) in said
    assert sorted(path.name for path in tiny_disk.rglob("*")) == ["fill", "old"]
    fill.unlink()
    remount = ["mount", "-o", "remount,ro", str(tiny_disk)]
    assert subprocess.run(remount, check=False).returncode == 0
    said = one_line(main, arguments, capsys)
    assert f"output: {output} cannot be written (Read-only file system); choose another" in said


def test_answers_stop_at_a_full_disk_and_go_on_when_there_is_room(
    trained: Trained, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "a.jsonl"
    arguments = [*trained.questions(output), "--batch=1"]
    assert pipelines.generate.main([*trained.questions(tmp_path / "whole.jsonl")]) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    with files_up_to(len(whole.splitlines()[0]) + 20):
        said = one_line(pipelines.generate.main, arguments, capsys)
    assert f"{output}: File too large; free space and run the same command again" in said
    assert pipelines.generate.main(arguments) == 0
    assert output.read_bytes() == whole


# ---- the first error is the one that is told ---------------------------------------------------


def test_what_closing_meets_does_not_hide_why_a_run_ended(
    trained: Trained, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_first(self: StepLog, *given: Any, **more: Any) -> None:
        raise TrainError("the first error")

    def fail_then(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StepLog, "write", fail_first)
    monkeypatch.setattr(StepLog, "close", fail_then)
    monkeypatch.setattr("pipelines.train.write_run_report", fail_then)
    said = one_line(pipelines.train.main, [*trained.train, f"--output={tmp_path / 'r'}"], capsys)
    assert said == "error: the first error"


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_a_folder_in_the_place_of_answers_is_told_before_the_model_is_read(
    trained: Trained, tmp_path: Path, capsys: Capture, verb: str
) -> None:
    run = tmp_path / "none"
    mains: dict[str, tuple[Callable[[Sequence[str]], int], list[str]]] = {
        "generate": (pipelines.generate.main, [str(run), *trained.questions(tmp_path)[1:]]),
        "evaluate": (
            pipelines.evaluate.main,
            [f"--run={run}", f"--dataset={trained.dataset}", f"--output={tmp_path}"],
        ),
    }
    said = one_line(*mains[verb], capsys)
    assert f"output: {tmp_path} is a folder; expected a file" in said
