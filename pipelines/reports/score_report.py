"""A page of scores: metrics, categories, confusion, and wrong answers with their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.io.whole_file import read_whole
from lapilli.data.mounts.keys import is_inside
from lapilli.data.mounts.places import LARGEST_FILE
from lapilli.data.shards.manifest import read_manifest
from lapilli.train.inference.evaluate import chosen_split
from lapilli.train.scoring.responses import Response, ScoreTable
from pipelines.reports.page import Figure, GalleryItem, Page

__all__ = ["Pictures", "write_score_report"]

WRONG = 24  # wrong answers shown
SHOWN = ImageSpec(size=336, fill=(122, 116, 104), aspect="pad")
BLANK = np.full((8, 8, 3), 235, np.uint8)  # in the place of an image that is not at hand


@dataclass(frozen=True)
class Pictures:
    """Where the images of responses are.

    Attributes:
        dataset: Of `evaluate`'s answers; None for none.
        folder: Of `generate`'s; None for none.
    """

    dataset: Dataset | None = None
    folder: Path | None = None

    @staticmethod
    def of(
        dataset: str, view: str, split: Literal["auto", "train", "held_out"], images: str
    ) -> Pictures:
        """Of settings, each of which may be empty.

        Raises:
            DataError: No dataset there, or none with this view.
        """
        folder = Path(images) if images else None
        if not dataset:
            return Pictures(None, folder)
        manifest = read_manifest(Path(dataset))
        opened = open_dataset(
            dataset, view=view or next(iter(manifest.views)), image_tokens=1,
            split=chosen_split(manifest, split),
        )  # fmt: skip
        return Pictures(opened, folder)

    def picture(self, response: Response) -> NDArray[np.uint8] | None:
        """The first image that was shown, uint8 [size, size, 3]; None where it is not at hand."""
        if self.dataset is not None and 0 <= response.index < len(self.dataset):
            pixels = self.dataset.sample(response.index).pixels
            return pixels[0] if len(pixels) else None
        if self.folder is None or not response.image or not is_inside(response.image):
            return None
        try:
            return prepare(read_whole(self.folder / response.image, LARGEST_FILE), SHOWN)
        except (OSError, BadImage, DataError):
            return None


def write_score_report(
    path: Path, responses: Sequence[Response], tables: Sequence[ScoreTable], pictures: Pictures
) -> None:
    """Write the self-contained page.

    Args:
        path: The file.
        responses: What was scored.
        tables: What each scorer found.
        pictures: Where the images are.

    Raises:
        DataError: It cannot be written.
    """
    page = Page("Scores", f"{len(responses):,} answers")
    for table in tables:
        page.section(table.scorer).figures(
            [Figure(name, _shown(value)) for name, value in table.metrics.items()]
        )
        if len(table.by_category) > 1:
            page.bar_chart(
                list(table.by_category), {table.scorer: list(table.by_category.values())},
                title="by category", value_format=".1%",
            )  # fmt: skip
        _add_confusion(page, table)
        _add_wrong(page, table, responses, pictures)
    page.write(path)


def _add_confusion(page: Page, table: ScoreTable) -> None:
    if not table.confusion:
        return
    given = sorted({name for counts in table.confusion.values() for name in counts})
    rows = [
        [expected, *(counts.get(name, 0) for name in given)]
        for expected, counts in table.confusion.items()
    ]
    page.table(["expected", *(f"given {name}" for name in given)], rows, "Confusion")


def _add_wrong(
    page: Page, table: ScoreTable, responses: Sequence[Response], pictures: Pictures
) -> None:
    """The answers of lowest score that are not right, with their images."""
    order = sorted(range(len(responses)), key=lambda place: table.scores[place])
    wrong = [place for place in order if table.scores[place] < 1.0]
    if not wrong:
        page.text("Every answer is right.")
        return
    page.text(f"{len(wrong):,} answers are not right; {min(WRONG, len(wrong))} are shown.")
    page.gallery([_item(responses[p], table.scores[p], pictures) for p in wrong[:WRONG]])


def _item(response: Response, score: float, pictures: Pictures) -> GalleryItem:
    picture = pictures.picture(response)
    lines = [
        ("question", response.question),
        ("expected", " / ".join(dict.fromkeys(response.expected))),
        ("given", response.given),
        ("score", f"{score:.2f}"),
        ("id", str(response.question_id)),
    ]
    if picture is None:
        lines.append(("image", response.image or "none"))
    return GalleryItem(BLANK if picture is None else picture, lines, "wrong")


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1%}"
