"""Score an answers file, show what is wrong in it, or make it ready for a benchmark's server.

lapilli score answers.jsonl --scorers yes_no --truth coco_pope_random.json
lapilli score answers.jsonl --lmms_eval textvqa_val
lapilli score answers.jsonl --upload vqav2 --questions test.jsonl --upload_file upload.json
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.io.access import cannot_read, require_writable
from lapilli.data.io.atomic import write_atomic, write_json
from lapilli.data.io.local_copy import local_copy
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.train.errors import TrainError
from lapilli.train.scoring.answers_file import read_answers, read_rows, with_truth
from lapilli.train.scoring.choices import category_of, compiled, with_conclusions
from lapilli.train.scoring.responses import Response, ScoreTable
from lapilli.train.scoring.scorers import chosen_scorers
from lapilli.train.scoring.uploads import upload
from pipelines.cli.command import first_as, parse, run, say
from pipelines.cli.settings import ScoreConfig, ScoringFlags
from pipelines.lmms_eval.tasks import answers_by_task, say_metrics
from pipelines.reports.score_report import Pictures, write_score_report

__all__ = ["check_scoring", "main", "say_tables", "score", "score_responses"]

LARGEST_CELL = 1 << 28  # characters: MMBench's table has images in it
COUNTS = ("tp", "fp", "tn", "fn", "neither")


def check_scoring(flags: ScoringFlags) -> None:
    """Find what is wrong with the flags before a model answers anything.

    Raises:
        TrainError, DataError: No such scorer, a threshold that is no share, a pattern that is no
            regular expression, or a report that cannot be written.
    """
    chosen_scorers(flags.scorers)
    with_conclusions([], flags.threshold, flags.truth_patterns)
    compiled("category_pattern", flags.category_pattern)
    if flags.html:
        require_writable("html", Path(flags.html).absolute().parent)


def score_responses(
    responses: Sequence[Response], flags: ScoringFlags
) -> tuple[list[Response], list[ScoreTable]]:
    """What the scorers find, and the responses that they looked at.

    Raises:
        TrainError: Answers of another kind than a scorer is for.
    """
    found = with_conclusions(responses, flags.threshold, flags.truth_patterns)
    if flags.category_pattern:
        pattern = compiled("category_pattern", flags.category_pattern)
        found = [replace(one, category=category_of(one.image, pattern)) for one in found]
    default = "logits" if all(one.logits for one in found) else "exact"
    return found, [scorer(found) for scorer in chosen_scorers(flags.scorers or default)]


def say_tables(tables: Sequence[ScoreTable]) -> None:
    """Print each scorer's shares by category and its metrics."""
    for table in tables:
        for category, share in table.by_category.items():
            say(f"  {category or '(no category)':<20} {share:.4f}")
        metrics = ", ".join(
            f"{name} {value:.0f}" if name in COUNTS else f"{name} {value:.4f}"
            for name, value in table.metrics.items()
        )
        say(f"{table.scorer}: {metrics}, over {len(table.scores)} questions")


def score(config: ScoreConfig) -> list[ScoreTable]:
    """Score the file and write what is asked for.

    Raises:
        DataError, TrainError: A file that cannot be read or is of something else, and as
            `score_responses`.
    """
    check_scoring(config)
    if bool(config.upload) != bool(config.upload_file):
        raise TrainError("upload: names a form, --upload_file its file; expected both or neither")
    responses = read_answers(Path(config.answers))
    if config.upload:
        questions = _questions(Path(config.questions)) if config.questions else []
        _write(Path(config.upload_file), upload(config.upload, responses, questions))
        say(f"{len(responses)} answers for {config.upload}: {config.upload_file}")
    is_scored = config.scorers or config.truth or config.html or config.output
    if config.lmms_eval:
        say_metrics(answers_by_task(responses, config.lmms_eval, config.include_path))
    if (config.upload or config.lmms_eval) and not is_scored:
        return []
    if config.truth:
        responses = with_truth(responses, Path(config.truth))
    responses, tables = score_responses(responses, config)
    if config.output:
        write_json(Path(config.output), [asdict(table) for table in tables])
    if config.html:
        pictures = Pictures.of(config.dataset, config.view, config.split, config.images)
        write_score_report(Path(config.html), responses, tables, pictures)
        say(f"report: {config.html}")
    return tables


def _questions(path: Path) -> list[dict[str, Any]]:
    """A benchmark's own questions; MMBench's are a table."""
    if path.suffix != ".tsv":
        return read_rows(path, "questions")
    try:
        text = read_whole(path, MOST_LINES).decode("utf-8-sig")
        csv.field_size_limit(LARGEST_CELL)
        return [*csv.DictReader(io.StringIO(text), delimiter="\t")]
    except OSError as error:
        raise DataError(f"questions: {cannot_read(path, error)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"questions: {path} is no table ({error}); expected a .tsv file") from None


def _write(path: Path, data: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, write)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    names = ("answers", "truth", "questions")
    config = parse(
        ScoreConfig, first_as("answers", argv), "Score an answers file.",
        copied=dict.fromkeys(names, local_copy),
    )  # fmt: skip
    say_tables(score(config))
    return 0


if __name__ == "__main__":
    run(main)
