"""The quickstart's own parts; the whole of it runs in `.ci/run`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import easy_vqa
import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.tokenize import load_tokenizer
from lapilli.train.evaluate import Answer
from pipelines.easy_vqa_data import KINDS, write_easy_vqa
from pipelines.quickstart import QuickstartConfig, judge
from pipelines.quickstart_report import describe_hardware, versions, write_report
from tests.factories import Mixture, build_dataset, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("easy_vqa")
    write_easy_vqa(root, seed=0)
    return root


def records(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def asked(rows: list[dict[str, Any]]) -> Counter[tuple[int, str, str]]:
    """(image, question, answer) of every turn, whatever the order."""
    found: Counter[tuple[int, str, str]] = Counter()
    for row in rows:
        turns = [turn["value"] for turn in row["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text = question.removeprefix("<image>\n")
            found[int(Path(row["image"]).stem), text, answer] += 1
    return found


def test_every_question_of_the_package_is_there_once(folder: Path) -> None:
    questions, answers, images = easy_vqa.get_train_questions()
    expected = Counter(zip(images, questions, answers, strict=True))
    assert asked(records(folder / "train.json")) == expected
    questions, answers, images = easy_vqa.get_test_questions()
    expected = Counter(zip(images, questions, answers, strict=True))
    test = [row for kind in KINDS for row in records(folder / f"test_{kind}.json")]
    assert asked(test) == expected
    assert len(test) == 9673
    assert all(len(row["conversations"]) == 2 for row in test)


def test_training_asks_in_shuffled_order_and_shows_each_image_once(folder: Path) -> None:
    rows = records(folder / "train.json")
    assert len(rows) == len({row["image"] for row in rows}) == 4000
    firsts = Counter(row["conversations"][0]["value"] for row in rows)
    assert len(firsts) > 50
    for row in rows:
        markers = [turn["value"].count("<image>") for turn in row["conversations"]]
        assert markers == [1] + [0] * (len(markers) - 1)


def test_the_splits_share_no_image_file(folder: Path) -> None:
    train = {row["image"] for row in records(folder / "train.json")}
    test = {row["image"] for kind in KINDS for row in records(folder / f"test_{kind}.json")}
    assert not train & test
    assert all((folder / image).is_file() for image in train | test)


def test_kinds_are_what_their_answers_say(folder: Path) -> None:
    answers = {
        kind: {row["conversations"][1]["value"] for row in records(folder / f"test_{kind}.json")}
        for kind in KINDS
    }
    assert answers["yes_no"] == {"yes", "no"}
    assert answers["shape"] == {"circle", "rectangle", "triangle"}
    assert len(answers["color"]) == 8


@pytest.mark.parametrize(
    ("accuracy", "shuffled", "code"), [(0.8, 0.6, 0), (0.74, 0.6, 1), (0.8, 0.75, 1)]
)
def test_the_exit_code_says_whether_it_looks(accuracy: float, shuffled: float, code: int) -> None:
    summary = {
        "accuracy": accuracy,
        "accuracy_shuffled_images": shuffled,
        "seconds": {"total": 1.0},
    }
    assert judge(summary, QuickstartConfig()) == code


def test_the_page_shows_accuracy_loss_and_answers(folder: Path, tmp_path: Path) -> None:
    few = records(folder / "test_color.json")[:20]
    (folder / "few.json").write_text(json.dumps(few), encoding="utf-8")
    mixture = Mixture(folder, [SourceConfig("color", "few.json")], {}, [])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    build = build_dataset(mixture, tmp_path / "dataset", tokenizer)
    load_tokenizer(tmp_path / "dataset" / "tokenizer")
    answers = [
        Answer(f"color/{i}", i, i, "color", "what color?", "red", "red" if i % 2 else "blue")
        for i in range(20)
    ]
    summary = {
        "accuracy": 0.5,
        "accuracy_shuffled_images": 0.25,
        "accuracy_by_kind": {"color": 0.5},
        "accuracy_by_kind_shuffled_images": {"color": 0.25},
        "seconds": {"train": 60.0, "total": 90.0},
        "versions": versions(),
        "hardware": describe_hardware(),
    }
    metrics = [{"step": step, "loss": 3.0 / (step + 1)} for step in range(50)]
    page = tmp_path / "report.html"
    write_report(
        page, summary, metrics, answers, {"test": build}, tmp_path / "dataset", view="pad32"
    )
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 12
    for words in ("50.0%", "25.0%", "1.5 min", "what color?", "cross-entropy"):
        assert words in text
