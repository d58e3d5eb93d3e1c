"""The quickstart's own parts; the whole of it runs in `.ci/run`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import easy_vqa
import pytest

from lapilli.data.config import SourceConfig
from lapilli.train.inference.evaluate import Answer
from pipelines.cli.settings import QuickstartConfig
from pipelines.quickstart import judge
from pipelines.quickstart_data.easy_vqa import KINDS, caption, write_easy_vqa
from pipelines.quickstart_data.majority_baseline import blind_answers
from pipelines.reports.machine import describe_hardware, versions
from pipelines.reports.quickstart_report import Story, write_report
from tests.browser import Chromium
from tests.factories import Mixture, build_dataset, make_tokenizer
from tests.train.small_run import made_step


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
    assert asked(records(folder / "finetune.json")) == expected
    questions, answers, images = easy_vqa.get_test_questions()
    expected = Counter(zip(images, questions, answers, strict=True))
    test = [row for kind in KINDS for row in records(folder / f"test_{kind}.json")]
    assert asked(test) == expected
    assert len(test) == 9673
    assert all(len(row["conversations"]) == 2 for row in test)


def test_a_few_questions_in_shuffled_order_share_an_image(folder: Path) -> None:
    rows = records(folder / "finetune.json")
    assert len({row["image"] for row in rows}) == 4000
    assert len({row["id"] for row in rows}) == len(rows)
    firsts = Counter(row["conversations"][0]["value"] for row in rows)
    assert len(firsts) > 50
    for row in rows:
        markers = [turn["value"].count("<image>") for turn in row["conversations"]]
        assert markers == [1] + [0] * (len(markers) - 1)
        assert 2 <= len(markers) <= 8


def test_captions_say_what_the_questions_of_their_image_say(folder: Path) -> None:
    rows = records(folder / "pretrain.json")
    assert len(rows) > 3500
    questions, answers, images = easy_vqa.get_train_questions()
    said: dict[int, set[str]] = {}
    for question, answer, image in zip(questions, answers, images, strict=True):
        said.setdefault(image, set()).update([*question.rstrip("?").split(), answer])
    for row in rows:
        words = row["conversations"][1]["value"].split()
        assert 1 <= len(words) <= 2
        assert set(words) <= said[int(Path(row["image"]).stem)]


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([("what color is the circle?", "red")], "red circle"),
        ([("what is the blue shape?", "triangle")], "blue triangle"),
        ([("what shape is present?", "rectangle")], "rectangle"),
        ([("what color is the shape?", "teal")], "teal"),
        (
            [("what color is the shape?", "teal"), ("what shape is present?", "circle")],
            "teal circle",
        ),
        ([("is there a red circle?", "yes"), ("is there not a triangle?", "no")], ""),
    ],
)
def test_a_caption_names_what_is_known(pairs: list[tuple[str, str]], text: str) -> None:
    assert caption(pairs) == text


def test_held_out_images_are_asked_about_and_not_trained_on(tmp_path: Path) -> None:
    write_easy_vqa(tmp_path, seed=0, held_out=500)
    trained = {
        row["image"]
        for name in ("pretrain", "finetune")
        for row in records(tmp_path / f"{name}.json")
    }
    held_out = {row["image"] for kind in KINDS for row in records(tmp_path / f"test_{kind}.json")}
    assert len(held_out) == 500
    assert not trained & held_out
    assert len(trained) == 3500
    assert all(image.startswith("train/") for image in held_out), "no test image is looked at"


def test_what_is_there_is_left_and_a_copy_cut_short_is_none(folder: Path) -> None:
    image = folder / "train" / "7.png"
    before = image.stat().st_mtime_ns
    (folder / "train" / "8.png").rename(folder / "train" / "8.tmp")  # killed while copying
    (folder / "train" / "8.tmp").write_bytes(b"half")
    write_easy_vqa(folder, seed=0)
    assert image.stat().st_mtime_ns == before
    pictures = easy_vqa.get_train_image_paths()
    assert (folder / "train" / "8.png").read_bytes() == Path(pictures[8]).read_bytes()


def test_the_splits_share_no_image_file(folder: Path) -> None:
    train = {row["image"] for row in records(folder / "finetune.json")}
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


def test_a_blind_answer_is_the_commonest_to_the_same_question(tmp_path: Path) -> None:
    turns = [
        ("what color?", "red"),
        ("what color?", "red"),
        ("what color?", "blue"),
        ("is it?", "no"),
    ]
    conversations = [
        {"from": who, "value": text}
        for question, answer in turns
        for who, text in (("human", f"<image>\n{question}"), ("gpt", answer))
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"id": 1, "conversations": conversations}]), encoding="utf-8")
    asked = [answer_to("what color?"), answer_to("is it?"), answer_to("never asked")]
    assert [one.given for one in blind_answers(file, asked)] == ["red", "no", "red"]


def answer_to(question: str) -> Answer:
    return Answer("kind/1", question, "", "?", 0, 0, "kind")


@pytest.mark.parametrize(
    ("accuracy", "shuffled", "code"), [(0.95, 0.6, 0), (0.89, 0.6, 1), (0.95, 0.81, 1)]
)
def test_the_exit_code_says_whether_it_looks(accuracy: float, shuffled: float, code: int) -> None:
    summary = {
        "accuracy": accuracy,
        "accuracy_shuffled_images": shuffled,
        "accuracy_without_looking": 0.67,
    }
    assert judge(summary, QuickstartConfig()) == code


@pytest.fixture
def story(folder: Path, tmp_path: Path) -> Story:
    """What a run tells, of twenty test questions."""
    few = records(folder / "test_color.json")[:20]
    (folder / "few.json").write_text(json.dumps(few), encoding="utf-8")
    mixture = Mixture(folder, [SourceConfig("color", "few.json")], {}, [])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    for name in ("finetune", "test"):
        build = build_dataset(mixture, tmp_path / "datasets" / name, tokenizer)
    answers = [
        Answer(f"color/{i}", "what color?", "red", "red" if i % 2 else "blue", i, i, "color")
        for i in range(20)
    ]
    summary = {
        "asked": 20,
        "split": "train",
        "trained_on": False,
        "accuracy": 0.5,
        "accuracy_shuffled_images": 0.25,
        "accuracy_without_looking": 0.125,
        "accuracy_by_kind": {"color": 0.5},
        "accuracy_by_kind_shuffled_images": {"color": 0.25},
        "accuracy_by_kind_without_looking": {"color": 0.125},
        "seconds": {"train": 60.0, "total": 90.0},
        "versions": versions(),
        "hardware": describe_hardware(),
    }
    rows = [made_step(step, loss=3.0 / (step + 1)) for step in range(50)]
    metrics = {"stage 1": rows, "stage 2": rows}
    return Story(summary, {"test": build}, metrics, answers, {"recipe.yaml": "epochs: 7"})


def test_the_page_shows_accuracy_loss_data_and_answers(story: Story, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(page, story, tmp_path / "datasets", view="pad32")
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 24  # twelve answers, twelve training images
    for words in (
        "50.0%",
        "25.0%",
        "12.5%",
        "1.5 min",
        "what color?",
        "cross-entropy",
        "epochs: 7",
    ):
        assert words in text


def test_the_page_is_fit_to_be_read_on_a_phone_and_a_desk(
    chromium: Chromium, story: Story, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    write_report(page, story, tmp_path / "datasets", view="pad32")
    assert chromium.problems(page) == []
