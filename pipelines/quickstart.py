"""Run everything on a CPU: data, shards, two training stages, evaluation, report.

lapilli quickstart        (or: make quickstart)

easy-vqa's images and questions go through Ray Data into Arrow shards, through Ray Train and
DeepSpeed into a small vision-language model. The model is then asked questions about images it has
not seen, with the right images and with other questions' images. Finished steps are reused.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lapilli.data.config import BuildConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.io.access import exists
from lapilli.data.io.atomic import write_json
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.ray_session import ray_session
from lapilli.data.text.encode import train_tokenizer
from lapilli.train.config import RunConfig
from lapilli.train.inference.evaluate import Answer, Scores, score
from lapilli.train.run_folder.metrics_file import StepMetrics
from lapilli.train.run_folder.names import REPORT
from pipelines.cli.command import parse, run, say, say_text, say_title
from pipelines.cli.conversation import print_transcript, read_transcript
from pipelines.cli.settings import EvaluateConfig, QuickstartConfig
from pipelines.evaluate import evaluate_once
from pipelines.preprocess import preprocess
from pipelines.quickstart_data.easy_vqa import write_easy_vqa
from pipelines.quickstart_data.majority_baseline import blind_answers
from pipelines.reports.machine import describe_hardware, versions
from pipelines.reports.quickstart_report import Story, write_report
from pipelines.train import train

__all__ = ["judge", "main", "quickstart"]

RECIPES = Path(__file__).parent / "recipes" / "tiny"
VOCABULARY = 512
VIEW = "square64"
VALIDATION_IMAGES = 500
DATASETS = ("pretrain", "finetune", "test")
SUMMARY = "summary.json"


@dataclass
class Phases:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def phase(self, name: str, title: str) -> Generator[None]:
        """Announce a phase and time it."""
        say_title(title)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Go the whole way; returns the summary that is also written.

    Raises:
        DataError: Another process writes there, or it cannot be written.
    """
    with only_writer(Path(config.output), "written"):
        return _quickstart(config, Path(config.output))


def _quickstart(config: QuickstartConfig, output: Path) -> dict[str, Any]:
    phases = Phases()
    with phases.phase("data", "1/6  easy-vqa as a LLaVA-format folder, and a tokenizer for it"):
        _write_data(config, output)
    # One Ray for all that is to do, and none where an earlier run has done it.
    is_complete = exists(output / SUMMARY)
    with contextlib.nullcontext() if is_complete else ray_session():
        title = "2/6  Ray Data: decode each image once, write Arrow shards"
        with phases.phase("preprocess", title):
            builds = {name: preprocess(_build_config(name, output)) for name in DATASETS}
        with phases.phase("pretrain", "3/6  stage 1: tower and projector are trained on captions"):
            first = _stage(config, output, "pretrain")
        with phases.phase("finetune", "4/6  stage 2: all parts are trained on questions"):
            second = _stage(config, output, "finetune")
    with phases.phase("evaluate", "5/6  questions about images it has not seen"):
        answers, shuffled = (_ask(config, output, shuffle_images=s) for s in (False, True))
        blind = score(blind_answers(output / "easy_vqa" / "finetune.json", answers))
    with phases.phase("report", "6/6  report"):
        seconds = _of_the_work(output, phases.seconds) if is_complete else phases.seconds
        summary = _summary(config, (score(answers), score(shuffled), blind), seconds)
        story = Story(
            summary=summary,
            builds=builds,
            metrics={"stage 1": first, "stage 2": second},
            answers=answers,
            recipes=_settings(),
        )
        write_report(output / REPORT, story, output / "datasets", view=VIEW)
        write_json(output / SUMMARY, summary)
    return summary


def _write_data(config: QuickstartConfig, output: Path) -> None:
    root = output / "easy_vqa"
    held_out = VALIDATION_IMAGES if config.questions == "validation" else 0
    texts = write_easy_vqa(root, seed=0, held_out=held_out)
    train_tokenizer(texts, output / "tokenizer", vocab_size=VOCABULARY)
    say(f"{root}: {len(texts) // 2} training questions with answers")


def _build_config(name: str, output: Path) -> BuildConfig:
    flags = {
        "config": RECIPES / f"{name}_data.yaml",
        "root": output / "easy_vqa",
        "output": output / "datasets" / name,
        "tokenizer": output / "tokenizer",
        "template": RECIPES / "template.yaml",
    }
    return parse(BuildConfig, [f"--{key}={value}" for key, value in flags.items()], "")


def _stage(config: QuickstartConfig, output: Path, name: str) -> list[StepMetrics]:
    """Train one stage, after showing what it is trained on; returns its metrics."""
    settings = _run_config(config, output, name)
    patches = settings.model.vision.settings
    tokens = (patches["image_size"] // patches["patch_size"]) ** 2
    dataset = open_dataset(settings.dataset, view=VIEW, image_tokens=tokens)
    say("a sample, with what the loss counts marked:")
    print_transcript(read_transcript(dataset, 0))
    return train(settings)


def _run_config(config: QuickstartConfig, output: Path, name: str) -> RunConfig:
    """The recipes of a stage; stage 2's goes on top of stage 1's and starts from its run."""
    arguments = [f"--config={RECIPES / 'pretrain.yaml'}"]
    if name == "finetune":
        arguments.append(f"--config={RECIPES / 'finetune.yaml'}")
        arguments.append(f"--init_from={output / 'runs' / 'pretrain'}")
    if config.epochs:
        arguments.append(f"--epochs={config.epochs}")
    arguments.append(f"--dataset={output / 'datasets' / name}")
    arguments.append(f"--output={output / 'runs' / name}")
    arguments.append(f"--device={config.device}")
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if gpus:
        arguments.append(f"--num_workers={min(2, gpus)}")
    return parse(RunConfig, arguments, "")


def _ask(config: QuickstartConfig, output: Path, *, shuffle_images: bool) -> list[Answer]:
    what = "images shuffled among the questions" if shuffle_images else "right images"
    say(f"greedy answers, {what}")
    settings = EvaluateConfig(
        run=str(output / "runs" / "finetune"),
        dataset=str(output / "datasets" / "test"),
        device=config.device,
        shuffle_images=shuffle_images,
        output=str(output / f"answers_{'shuffled' if shuffle_images else 'right'}_images.jsonl"),
    )
    return evaluate_once(settings)


def _summary(
    config: QuickstartConfig, scores: tuple[Scores, Scores, Scores], seconds: dict[str, float]
) -> dict[str, Any]:
    right, shuffled, blind = scores
    return {
        "questions": config.questions,
        "asked": right.questions,
        "split": right.split,
        "trained_on": right.trained_on,
        "accuracy": right.accuracy,
        "accuracy_shuffled_images": shuffled.accuracy,
        "accuracy_without_looking": blind.accuracy,
        "accuracy_by_kind": right.by_source,
        "accuracy_by_kind_shuffled_images": shuffled.by_source,
        "accuracy_by_kind_without_looking": blind.by_source,
        "seconds": _total(seconds),
        "versions": versions(),
        "hardware": describe_hardware(),
    }


def _of_the_work(output: Path, seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of the run that did the work, where this one only found it done."""
    before = json.loads((output / SUMMARY).read_text(encoding="utf-8"))["seconds"]
    return {name: max(value, before.get(name, 0.0)) for name, value in seconds.items()}


def _settings() -> dict[str, str]:
    """The recipes of the two stages, as they are written."""
    return {
        name: (RECIPES / name).read_text(encoding="utf-8")
        for name in ("pretrain.yaml", "finetune.yaml")
    }


def _total(seconds: dict[str, float]) -> dict[str, float]:
    return {**seconds, "total": round(sum(seconds.values()), 1)}


def judge(summary: dict[str, Any], config: QuickstartConfig) -> int:
    """Say whether the model learned to look, and what to do next; the exit code."""
    accuracy, shuffled = summary["accuracy"], summary["accuracy_shuffled_images"]
    say(
        f"\naccuracy {accuracy:.4f} with the right images, {shuffled:.4f} with other images, "
        f"{summary['accuracy_without_looking']:.4f} without looking"
    )
    say(f"report: {config.output}/report.html   summary: {config.output}/{SUMMARY}")
    if accuracy < config.min_accuracy or accuracy - shuffled < config.min_gain:
        say(
            f"expected at least {config.min_accuracy} and {config.min_gain} more than with other "
            "images"
        )
        return 1
    say_text(NEXT)
    return 0


NEXT = """
Your own data next, in LLaVA's format:
  lapilli preprocess --config llava15/finetune_data \\
      --root YOUR_FOLDER --output datasets/mine --tokenizer NAME_OR_FOLDER
  lapilli show datasets/mine --samples 3
  lapilli train --config RECIPE.yaml --dataset datasets/mine --output runs/mine"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(QuickstartConfig, argv, "Data, shards, training and evaluation, end to end.")
    return judge(quickstart(config), config)


if __name__ == "__main__":
    run(main)
