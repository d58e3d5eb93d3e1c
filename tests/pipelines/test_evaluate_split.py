"""`python -m pipelines.evaluate`: which questions are asked, and whether they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pipelines.evaluate
import pipelines.train
from lapilli.data.config import MixtureConfig
from pipelines.cli.command import run
from pipelines.cli.settings import EvaluateConfig
from pipelines.evaluate import evaluate_once
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.pipelines.test_train import RECIPE
from tests.train.small_run import VIEW, small_dataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, on a dataset that holds two of its ten records out."""
    folder = tmp_path_factory.mktemp("split")
    mixture = make_mixture(folder / "raw", images=8, text_only=2)
    build_dataset(
        mixture,
        folder / "data",
        make_tokenizer(folder / "tokenizer"),
        mixture=MixtureConfig(held_out=2),
    )
    (folder / "run.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [f"--config={folder / 'run.yaml'}", f"--dataset={folder / 'data'}"]
    flags = ["--launcher=process", f"--output={folder / 'run'}", "--max_steps=1"]
    assert pipelines.train.main([*arguments, *flags]) == 0
    return folder


def evaluated(
    trained: Path, dataset: Path, output: Path, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[list[dict[str, Any]], str]:
    """The rows of the output, and what was said."""
    capsys.readouterr()
    arguments = [f"--run={trained / 'run'}", f"--dataset={dataset}", f"--view={VIEW}"]
    assert pipelines.evaluate.main([*arguments, f"--output={output}", "--device=cpu", *flags]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return rows, " ".join(capsys.readouterr().out.split())


def test_what_is_held_out_is_asked_where_there_is_any(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = trained / "data", tmp_path / "a.jsonl"
    rows, said = evaluated(trained, data, output, capsys)
    assert [(row["split"], row["trained_on"]) for row in rows] == [("held_out", False)] * 2
    assert "split held_out" in said
    assert "was not trained on" in said
    rest, said = evaluated(trained, data, output, capsys, "--split=train")
    assert [(row["split"], row["trained_on"]) for row in rest] == [("train", True)] * 8
    assert "split train" in said
    assert "the run was trained on them" in said
    assert not {row["sample_id"] for row in rows} & {row["sample_id"] for row in rest}
    asked = {
        f"made_up/{record['id']}": record["conversations"][0]["value"].replace("<image>\n", "")
        for record in json.loads((trained / "raw" / "mixture.json").read_text(encoding="utf-8"))
    }
    for row in (*rows, *rest):
        assert row["question"] == asked[row["sample_id"]]


def test_another_dataset_was_not_trained_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_dataset(tmp_path, images=3, text_only=1)
    rows, said = evaluated(trained, other, tmp_path / "a.jsonl", capsys)
    assert [(row["split"], row["trained_on"]) for row in rows] == [("train", False)] * 4
    assert "was not trained on" in said


def test_a_split_that_is_not_there_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small_dataset(tmp_path, images=3, text_only=1)
    flags = [f"--run={trained / 'run'}", f"--dataset={other}", f"--view={VIEW}", "--device=cpu"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(lambda: pipelines.evaluate.main([*flags, "--split=held_out"]))
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert f"split: {other} holds nothing out" in said


def test_answers_of_another_split_are_not_reused(trained: Path, tmp_path: Path) -> None:
    def ask(split: Any) -> int:
        config = EvaluateConfig(
            str(trained / "run"),
            str(trained / "data"),
            VIEW,
            split,
            "cpu",
            output=str(tmp_path / "a.jsonl"),
        )
        return len(evaluate_once(config))

    assert [ask("auto"), ask("held_out"), ask("train"), ask("auto")] == [2, 2, 8, 2]
