"""Answer a dataset's questions with a trained model, and score the answers.

lapilli evaluate --run DIR --dataset DIR [--split train] [--shuffle_images true]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lapilli.data.io.access import cannot_read, is_denied, is_folder
from lapilli.data.io.atomic import write_json, write_text
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.shards.manifest import read_manifest
from lapilli.train.checkpoint.find import newest_weights
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import open_trained
from lapilli.train.inference.evaluate import (
    Answer,
    Scores,
    answer_dataset,
    chosen_split,
    is_trained_on,
    open_test,
    score,
)
from lapilli.train.run_folder.jsonl import parse_lines
from pipelines.cli.command import parse, progress_bar, run, say
from pipelines.cli.settings import EvaluateConfig

__all__ = ["evaluate", "evaluate_once", "main", "what_was_asked"]


def evaluate(config: EvaluateConfig) -> tuple[Scores, list[Answer]]:
    """Answer every question and count; `output` is this process's own meanwhile.

    Raises:
        DataError: Another process writes the output, or it cannot be written.
        DataError, ModelError, TrainError: Run and dataset cannot be opened or do not fit.
    """
    if not config.output:
        return _evaluate(config)
    if not is_folder(Path(config.output).absolute().parent):
        raise TrainError(f"output: {config.output} is in no folder; make the folder first")
    if is_folder(Path(config.output)):
        raise TrainError(f"output: {config.output} is a folder; expected a file")
    with only_writer(Path(config.output), "written", beside=True):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> tuple[Scores, list[Answer]]:
    device = torch_device(choose_device(config.device, visible_devices()))
    trained = open_trained(
        Path(config.run), Path(config.dataset), device, config.trust, template=config.template
    )
    view = config.view or _only_view(Path(config.dataset))
    manifest = read_manifest(Path(config.dataset))
    split = chosen_split(manifest, config.split)
    dataset = open_test(Path(config.dataset), view, trained, split)
    is_known = is_trained_on(Path(config.run), manifest, split)
    with progress_bar() as bar:
        task = bar.add_task("questions", total=len(dataset))
        answers = answer_dataset(
            trained.model,
            dataset,
            shuffle_images=0 if config.shuffle_images else None,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    answers = [replace(answer, split=split, trained_on=is_known) for answer in answers]
    if config.output:
        lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        write_text(Path(config.output), lines)
    return score(answers), answers


def evaluate_once(config: EvaluateConfig) -> list[Answer]:
    """Answer every question, or read what the same weights answered to the same data before.

    Beside `output` a file names weights and data; it is written last.
    """
    output, beside = Path(config.output), Path(f"{config.output}.of.json")
    asked = _asked(config)
    try:
        is_same = from_json(read_whole(beside), dict[str, Any]) == asked
        known = parse_lines(read_whole(output, MOST_LINES), Answer, output) if is_same else []
    except (OSError, JsonError) as error:
        if is_denied(error):
            raise TrainError(cannot_read(error.filename or output, error)) from None
        known = []
    if known:
        say(f"{len(known)} answers of the same weights to the same questions reused: {output}")
        return known
    _, answers = evaluate(config)
    write_json(beside, asked)
    return answers


def _asked(config: EvaluateConfig) -> dict[str, Any]:
    """The settings and weights that determine the answers."""
    found = newest_weights(Path(config.run))
    manifest = read_manifest(Path(config.dataset))
    return {
        "columns": [field.name for field in fields(Answer)],
        "weights": found.state.weights_id if found else "",
        "dataset": manifest.fingerprint,
        "view": config.view,
        "split": chosen_split(manifest, config.split),
        "shuffle_images": config.shuffle_images,
    }


def _only_view(dataset: Path) -> str:
    views = list(read_manifest(dataset).views)
    if len(views) != 1:
        raise TrainError(f"view: {dataset} has {', '.join(views)}; choose one with --view")
    return views[0]


def what_was_asked(dataset: str, scores: Scores) -> str:
    """One line: which split, and whether the run has seen its answers."""
    known = "the run was trained on them, answers included" if scores.trained_on else ""
    return f"asked: split {scores.split} of {dataset}; " + (
        known or "the run was not trained on this split of this dataset"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(EvaluateConfig, argv, "Ask a trained model a dataset's questions.")
    scores, _ = evaluate(config)
    for source, share in scores.by_source.items():
        say(f"  {source:<20} {share:.4f}")
    say(f"accuracy {scores.accuracy:.4f} over {scores.questions} questions")
    say(what_was_asked(config.dataset, scores))
    return 0


if __name__ == "__main__":
    run(main)
