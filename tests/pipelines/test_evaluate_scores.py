"""`evaluate` and `score`: choices, turns, several workers, a run's own held-out records, a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pipelines.evaluate
import pipelines.score
import pipelines.train
from lapilli.data.config import MixtureConfig
from tests.factories import build_dataset, conversation, image_bytes, make_mixture, make_tokenizer
from tests.pipelines.test_train import RECIPE, one_line
from tests.train.small_run import VIEW

TURNS = 3  # questions of each record


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on records of three questions, answered Y or N at first; two held out."""
    folder = tmp_path_factory.mktemp("scored")
    mixture = make_mixture(folder / "raw", images=2, text_only=0)
    records: list[dict[str, Any]] = []
    for number in range(8):
        kind = "whole_normal" if number % 2 else "lower_leg"
        key = f"icm/{kind}_{number}.png"
        (folder / "raw" / "icm").mkdir(exist_ok=True)
        (folder / "raw" / key).write_bytes(image_bytes("png", 40, 30, seed=number))
        record = conversation(f"r{number}", key, turns=TURNS, seed=number)
        record["conversations"][1]["value"] = "NY"[kind == "lower_leg"]
        records.append(record)
    (folder / "raw" / "mixture.json").write_text(json.dumps(records), encoding="utf-8")
    build_dataset(
        mixture,
        folder / "data",
        make_tokenizer(folder / "tokenizer"),
        mixture=MixtureConfig(held_out=2),
    )
    (folder / "run.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [f"--config={folder / 'run.yaml'}", f"--dataset={folder / 'data'}"]
    flags = [
        "--launcher=process",
        f"--output={folder / 'run'}",
        "--max_steps=1",
        "--global_batch_size=4",
    ]
    assert pipelines.train.main([*arguments, *flags]) == 0
    return folder


def evaluated(trained: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    arguments = [f"--run={trained / 'run'}", f"--output={output}", "--device=cpu"]
    if not any(flag.startswith("--dataset") for flag in flags):
        arguments += [f"--dataset={trained / 'data'}", f"--view={VIEW}", "--split=train"]
    assert pipelines.evaluate.main([*arguments, *flags]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("ray_local")
def test_workers_give_the_answers_of_one(trained: Path, tmp_path: Path) -> None:
    flags = ["--turns=all", "--batch=4", "--choices=Y,N", "--truth_patterns={N: normal}"]
    alone = evaluated(trained, tmp_path / "1.jsonl", *flags)
    several = evaluated(trained, tmp_path / "2.jsonl", *flags, "--num_workers=2")
    assert len(alone) == 6 * TURNS
    assert several == alone  # logits to the last bit
    texts = [
        evaluated(trained, tmp_path / "3.jsonl", "--batch=4", f"--num_workers={n}") for n in (1, 2)
    ]
    assert texts[0] == texts[1]


def test_every_question_of_a_record_or_its_last(trained: Path, tmp_path: Path) -> None:
    asked = {
        f"made_up/{record['id']}": [turn["value"] for turn in record["conversations"]]
        for record in json.loads((trained / "raw" / "mixture.json").read_text(encoding="utf-8"))
    }
    rows = evaluated(trained, tmp_path / "a.jsonl", "--turns=all")
    assert [(row["index"], row["turn"]) for row in rows] == [
        (index, turn) for index in range(6) for turn in range(TURNS)
    ]
    for row in rows:
        said = asked[row["sample_id"]]
        assert row["question"] == said[2 * row["turn"]].replace("<image>\n", "")
        assert row["expected"] == said[2 * row["turn"] + 1]
    last = evaluated(trained, tmp_path / "b.jsonl", "--turns=last")
    assert last == [row for row in rows if row["turn"] == TURNS - 1]


def test_a_runs_own_held_out_records(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluated(trained, tmp_path / "a.jsonl", "--dataset=")
    assert [row["split"] for row in rows] == ["held_out"] * 2
    assert "was not trained on" in " ".join(capsys.readouterr().out.split())


SEXY = ["--choices=Y,N", "--truth_patterns={N: normal}", "--category_pattern=^(.+)_"]


def test_choices_are_scored_by_file_names_and_shown(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    rows = evaluated(trained, tmp_path / "a.jsonl", *SEXY, "--threshold=0", f"--html={page}")
    said = capsys.readouterr().out
    assert {row["given"] for row in rows} == {"Y"}  # every share is at least 0
    assert all(row["image"].endswith(".png") for row in rows)
    normal = sum("normal" in row["image"] for row in rows)
    share = (6 - normal) / 6
    assert f"logits: accuracy {share:.4f}" in said
    assert f"tp {6 - normal}, fp {normal}, tn 0, fn 0" in said
    assert "lower_leg" in said
    html = page.read_text(encoding="utf-8")
    assert html.count("data:image/png") == normal
    assert "Confusion" in html
    # another threshold needs no model
    again = tmp_path / "again.json"
    flags = ["--threshold=1", "--truth_patterns={N: normal}", f"--output={again}"]
    assert pipelines.score.main([str(tmp_path / "a.jsonl"), *flags]) == 0
    (table,) = json.loads(again.read_text(encoding="utf-8"))
    assert table["metrics"]["tn"] == normal
    assert table["metrics"]["tp"] == 0


def test_an_answers_file_is_scored_shown_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, truth = tmp_path / "a.jsonl", tmp_path / "truth.jsonl"
    lines = [
        {"question_id": 1, "prompt": "Is there a dog?", "text": "Yes.", "model_id": "m"},
        {"question_id": 2, "prompt": "Is there a cat?", "text": "Yes.", "model_id": "m"},
    ]
    labels = [{"question_id": n, "label": w, "image": "p.png"} for n, w in ((1, "yes"), (2, "no"))]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    truth.write_text("".join(json.dumps(line) + "\n" for line in labels), encoding="utf-8")
    (tmp_path / "p.png").write_bytes(image_bytes("png"))
    page, sent = tmp_path / "page.html", tmp_path / "gqa.json"
    flags = [f"--truth={truth}", "--scorers=yes_no,exact", f"--html={page}", f"--images={tmp_path}"]
    flags += ["--upload=gqa", f"--upload_file={sent}"]
    assert pipelines.score.main([f"--answers={answers}", *flags]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "yes_no: accuracy 0.5000, precision 0.5000, recall 1.0000, f1 0.6667" in said
    assert "exact: accuracy 0.5000, over 2 questions" in said
    assert page.read_text(encoding="utf-8").count("data:image/png") == 2  # one a scorer
    assert json.loads(sent.read_text())[0] == {"questionId": 1, "prediction": "yes"}
    line = one_line(pipelines.score.main, [str(answers), "--scorers=yes_no"], capsys)
    assert "scorers: yes_no is for questions whose expected answer begins with yes or no" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--threshold=1.5"], "threshold: 1.5; expected a share from 0 to 1"),
        (["--choices=Y"], "choices: 'Y'; expected two or more"),
        (["--choices=Y,Incomprehensible"], "choices: 'Incomprehensible' is"),
        (["--scorers=bleu"], "scorers: 'bleu'; expected some of"),
        (["--category_pattern=("], "category_pattern: '(' is no regular expression"),
        (["--num_workers=0"], "num_workers: 0"),
        (["--scorers=vqa"], "scorers: vqa is for questions with 10 expected answers"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    trained: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--run={trained / 'run'}", f"--dataset={trained / 'data'}", f"--view={VIEW}"]
    assert words in one_line(pipelines.evaluate.main, [*arguments, "--device=cpu", *flags], capsys)


@pytest.mark.usefixtures("ray_local")
def test_more_workers_than_cores_and_a_workers_mistake_are_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--run={trained / 'run'}", f"--dataset={trained / 'data'}", f"--view={VIEW}"]
    arguments += ["--device=cpu"]
    line = one_line(pipelines.evaluate.main, [*arguments, "--num_workers=3"], capsys)
    assert "num_workers: 3; Ray has 2 cores" in line
    flags = ["--num_workers=2", "--choices=Y,Incomprehensible"]
    line = one_line(pipelines.evaluate.main, [*arguments, *flags], capsys)
    assert "choices: 'Incomprehensible' is" in line
