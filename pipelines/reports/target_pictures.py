"""Pictures of teachers' features and of what a model predicts of them.

A task's features are shown by their main directions over the shown images' targets: `depth` in
grey by the first, a grid of others in colour by the first three. A target of one row is shown by
the image whose target is nearest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipelines.reports.page import GalleryItem, Page

if TYPE_CHECKING:
    from lapilli.train.inference.target_predictions import ImagePrediction

__all__ = ["Directions", "add_predictions", "main_directions", "nearest", "picture"]

GREY = ("depth",)
SIDE = 96  # least pixels of a picture's side
SPREAD = (2.0, 98.0)  # percentiles of the targets that are black and white
MOST_ROWS = 4096  # of the targets, that directions are taken from

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Directions:
    """How rows of features become grey values or colours.

    Attributes:
        mean: fp32 [C].
        axes: fp32 [C, 1] or [C, 3].
        low: Of each axis, what is black.
        high: What is white.
    """

    mean: Floats
    axes: Floats
    low: Floats
    high: Floats


def main_directions(targets: Sequence[Floats], count: int) -> Directions:
    """The directions along which some targets' rows differ most, `count` at most."""
    rows = np.concatenate(targets).astype(np.float32)
    rows = rows[:: max(1, len(rows) // MOST_ROWS)]
    mean = rows.mean(0)
    axes = np.linalg.svd(rows - mean, full_matrices=False)[2][:count].T
    # a direction has no sign of its own; the largest entry is positive
    signs = np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    axes = axes * np.where(signs == 0, 1, signs)
    low, high = np.percentile((rows - mean) @ axes, SPREAD, axis=0).astype(np.float32)
    return Directions(mean, axes, low, high)


def picture(rows: Floats, directions: Directions) -> npt.NDArray[np.uint8]:
    """A square grid of rows as a picture, each row a square of pixels: [H, W, 1] or [H, W, 3]."""
    side = round(len(rows) ** 0.5)
    along = (rows - directions.mean) @ directions.axes
    span = np.maximum(directions.high - directions.low, 1e-6)
    shares = ((along - directions.low) / span).clip(0.0, 1.0)
    grid = np.rint(255 * shares).astype(np.uint8).reshape(side, side, -1)
    if grid.shape[2] == 2:  # colours need a third
        grid = np.concatenate([grid, grid[:, :, :1]], 2)
    each = -(-SIDE // side)
    return grid.repeat(each, 0).repeat(each, 1)


def nearest(row: Floats, targets: Sequence[Floats]) -> tuple[int, float]:
    """Which of some targets is the nearest to a prediction by cosine, and how near it is."""
    unit = [one.ravel() / max(float(np.linalg.norm(one)), 1e-12) for one in (row, *targets)]
    likeness = [float(unit[0] @ one) for one in unit[1:]]
    best = int(np.argmax(likeness))
    return best, likeness[best]


def add_predictions(page: Page, found: Sequence[ImagePrediction]) -> None:
    """A section with a row of pictures an image: itself, its targets, what each layer predicts."""
    tasks = list(dict.fromkeys(task for one in found for task, _ in one.predicted))
    having = {task: [one for one in found if task in one.targets] for task in tasks}
    page.section("Targets and predictions").text(_explanation(tasks, having))
    shown = {
        task: main_directions([one.targets[task] for one in there], 1 if task in GREY else 3)
        for task, there in having.items()
        if there and len(there[0].targets[task]) > 1
    }
    for one in found:
        items = [GalleryItem(one.pixels, [one.name])]
        for task in tasks:
            items += _of_task(one, task, having[task], shown.get(task))
        page.gallery(items)


def _explanation(tasks: Sequence[str], having: Mapping[str, Sequence[ImagePrediction]]) -> str:
    grids = [t for t in tasks if having[t] and len(having[t][0].targets[t]) > 1]
    grey = [task for task in grids if task in GREY]
    said = [f"{', '.join(grey)}: grey by the targets' main direction."] if grey else []
    if colours := [task for task in grids if task not in GREY]:
        said.append(f"{', '.join(colours)}: colours by their three main directions.")
    if single := [t for t in tasks if t not in grids and having[t]]:
        said.append(f"{', '.join(single)}: the image here whose target is nearest by cosine.")
    if none := [task for task in tasks if not having[task]]:
        said.append(f"{', '.join(none)}: the teacher gave nothing for these images.")
    return " ".join(said)


def _of_task(
    one: ImagePrediction, task: str, having: Sequence[ImagePrediction], shown: Directions | None
) -> list[GalleryItem]:
    """An image's target of a task, and each layer's prediction."""
    if task not in one.targets:
        return []
    target = one.targets[task]
    layers = [(layer, rows) for (of, layer), rows in one.predicted.items() if of == task]
    items: list[GalleryItem] = []
    if shown is not None:
        items.append(GalleryItem(picture(target, shown), [f"{task}, target"]))
    for layer, rows in layers:
        lines = [f"{task}, layer {layer}", f"smooth L1 {_smooth_l1(rows, target):.3f}"]
        if shown is not None:
            items.append(GalleryItem(picture(rows, shown), lines))
            continue
        best, likeness = nearest(rows, [other.targets[task] for other in having])
        other = having[best]
        lines.append(f"{other.name}, cosine {likeness:.2f}")
        verdict = "right" if other is one else "wrong"
        items.append(GalleryItem(other.pixels, lines, verdict))
    return items


def _smooth_l1(predicted: Floats, target: Floats) -> float:
    far = np.abs(predicted - target)
    return float(np.where(far < 1, far * far / 2, far - 0.5).mean())
