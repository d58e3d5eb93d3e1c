"""The quickstart's page: what went in, how the loss fell, what the model answers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.data.build import BuildReport
from lapilli.data.dataset import open_dataset
from lapilli.data.page import Figure, GalleryItem, Page
from lapilli.train.evaluate import Answer

__all__ = ["describe_hardware", "versions", "write_report"]

BLIND = 0.670  # looking only at the question and answering with its commonest answer
EXAMPLES = 6  # of right and of wrong answers each


def versions() -> dict[str, str]:
    """The libraries that decide the result."""
    names = ("lapilli", "torch", "ray", "deepspeed", "transformers", "pyarrow", "pillow")
    return {
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in names},
    }


def describe_hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": gpus,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    answers: Sequence[Answer],
    builds: Mapping[str, BuildReport],
    test_data: Path,
    *,
    view: str,
) -> None:
    """Write the self-contained page; `view` of the test data is shown with the answers."""
    page = Page("lapilli quickstart", "easy-vqa: from images and questions to a model that looks")
    seconds = summary["seconds"]
    page.figures(
        [
            Figure("accuracy", f"{summary['accuracy']:.1%}", "right images"),
            Figure("shuffled images", f"{summary['accuracy_shuffled_images']:.1%}", "other images"),
            Figure("without looking", f"{BLIND:.1%}", "commonest answer to the question"),
            Figure("time", f"{seconds['total'] / 60:.1f} min", summary["hardware"]["processor"]),
        ]
    )
    page.section("Accuracy by kind of question")
    kinds = list(summary["accuracy_by_kind"])
    bars = {
        "right images": [summary["accuracy_by_kind"][kind] for kind in kinds],
        "shuffled images": [summary["accuracy_by_kind_shuffled_images"][kind] for kind in kinds],
    }
    page.bar_chart(kinds, bars, value_format=".1%")
    page.section("Loss")
    steps = [row["step"] for row in metrics]
    page.line_chart({"loss": (steps, [row["loss"] for row in metrics])}, "step", "cross-entropy")
    page.section("Answers").gallery(_examples(answers, test_data, view))
    page.section("Data").table(
        ["split", "records", "kept", "quarantined", "images"],
        [[split, *_counts(build)] for split, build in builds.items()],
    )
    page.section("Time").table(["phase", "seconds"], [list(item) for item in seconds.items()])
    page.section("Versions").key_values({**summary["versions"], **summary["hardware"]})
    page.write(path)


def _counts(build: BuildReport) -> list[int]:
    counts = build.manifest.counts
    return [counts["read"], counts["kept"], counts["quarantined"], counts["images"]]


def _examples(answers: Sequence[Answer], test_data: Path, view: str) -> list[GalleryItem]:
    """Some right and some wrong answers, spread over the test data."""
    dataset = open_dataset(test_data, view=view, image_tokens=1)
    items: list[GalleryItem] = []
    for right in (False, True):
        chosen = [answer for answer in answers if answer.right is right]
        for answer in chosen[:: max(1, len(chosen) // EXAMPLES)][:EXAMPLES]:
            lines = [
                ("question", answer.question),
                ("expected", answer.expected),
                ("given", answer.given),
            ]
            pixels = dataset.sample(answer.index).pixels[0]
            items.append(GalleryItem(pixels, lines, "right" if right else "wrong"))
    return items
