"""A file of answers is gone on with: nothing asked twice, nothing lost, nothing mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pipelines.generate
import pipelines.train
from lapilli.data.errors import DataError
from lapilli.train.inference.assistant import Assistant, Question
from tests.factories import image_bytes
from tests.pipelines.test_train import RECIPE
from tests.train.small_run import small_dataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    dataset = small_dataset(folder, images=8, text_only=4)
    (folder / "run.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [f"--config={folder / 'run.yaml'}", f"--dataset={dataset}", "--launcher=process"]
    assert pipelines.train.main([*arguments, f"--output={folder / 'run'}", "--max_steps=1"]) == 0
    return folder / "run"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the questions that are asked; one called `stop` ends the process's work."""
    asked: list[str] = []
    answer = Assistant.answer

    def counting(self: Assistant, questions: list[Question], *rest: Any, **more: Any) -> list[str]:
        if any(question.name == "stop" for question in questions):
            raise KeyboardInterrupt
        asked.extend(question.name for question in questions)
        return answer(self, questions, *rest, **more)

    monkeypatch.setattr(Assistant, "answer", counting)
    return asked


def ask(model: Path, folder: Path, ids: list[Any], **flags: Any) -> list[dict[str, Any]]:
    """Ask a question an id, with an image where the id is a number, and read the output."""
    rows: list[dict[str, Any]] = []
    for number in ids:
        rows.append({"question_id": number, "text": "What is this?"})
        if isinstance(number, int):
            (folder / f"{number}.png").write_bytes(image_bytes("png", 40, 30, seed=number))
            rows[-1]["image"] = f"{number}.png"
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {
        "questions": folder / "q.jsonl", "images": folder, "output": folder / "a.jsonl",
        "batch": 2, "device": "cpu", "decoding.max_new_tokens": 4, **flags,
    }  # fmt: skip
    pipelines.generate.main([str(model), *(f"--{name}={value}" for name, value in given.items())])
    return read(folder)


def read(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_an_interrupted_call_goes_on_and_writes_the_same(
    trained: Path, tmp_path: Path, counted: list[str]
) -> None:
    (tmp_path / "whole").mkdir()
    whole = ask(trained, tmp_path / "whole", [0, 1, 2, 3, "text", "text"])
    counted.clear()
    with pytest.raises(KeyboardInterrupt):
        ask(trained, tmp_path, [0, 1, 2, 3, "stop"])
    assert [row["question_id"] for row in read(tmp_path)] == [0, 1, 2, 3]
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question_id": "tex')  # the machine went down here
    assert ask(trained, tmp_path, [0, 1, 2, 3, "text", "text"]) == whole
    assert len(counted) == 6  # four before, the two equal ones after
    assert len(ask(trained, tmp_path, [0, 1, 2, 3, "text", "text"])) == 6
    assert len(counted) == 6
    assert whole[0]["model_id"] == "run/step-1"


def test_answers_of_another_kind_are_not_mixed(trained: Path, tmp_path: Path) -> None:
    before = ask(trained, tmp_path, [0, "text"])
    with pytest.raises(DataError, match=r"metadata .*'max_new_tokens': 4.*choose another file"):
        ask(trained, tmp_path, [0, "text"], **{"decoding.max_new_tokens": 5})
    with pytest.raises(DataError, match='answers question "text", which is not asked now'):
        ask(trained, tmp_path, [0])
    moved = trained.with_name("moved")
    moved.symlink_to(trained)
    assert ask(moved, tmp_path, [0, "text"]) == before  # the same run by another name
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1 is no answer"):
        ask(trained, tmp_path, [0])
    (tmp_path / "a.jsonl").write_text("notes", encoding="utf-8")
    with pytest.raises(DataError, match="is no file of answers"):
        ask(trained, tmp_path, [0])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == "notes"
