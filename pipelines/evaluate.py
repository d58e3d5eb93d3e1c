"""Answer a dataset's questions with a trained model, and score the answers.

lapilli evaluate --run DIR [--dataset DIR] [--scorers yes_no] [--choices Yes,No] [--num_workers 8]
lapilli evaluate --run DIR --lmms_eval pope,textvqa_val --output scores
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.dataset.shard_cache import dataset_folder
from lapilli.data.io.access import cannot_read, is_denied, is_folder
from lapilli.data.io.atomic import write_json, write_text
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.shards.schemas import HELD_OUT
from lapilli.train.checkpoint.at_hand import local_run
from lapilli.train.checkpoint.find import newest_weights
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import (
    Answer,
    Scores,
    chosen_split,
    is_trained_on,
    only_view,
    score,
)
from lapilli.train.inference.published import is_published
from lapilli.train.inference.ray_evaluation import Evaluation, answer_on_ray
from lapilli.train.run_folder.jsonl import parse_lines
from lapilli.train.run_folder.settings import read_run_config
from lapilli.train.scoring.answers_file import response_of
from lapilli.train.scoring.choices import parse_choices
from pipelines.cli.command import parse, progress_bar, run, say
from pipelines.cli.settings import EvaluateConfig
from pipelines.lmms_eval.tasks import evaluate_tasks, say_metrics
from pipelines.reports.score_report import Pictures, write_score_report
from pipelines.score import check_scoring, say_tables, score_responses

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
    check_scoring(config)
    if min(config.num_workers, config.batch) < 1:
        raise TrainError(
            f"num_workers: {config.num_workers}, batch: {config.batch}; expected at least 1 each"
        )
    choices = parse_choices(config.choices) if config.choices else ()
    config = _with_dataset(config)
    manifest = read_manifest(dataset_folder(config.dataset))
    split = chosen_split(manifest, config.split)
    evaluation = Evaluation(
        run=_absolute(config.run),
        dataset=_absolute(config.dataset),
        view=config.view,
        split=split,
        template=config.template,
        trust=config.trust,
        shuffle_images=0 if config.shuffle_images else None,
        turns=config.turns,
        choices=choices,
        threshold=config.threshold,
        batch=config.batch,
    )
    answers = _answers(evaluation, config)
    is_known = is_trained_on(local_run(config.run, "run"), manifest, split)
    answers = [replace(answer, split=split, trained_on=is_known) for answer in answers]
    if config.output:
        lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        write_text(Path(config.output), lines)
    return score(answers), answers


def _absolute(place: str) -> str:
    return place if is_remote(place) else str(Path(place).absolute())


def _answers(evaluation: Evaluation, config: EvaluateConfig) -> list[Answer]:
    """In this process, or on Ray's workers."""
    with progress_bar() as bar:
        task = bar.add_task("questions", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if config.num_workers > 1:
            return answer_on_ray(evaluation, config.num_workers, config.device, show)
        device = torch_device(choose_device(config.device, visible_devices()))
        return evaluation.open(device).answers(show)


def _with_dataset(config: EvaluateConfig) -> EvaluateConfig:
    """With the run's own held-out records where no dataset is named."""
    if config.dataset:
        return config
    run = local_run(config.run, "run")
    if is_published(run):
        raise TrainError(
            f"dataset: left out, and {config.run} is no run that holds records out; name a dataset "
            "of questions with --dataset"
        )
    of_run = read_run_config(run)
    other = of_run.validation.dataset
    split = config.split if other or config.split != "auto" else HELD_OUT
    return replace(
        config, dataset=other or of_run.dataset, view=config.view or of_run.view, split=split
    )


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
        "turns": config.turns,
        "choices": config.choices,
    }


def what_was_asked(dataset: str, scores: Scores) -> str:
    """One line: which split, and whether the run has seen its answers."""
    known = "the run was trained on them, answers included" if scores.trained_on else ""
    return f"asked: split {scores.split} of {dataset}; " + (
        known or "the run was not trained on this split of this dataset"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        EvaluateConfig, argv, "Ask a trained model a dataset's questions.",
        addresses=["run", "dataset"],
    )  # fmt: skip
    if config.lmms_eval:
        say_metrics(evaluate_tasks(config))
        return 0
    if config.include_path or config.limit or config.through != "auto":
        raise TrainError(
            "include_path, through and limit are for --lmms_eval; name its tasks, or leave them out"
        )
    scores, answers = evaluate(config)
    responses, tables = score_responses(
        [one for answer in answers if (one := response_of(asdict(answer)))], config
    )
    say_tables(tables)
    config = _with_dataset(config)
    say(what_was_asked(config.dataset, scores))
    if config.html:
        view = config.view or only_view(dataset_folder(config.dataset))
        dataset = open_dataset(config.dataset, view=view, image_tokens=1, split=scores.split)
        write_score_report(Path(config.html), responses, tables, Pictures(dataset))
        say(f"report: {config.html}")
    return 0


if __name__ == "__main__":
    run(main)
