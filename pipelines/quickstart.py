"""The whole way in one command: data, shards, training, evaluation, report.

python -m pipelines.quickstart        (or: make quickstart)

easy-vqa's images and questions go through Ray Data into Arrow shards, through Ray Train and
DeepSpeed into a small vision-language model, which is then asked questions it has not seen, with
the right images and with other questions' images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lapilli.data.cluster import ray_session
from lapilli.data.config import BuildConfig
from lapilli.data.tokenize import train_tokenizer
from lapilli.train.config import RunConfig
from lapilli.train.evaluate import Answer, Scores
from pipelines.command import parse, run, say, say_title
from pipelines.easy_vqa_data import write_easy_vqa
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.preprocess import preprocess
from pipelines.quickstart_report import describe_hardware, versions, write_report
from pipelines.train import train

RECIPES = Path(__file__).parent / "recipes" / "tiny"
VOCABULARY = 512
VIEW = "square64"


@dataclass(frozen=True)
class QuickstartConfig:
    """How long and where to.

    Attributes:
        output: Folder for everything the quickstart makes.
        epochs: Passes over the training images; 0 takes the recipe's.
        min_accuracy: Exit with 1 if the model answers fewer of the test questions right.
        min_gain: Exit with 1 if it gains less by seeing the right images.
        device: `auto` takes GPUs when there are any.
    """

    output: str = "outputs/quickstart"
    epochs: int = 0
    min_accuracy: float = 0.75
    min_gain: float = 0.08
    device: Literal["auto", "cpu", "cuda"] = "auto"


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
    """Go the whole way; returns the summary that is also written."""
    output = Path(config.output)
    root, tokenizer = output / "easy_vqa", output / "tokenizer"
    phases = Phases()
    with phases.phase("data", "1/5  easy-vqa as a LLaVA-format folder, and a tokenizer for it"):
        texts = write_easy_vqa(root, seed=0)
        train_tokenizer(texts, tokenizer, vocab_size=VOCABULARY)
        say(f"{root}: {len(texts) // 2} training questions with answers")
    with ray_session():
        with phases.phase(
            "preprocess", "2/5  Ray Data: decode each image once, write Arrow shards"
        ):
            builds = {
                split: preprocess(_build_config(split, root, output, tokenizer))
                for split in ("train", "test")
            }
        with phases.phase("train", "3/5  Ray Train and DeepSpeed: all parts of a small model"):
            metrics = train(_run_config(config, output))
    with phases.phase("evaluate", "4/5  questions it has not seen"):
        scores, answers = _ask(config, output, shuffle_images=False)
        shuffled, _ = _ask(config, output, shuffle_images=True)
    with phases.phase("report", "5/5  report"):
        summary = _summary(scores, shuffled, phases.seconds)
        _write_summary(output, summary)
        test_data = output / "datasets" / "test"
        page = output / "report.html"
        write_report(page, summary, metrics, answers, builds, test_data, view=VIEW)
    return summary


def _build_config(split: str, root: Path, output: Path, tokenizer: Path) -> BuildConfig:
    recipe = RECIPES / ("data.yaml" if split == "train" else "test_data.yaml")
    flags = {"root": root, "output": output / "datasets" / split, "tokenizer": tokenizer}
    template = RECIPES / "template.yaml"
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return parse(BuildConfig, [f"--config={recipe}", *arguments, f"--template={template}"], "")


def _run_config(config: QuickstartConfig, output: Path) -> RunConfig:
    arguments = [
        f"--config={RECIPES / 'train.yaml'}",
        f"--dataset={output / 'datasets' / 'train'}",
        f"--output={output / 'run'}",
        f"--device={config.device}",
    ]
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if gpus:
        arguments.append(f"--workers={min(2, gpus)}")
    if config.epochs:
        arguments.append(f"--epochs={config.epochs}")
    return parse(RunConfig, arguments, "")


def _ask(
    config: QuickstartConfig, output: Path, *, shuffle_images: bool
) -> tuple[Scores, list[Answer]]:
    what = "images shuffled among the questions" if shuffle_images else "right images"
    say(f"greedy answers, {what}")
    test = str(output / "datasets" / "test")
    scores, answers = evaluate(
        EvaluateConfig(
            run=str(output / "run"),
            dataset=test,
            device=config.device,
            shuffle_images=shuffle_images,
        )
    )
    say(f"accuracy {scores.accuracy:.4f} over {scores.questions} questions")
    return scores, answers


def _summary(scores: Scores, shuffled: Scores, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "accuracy": scores.accuracy,
        "accuracy_shuffled_images": shuffled.accuracy,
        "accuracy_by_kind": scores.by_source,
        "accuracy_by_kind_shuffled_images": shuffled.by_source,
        "test_questions": scores.questions,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "versions": versions(),
        "hardware": describe_hardware(),
    }


def _write_summary(output: Path, summary: dict[str, Any]) -> None:
    (output / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def judge(summary: dict[str, Any], config: QuickstartConfig) -> int:
    """Say whether the model learned to look; the exit code."""
    accuracy, shuffled = summary["accuracy"], summary["accuracy_shuffled_images"]
    say(
        f"\naccuracy {accuracy:.4f} with the right images, {shuffled:.4f} with other "
        f"images; {summary['seconds']['total']:.0f} s in all"
    )
    say(f"report: {config.output}/report.html   summary: {config.output}/summary.json")
    if accuracy >= config.min_accuracy and accuracy - shuffled >= config.min_gain:
        return 0
    say(
        f"expected at least {config.min_accuracy} and {config.min_gain} more than with other images"
    )
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(QuickstartConfig, argv, "Data, shards, training, evaluation: the whole way.")
    return judge(quickstart(config), config)


if __name__ == "__main__":
    run(main)
