"""report.html of the quickstart: data, loss curves, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapilli.data.building.driver import BuildReport
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.train.inference.evaluate import Answer
from lapilli.train.run_folder.metrics_file import StepMetrics
from pipelines.cli.conversation import read_transcript
from pipelines.reports.page import Figure, GalleryItem, Page

__all__ = ["Story", "write_report"]

THUMBNAILS = 12
EXAMPLES = 6  # of right and of wrong answers each
SMOOTHED = 20  # steps a point of the loss curve is the mean of


@dataclass(frozen=True)
class Story:
    """What the page tells.

    Attributes:
        summary: Accuracies, seconds, versions, hardware.
        builds: The datasets by name.
        metrics: Every step's metrics, by stage.
        answers: The model's, to the right images.
        recipes: The stages' settings, by file name.
    """

    summary: Mapping[str, Any]
    builds: Mapping[str, BuildReport]
    metrics: Mapping[str, Sequence[StepMetrics]]
    answers: Sequence[Answer]
    recipes: Mapping[str, str]


def write_report(path: Path, story: Story, datasets: Path, *, view: str) -> None:
    """Write the self-contained page.

    Args:
        path: The file.
        story: What it tells.
        datasets: Folder of the datasets `finetune` and `test`.
        view: Their view whose pixels are shown.
    """
    page = Page("lapilli quickstart", "easy-vqa: from images and questions to a model that looks")
    summary = story.summary
    seconds = summary["seconds"]
    page.figures(
        [
            Figure("accuracy", f"{summary['accuracy']:.1%}", _asked(summary)),
            Figure("shuffled images", f"{summary['accuracy_shuffled_images']:.1%}", "other images"),
            Figure(
                "without looking",
                f"{summary['accuracy_without_looking']:.1%}",
                "most common answer to the question",
            ),
            Figure("time", f"{seconds['total'] / 60:.1f} min", summary["hardware"]["processor"]),
        ]
    )
    _tell_accuracy(page, summary)
    page.section("Twelve answers").gallery(
        _examples(story.answers, open_dataset(datasets / "test", view=view, image_tokens=1))
    )
    page.section("Loss")
    for stage, rows in story.metrics.items():
        page.line_chart({stage: _curve(rows)}, "step", "cross-entropy", title=stage)
    _tell_data(page, story, open_dataset(datasets / "finetune", view=view, image_tokens=1))
    page.section("Time").table(["phase", "seconds"], [list(item) for item in seconds.items()])
    page.section("Settings")
    for name, text in story.recipes.items():
        page.text(name).code(text)
    page.section("Versions").key_values({**summary["versions"], **summary["hardware"]})
    page.write(path)


def _asked(summary: Mapping[str, Any]) -> str:
    known = "trained on" if summary["trained_on"] else "not trained on"
    return f"{summary['asked']:,} questions, split {summary['split']}, {known}"


def _tell_accuracy(page: Page, summary: Mapping[str, Any]) -> None:
    kinds = list(summary["accuracy_by_kind"])
    bars = {
        "right images": "accuracy_by_kind",
        "shuffled images": "accuracy_by_kind_shuffled_images",
        "without looking": "accuracy_by_kind_without_looking",
    }
    page.section("Accuracy by kind of question").bar_chart(
        kinds,
        {name: [summary[key][kind] for kind in kinds] for name, key in bars.items()},
        value_format=".1%",
    )


def _curve(rows: Sequence[StepMetrics]) -> tuple[list[float], list[float]]:
    """Steps and mean losses: single steps have few questions and jump."""
    width = min(SMOOTHED, max(1, len(rows) // 10))
    parts = [rows[start : start + width] for start in range(0, len(rows), width)]
    return (
        [float(np.mean([row.done for row in part])) for part in parts],
        [float(np.mean([row.loss for row in part])) for part in parts],
    )


def _tell_data(page: Page, story: Story, trained: Dataset) -> None:
    page.section("Data").table(
        ["dataset", "read", "kept", "quarantined", "images"],
        [[name, *_counts(build)] for name, build in story.builds.items()],
    )
    page.gallery(_thumbnails(trained))
    page.transcript(
        read_transcript(trained, 0, image_text="<image>"), "a conversation, trained text marked"
    )
    page.histogram(
        trained.lengths, title="tokens of a conversation, an image as one", x_label="tokens"
    )
    kinds = story.summary["accuracy_by_kind"]
    counts = {kind: sum(answer.source == kind for answer in story.answers) for kind in kinds}
    asked = {"questions asked": list(counts.values())}
    page.bar_chart(list(counts), asked, title="questions asked, by kind", value_format=",.0f")


def _counts(build: BuildReport) -> list[int]:
    counts = build.manifest.counts
    return [counts["read"], counts["kept"], counts["quarantined"], counts["images"]]


def _thumbnails(dataset: Dataset) -> list[GalleryItem]:
    """Some images from all over a dataset."""
    step = max(1, len(dataset) // THUMBNAILS)
    samples = [dataset.sample(index) for index in range(0, len(dataset), step)[:THUMBNAILS]]
    return [GalleryItem(sample.pixels[0], [sample.sample_id]) for sample in samples]


def _examples(answers: Sequence[Answer], dataset: Dataset) -> list[GalleryItem]:
    """Some right and some wrong answers, spread over the test data; others where one kind lacks."""
    right = [answer for answer in answers if answer.right]
    wrong = [answer for answer in answers if not answer.right]
    shown = _spread(wrong, EXAMPLES)
    shown = [*_spread(right, 2 * EXAMPLES - len(shown)), *shown]
    return [_example(answer, dataset.sample(answer.index).pixels[0]) for answer in shown]


def _spread(answers: Sequence[Answer], count: int) -> list[Answer]:
    places = np.linspace(0, len(answers) - 1, min(count, len(answers))).astype(int)
    return [answers[place] for place in places]


def _example(answer: Answer, pixels: NDArray[np.uint8]) -> GalleryItem:
    lines = [("question", answer.question), ("expected", answer.expected), ("given", answer.given)]
    return GalleryItem(pixels, lines, "right" if answer.right else "wrong")
