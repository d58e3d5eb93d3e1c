"""The quickstart's data: the `easy-vqa` package written out as a LLaVA-format folder.

5,000 images of one coloured shape, 48,248 questions (MIT licence). Training: the questions of one
image are the turns of one conversation, in an order drawn by seed. Test: one question a record,
since an answered question would give the next one away; one file a kind of question.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError

__all__ = ["KINDS", "write_easy_vqa"]

KINDS = ("shape", "color", "yes_no")
SHAPES = {"circle", "rectangle", "triangle"}


def write_easy_vqa(root: Path, *, seed: int) -> list[str]:
    """Write images and annotations below `root`; what is there already stays as it is.

    Returns:
        Every text of the training conversations, for training a tokenizer.

    Raises:
        DataError: The package is not installed.
    """
    try:
        import easy_vqa
    except ImportError:
        raise DataError('easy-vqa is not installed; pip install -e ".[quickstart]"') from None
    train = _conversations(easy_vqa.get_train_questions(), random.Random(seed))
    _copy_images(easy_vqa.get_train_image_paths(), root / "train")
    _write(root / "train.json", train)
    _copy_images(easy_vqa.get_test_image_paths(), root / "test")
    for kind, records in _single_questions(easy_vqa.get_test_questions()).items():
        _write(root / f"test_{kind}.json", records)
    return [turn["value"] for record in train for turn in record["conversations"]]


def _conversations(questions: Any, order: random.Random) -> list[dict[str, Any]]:
    """One record an image, its questions in shuffled order; the image stands before the first."""
    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*questions, strict=True):
        by_image[image].append((question, answer))
    records: list[dict[str, Any]] = []
    for image, pairs in sorted(by_image.items()):
        order.shuffle(pairs)
        turns: list[dict[str, str]] = []
        for place, (question, answer) in enumerate(pairs):
            turns += _turns(question, answer, with_image=place == 0)
        records.append(
            {"id": f"train-{image}", "image": f"train/{image}.png", "conversations": turns}
        )
    return records


def _single_questions(questions: Any) -> dict[str, list[dict[str, Any]]]:
    """One record a question, by kind."""
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number, (question, answer, image) in enumerate(zip(*questions, strict=True)):
        by_kind[_kind(answer)].append(
            {
                "id": f"test-{number}",
                "image": f"test/{image}.png",
                "conversations": _turns(question, answer, with_image=True),
            }
        )
    return by_kind


def _turns(question: str, answer: str, *, with_image: bool) -> list[dict[str, str]]:
    marker = "<image>\n" if with_image else ""
    return [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]


def _kind(answer: str) -> str:
    return "yes_no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def _copy_images(paths: dict[int, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image, path in paths.items():
        target = folder / f"{image}.png"
        if not target.exists():
            shutil.copy2(path, target)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records), encoding="utf-8")
