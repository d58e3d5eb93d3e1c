"""Write the `easy-vqa` package as a LLaVA-format folder.

5,000 images of one coloured shape, 48,248 questions (MIT licence), as LLaVA's two stages want them:

- `pretrain.json`: one caption an image (`red circle`), made of what its questions say.
- `finetune.json`: the questions in an order drawn by seed, a few in one conversation: they share
  one image's tokens, and an answer can give away few others.
- `test_KIND.json`: the package's test questions, one a record, since an answered question would
  give the next one away; or, for choosing settings, those of training images held out.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lapilli.data.errors import DataError
from lapilli.data.io.atomic import write_text

__all__ = ["KINDS", "caption", "write_easy_vqa"]

KINDS = ("shape", "color", "yes_no")
SHAPES = {"circle", "rectangle", "triangle"}
TOGETHER = 4  # questions in one conversation

Pair: TypeAlias = tuple[str, str]  # question, answer
Pairs: TypeAlias = Mapping[int, Sequence[Pair]]  # by image


def write_easy_vqa(root: Path, *, seed: int, held_out: int = 0) -> list[str]:
    """Write images and annotations below `root`; an image that is there already stays as it is.

    Args:
        root: The folder.
        seed: Of the order of the questions.
        held_out: Training images that are not trained on; their questions take the place of the
            test questions, so that no setting is chosen by these.

    Returns:
        Every text of the training conversations, for training a tokenizer.

    Raises:
        DataError: The package is not installed.
    """
    try:
        import easy_vqa
    except ImportError:
        raise DataError('easy-vqa is not installed; pip install -e ".[quickstart]"') from None
    asked = _by_image(easy_vqa.get_train_questions())
    pictures: Mapping[int, str] = easy_vqa.get_train_image_paths()
    order = random.Random(seed)
    _copy_images(pictures, root / "train")
    if held_out:
        left_out = set(order.sample(sorted(asked), held_out))
        test = {image: pairs for image, pairs in asked.items() if image in left_out}
        asked = {image: pairs for image, pairs in asked.items() if image not in left_out}
        folder = "train"
    else:
        test, folder = _by_image(easy_vqa.get_test_questions()), "test"
        _copy_images(easy_vqa.get_test_image_paths(), root / folder)
    conversations = _conversations(asked, order)
    write_text(root / "pretrain.json", json.dumps(_captions(asked)))
    write_text(root / "finetune.json", json.dumps(conversations))
    for kind, records in _single_questions(test, folder).items():
        write_text(root / f"test_{kind}.json", json.dumps(records))
    return [turn["value"] for record in conversations for turn in record["conversations"]]


def _by_image(questions: Iterable[Sequence[Any]]) -> dict[int, list[Pair]]:
    """The package's three lists as questions and answers by image, images in order."""
    found: dict[int, list[Pair]] = defaultdict(list)
    for question, answer, image in zip(*questions, strict=True):
        found[image].append((question, answer))
    return dict(sorted(found.items()))


def caption(pairs: Iterable[Pair]) -> str:
    """Colour and shape as far as an image's questions and answers name them: `red circle`.

    Yes and no are left out: what a question denies is a puzzle of its own.
    """
    colors: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for question, answer in pairs:
        if _kind(answer) == "shape":  # what is the blue shape?
            shapes[answer] += 1
            words = question.removesuffix("?").split()
            if words[-1] == "shape" and words[-2] != "the":
                colors[words[-2]] += 1
        elif _kind(answer) == "color":  # what color is the triangle?
            colors[answer] += 1
            shapes.update(SHAPES & set(question.removesuffix("?").split()))
    return " ".join(word for found in (colors, shapes) for word, _ in found.most_common(1))


def _captions(asked: Pairs) -> list[dict[str, Any]]:
    """One record an image whose questions name a colour or a shape."""
    return [
        {
            "id": f"caption-{image}",
            "image": f"train/{image}.png",
            "conversations": _turns("", text, with_image=True),
        }
        for image, pairs in asked.items()
        if (text := caption(pairs))
    ]


def _conversations(asked: Pairs, order: random.Random) -> list[dict[str, Any]]:
    """A few questions a record, in shuffled order; the image stands before the first."""
    records: list[dict[str, Any]] = []
    for image, pairs in asked.items():
        shuffled = order.sample(pairs, len(pairs))
        for start in range(0, len(shuffled), TOGETHER):
            turns: list[dict[str, str]] = []
            for question, answer in shuffled[start : start + TOGETHER]:
                turns += _turns(question, answer, with_image=not turns)
            records.append(
                {
                    "id": f"train-{image}-{start // TOGETHER}",
                    "image": f"train/{image}.png",
                    "conversations": turns,
                }
            )
    return records


def _single_questions(asked: Pairs, folder: str) -> dict[str, list[dict[str, Any]]]:
    """One record a question, by kind."""
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for image, pairs in asked.items():
        for number, (question, answer) in enumerate(pairs):
            by_kind[_kind(answer)].append(
                {
                    "id": f"{folder}-{image}-{number}",
                    "image": f"{folder}/{image}.png",
                    "conversations": _turns(question, answer, with_image=True),
                }
            )
    return by_kind


def _turns(question: str, answer: str, *, with_image: bool) -> list[dict[str, str]]:
    marker = "<image>\n" if with_image else ""
    return [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]


def _kind(answer: str) -> str:
    return "yes_no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def _copy_images(paths: Mapping[int, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image, path in paths.items():
        target = folder / f"{image}.png"
        if not target.exists():
            temporary = target.with_suffix(".tmp")  # a copy cut short must not be taken for one
            shutil.copyfile(path, temporary)
            temporary.replace(target)
