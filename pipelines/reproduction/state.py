"""Which commands of a plan are done, and which cannot begin, by what lies on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lapilli.data.config import BuildConfig
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.data.shards.manifest import NAME as MANIFEST
from lapilli.train.checkpoint.find import newest_weights
from lapilli.train.run_folder.settings import read_run_info
from pipelines.cli.command import parse
from pipelines.downloads.catalog import HUGGING_FACE, needed
from pipelines.reproduction.plan import PlannedCommand

__all__ = ["is_done", "missing"]


def is_done(command: PlannedCommand) -> bool:
    """Whether what a command makes is there, whole."""
    return DONE[command.words[0]](command)


def missing(command: PlannedCommand) -> list[str]:
    """Files that a command of a benchmark reads and that nobody downloads."""
    names = ("questions", "truth", "images")
    found = [command.value(name) for name in names if command.value(name)]
    return [path for path in found if not Path(path).exists()]


def _downloaded(command: PlannedCommand) -> bool:
    root = Path(command.value("root"))
    words = [f"--config={command.value('config')}", f"--root={root}", "--output=unused"]
    config = parse(BuildConfig, words, "")
    hub = os.environ.get("HF_ENDPOINT", HUGGING_FACE)
    return all(one.is_there(root) for one in needed(config.sources, hub))


def _built(command: PlannedCommand) -> bool:
    return (Path(command.value("output")) / MANIFEST).is_file()


def _trained(command: PlannedCommand) -> bool:
    run = Path(command.value("output"))
    if not run.is_dir():
        return False
    info, found = read_run_info(run), newest_weights(run)
    return info is not None and found is not None and found.state.step >= info.total_steps


def _exported(command: PlannedCommand) -> bool:
    return (Path(command.value("output")) / "config.json").is_file()


def _scored_by_task(command: PlannedCommand) -> bool:
    return (Path(command.value("output")) / "results.json").is_file()


def _answered(command: PlannedCommand) -> bool:
    answers, questions = Path(command.value("output")), Path(command.value("questions"))
    if not (answers.is_file() and questions.is_file()):
        return False
    return _lines(answers) >= _lines(questions)


def _scored(command: PlannedCommand) -> bool:
    files = [command.value(name) for name in ("output", "upload_file") if command.value(name)]
    return all(Path(file).is_file() for file in files)


def _lines(path: Path) -> int:
    return sum(1 for line in read_whole(path, MOST_LINES).split(b"\n") if line.strip())


DONE: dict[str, Callable[[PlannedCommand], bool]] = {
    "download": _downloaded,
    "preprocess": _built,
    "train": _trained,
    "export": _exported,
    "evaluate": _scored_by_task,
    "generate": _answered,
    "score": _scored,
}
