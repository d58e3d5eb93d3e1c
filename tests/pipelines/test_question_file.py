"""Files of questions for `generate`: every key is used, counted or refused, images have places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines.generate
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec, prepare
from lapilli.data.record import TextPart
from lapilli.data.text.encode import bind_template, load_tokenizer
from lapilli.data.text.templates import get_template
from lapilli.model.config import Decoding
from lapilli.model.vlm import build_model
from lapilli.train.inference.assistant import Assistant, Question
from pipelines.cli.command import run
from pipelines.cli.question_file import read_questions
from tests.factories import image_bytes, make_tokenizer
from tests.train.small_run import small_run

FEW = "--decoding.max_new_tokens=4"


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("asked") / "tokenizer"))
    model = small_run(Path(), Path()).model
    model.language.settings.update(max_position_embeddings=512)
    return Assistant(
        build_model(model).eval(),
        tokenizer,
        bind_template(get_template("v1"), tokenizer),
        ImageSpec(32, (122, 116, 104)),
        "made/step-1",
    )


@pytest.fixture(autouse=True)
def opened(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Question]:
    """The made-up model is opened, and what it is asked is kept."""
    asked: list[Question] = []
    answer = Assistant.answer

    def keeping(self: Assistant, questions: list[Question], *rest: Any, **more: Any) -> list[str]:
        asked.extend(questions)
        return answer(self, questions, *rest, **more)

    monkeypatch.setattr(Assistant, "answer", keeping)
    monkeypatch.setattr(pipelines.generate, "open_assistant", lambda *_, **__: assistant)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image_bytes("png", 40, 30, seed=number))
    return asked


def ask(folder: Path, *lines: object, flags: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Ask the lines, texts as they are and others as JSON, and read the answers."""
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "q.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    output = folder / "a.jsonl"
    arguments = [
        "made", f"--questions={folder / 'q.jsonl'}", f"--images={folder}", f"--output={output}",
        FEW, "--device=cpu", *flags,
    ]  # fmt: skip
    assert pipelines.generate.main(arguments) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]


def pixels(folder: Path, *numbers: int) -> np.ndarray[Any, Any]:
    spec = ImageSpec(32, (122, 116, 104))
    return np.stack([prepare((folder / f"{n}.png").read_bytes(), spec) for n in numbers])


def test_the_images_of_a_line_are_shown_in_their_order(
    tmp_path: Path, assistant: Assistant, opened: list[Question]
) -> None:
    ask(
        tmp_path,
        {"question_id": 1, "images": ["0.png", "1.png"], "text": "Which is red?"},
        {"question_id": 2, "image": ["2.png", "0.png"], "text": "Is <image> as red as <image>?"},
        {"question_id": 3, "images": "1.png", "text": "Is it red?"},
        {"question_id": 4, "images": [], "text": "Why?"},
    )
    shown = [
        [one == image_bytes("png", 40, 30, seed=n) for n in range(3)].index(True)
        for question in opened
        for one in question.images
    ]
    assert shown == [0, 1, 2, 0, 1]
    assert [len(question.images) for question in opened] == [2, 2, 1, 0]
    prompt = assistant.prompt(opened[1].turns)
    assert (prompt < 0).sum() == 2


def test_a_mark_is_an_images_place_in_a_template_that_keeps_places(
    tmp_path: Path, assistant: Assistant, opened: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """qwen_vl's own marker stands for a place as well."""
    other = Assistant(
        assistant.model, assistant.tokenizer, get_template("qwen_vl"), assistant.spec, "other"
    )
    monkeypatch.setattr(pipelines.generate, "open_assistant", lambda *_, **__: other)
    ask(
        tmp_path,
        {"question_id": 1, "image": "0.png", "text": "Is <image> red?"},
        {"question_id": 2, "image": "0.png", "text": "Is <|extra_0|> red?"},
    )
    first, second = (other.prompt(question.turns) for question in opened)
    assert first.tolist() == second.tolist()
    at = int(np.flatnonzero(first < 0)[0])
    assert other.tokenizer.decode(first[:at].tolist()).endswith("Is ")
    assert other.tokenizer.decode(first[at + 1 :].tolist()).strip().startswith("red?")


def test_keys_for_scoring_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question_id": n, "text": "Why?", "category": "conv"} for n in range(3)]
    found = ask(tmp_path, *rows, {"question_id": "p", "text": "Why?", "label": None})
    assert [row["question_id"] for row in found] == [0, 1, 2, "p"]
    assert "category (3 lines), label (1 lines)" in " ".join(capsys.readouterr().out.split())


def test_separators_inside_a_line_are_text(tmp_path: Path) -> None:
    text = "line\u2028and\x85more\x0b"
    found = ask(
        tmp_path, json.dumps({"question_id": 1, "text": text}, ensure_ascii=False), "", "  "
    )
    assert [row["prompt"] for row in found] == [text]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "a"}, "no question_id"),
        ({"question_id": 1}, "no text"),
        ({"question_id": 1, "text": "a", "img": "0.png"}, "unknown key 'img'; the keys are quest"),
        ({"question_id": 1, "text": "a", "\x1b[2J": 1}, r"unknown key '\x1b[2J'"),
        ({"question_id": 1, "text": "a", "image": "0.png", "images": ["1.png"]}, "both there"),
        ({"question_id": 1, "text": 5}, "text is 5"),
        ({"question_id": 1, "text": None}, "text is null"),
        ({"question_id": 1, "text": ["a"]}, 'text is ["a"]'),
        ({"question_id": None, "text": "a"}, "question_id is null"),
        ({"question_id": 1.5, "text": "a"}, "question_id is 1.5"),
        ({"question_id": True, "text": "a"}, "question_id is true"),
        ({"question_id": {"a": 1}, "text": "a"}, 'question_id is {"a": 1}'),
        ({"question_id": 1, "text": "a", "image": None}, "image holds null"),
        ({"question_id": 1, "text": "a", "image": 7}, "image holds 7"),
        ({"question_id": 1, "text": "a", "images": ["0.png", None]}, "images holds null"),
        ({"question_id": 1, "text": "a", "images": [["0.png"]]}, 'images holds ["0.png"]'),
        ({"question_id": 1, "text": "a", "image": ""}, 'image holds ""'),
        ({"question_id": 1, "text": "a", "image": "no.png"}, "no.png is not there"),
        ({"question_id": 1, "text": "a", "image": "a\0b"}, r"image holds "),
        ('{"question_id": 1, "text": "\\ud800"}', r'text is "\ud800"'),
        ('{"question_id": "\\udc00", "text": "a"}', r'question_id is "\udc00"'),
        ('{"question_id": 1, "text": "a", "image": "\\ud800.png"}', r'image holds "\ud800.png"'),
        ("[" * 100_000, "expected an object with question_id"),
        ('["a"]', "expected an object with question_id"),
        ("null", "expected an object with question_id"),
        ('{"question_id": 1, "text": "a"', "expected an object with question_id"),
        ('{"question_id": ' + "1" * 5000 + ', "text": "a"}', "expected an object with question_id"),
        (
            {"question_id": 1, "text": "a <image>", "images": ["0.png", "1.png"]},
            "1 image marker for 2 images",
        ),
        (
            {"question_id": 1, "text": "a <image><image>", "image": "0.png"},
            "2 image markers for 1 image;",
        ),
        ({"question_id": 1, "text": "a <image>"}, "1 image marker for 0 images"),
    ],
    ids=range(30),
)
def test_a_line_that_is_no_question_is_named_by_its_number(
    line: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: bool(ask(tmp_path, {"question_id": 0, "text": "Why?"}, "", line)))
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"error: {tmp_path / 'q.jsonl'} line 3: ")
    assert words in said
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "is_shown"),
    [("0.png", True), ("./0.png", True), ("inside.png", True), ("FOLDER/0.png", True),
     ("../out/0.png", False), ("a/../../out/0.png", False), ("../images/0.png", False),
     ("OUT/0.png", False), ("FOLDER/../out/0.png", False), ("link/0.png", False),
     ("link.png", False), ("FOLDER/link.png", False), ("FOLDERmore/0.png", False),
     ("/etc/hostname", False), ("loop.png", False), ("../../../../../../etc/passwd", False)],
)  # fmt: skip
@pytest.mark.parametrize("is_relative", [False, True])
def test_images_are_below_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, is_shown: bool, is_relative: bool
) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    for path in (folder, out, tmp_path / "imagesmore"):
        path.mkdir()
        (path / "0.png").write_bytes(image_bytes("png", 4, 4))
    (folder / "inside.png").symlink_to("0.png")
    (folder / "link").symlink_to("../out")
    (folder / "link.png").symlink_to(out / "0.png")
    (folder / "loop.png").symlink_to("loop.png")
    key = key.replace("FOLDER", str(folder)).replace("OUT", str(out))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "a", "image": key}))
    monkeypatch.chdir(tmp_path)
    if is_shown:
        (found,) = read_questions(tmp_path / "q.jsonl", Path("images") if is_relative else folder)
        assert found.images[0].resolve() == folder / "0.png"
    else:
        with pytest.raises(
            DataError, match=r"line 1: image.*(leads out of|is not there)"
        ) as caught:
            read_questions(tmp_path / "q.jsonl", Path("images") if is_relative else folder)
        assert "\n" not in str(caught.value)


def test_a_long_question_is_said_once_with_both_numbers(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"q.jsonl line 2: \d+ tokens .* has 512 positions"
    ) as told:
        found = ask(
            tmp_path,
            {"question_id": 1, "text": "Why?"},
            {"question_id": 2, "text": "word " * 600},
            {"question_id": 3, "text": "word " * 600},
        )
    assert len(told) == 1
    assert len(found) == 3


def test_drawn_answers_belong_to_questions_and_not_to_batches(tmp_path: Path) -> None:
    rows = [
        {"question_id": n, "text": f"What is {n % 3}?", "image": f"{n % 3}.png"} for n in range(12)
    ]
    drawn = ("--decoding.temperature=1.0", "--decoding.max_new_tokens=8")
    found: list[dict[Any, str]] = []
    for batch, order in ((1, 1), (5, 1), (12, -1)):
        (tmp_path / "a.jsonl").unlink(missing_ok=True)
        answers = ask(tmp_path, *rows[::order], flags=(*drawn, f"--batch={batch}"))
        found.append({row["question_id"]: row["text"] for row in answers})
    assert found[0] == found[1] == found[2]
    assert [len({one[n] for n in range(kind, 12, 3)}) for one in found for kind in range(3)] == [
        1
    ] * 9
    assert len({found[0][n] for n in range(3)}) == 3
    # taken up again in the middle, it is the same
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:4], ""]), encoding="utf-8")
    again = ask(tmp_path, *rows, flags=(*drawn, "--batch=3"))
    assert {row["question_id"]: row["text"] for row in again} == found[0]


def test_the_stream_is_the_answer(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert pipelines.generate.main(["made", "--question=Why?", FEW, "--device=cpu"]) == 0
    (said,) = assistant.answer([Question.of("Why?")], Decoding(4))
    assert capsys.readouterr().out == f"{said}\n"


def test_a_list_of_icm_assistant_is_a_conversation_an_image(
    tmp_path: Path, opened: list[Question], assistant: Assistant
) -> None:
    """Odd lines are images, even ones their turns; an answer stands before the next question."""
    lines = ["0.png", "Describe it.\tIs it?", "1.png", "看"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    arguments = [f"--questions={tmp_path / 'list.txt'}", f"--images={tmp_path}", FEW]
    arguments += ["--model=made", f"--output={output}", "--device=cpu"]
    assert pipelines.generate.main(arguments) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    said = [(row["question_id"], row["prompt"]) for row in rows]
    assert said == [("0.png", "Describe it."), ("1.png", "看"), ("0.png", "Is it?")]
    *_, last = opened
    assert [turn.role for turn in last.turns] == ["user", "assistant", "user"]
    assert last.turns[1].parts == (TextPart(rows[0]["text"]),)
    # the second turn alone is asked again, behind the first's answer
    output.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]), encoding="utf-8")
    opened.clear()
    assert pipelines.generate.main(arguments) == 0
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == rows
    assert [len(question.turns) for question in opened] == [3]
    assert assistant.template.name == "v1"


@pytest.mark.parametrize("text", ["0.png\n", "", "0.png\nIs it?\n1.png\n"])
def test_a_list_without_its_questions_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="expected pairs of lines"):
        read_questions(tmp_path / "list.txt", tmp_path)
