"""`--lmms_eval` without lmms-eval: what is refused, what its runner says, its samples scored."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import pipelines.evaluate
import pipelines.score
from lapilli.data.errors import DataError
from lapilli.train.errors import TrainError
from lapilli.train.scoring.answers_file import read_answers
from pipelines.lmms_eval import runner
from pipelines.lmms_eval.environment import REQUIREMENTS, interpreter, make_environment
from pipelines.lmms_eval.harness import FAILED, HarnessRequest, TaskScores, with_harness

SAMPLE = {"doc_id": 0, "target": "red", "filtered_resps": "Red.", "input": "What colour?"}


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose interpreter writes what lies in the file that this gives."""
    monkeypatch.setenv("LAPILLI_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setattr("pipelines.lmms_eval.environment._install", lambda *_: None)
    python = make_environment(REQUIREMENTS, tmp_path)
    python.unlink()
    python.write_text(f'#!/bin/sh\necho "its words"\ncp {tmp_path}/said.json "$3"\n')
    python.chmod(0o755)
    return tmp_path / "said.json"


def found(said: Path, value: Any) -> TaskScores:
    said.write_text(json.dumps(value), encoding="utf-8")
    return with_harness(HarnessRequest(tasks=("pope",)), said.parent)


def test_an_environment_that_is_not_made_is_one_line_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAPILLI_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(TrainError, match=r"run python -m pipelines.lmms_eval.environment") as said:
        pipelines.evaluate.main(["--run=nowhere", "--lmms_eval=pope"])
    assert "\n" not in str(said.value)


def test_an_install_that_fails_leaves_nothing_that_looks_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "gone.txt"
    requirements.write_text("no-such-package-of-anyone==0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TrainError, match=r"gone-\w+ cannot be installed; pip says: .*no-such-pa"):
        make_environment(requirements, tmp_path)
    assert interpreter(requirements, tmp_path) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"missing": {"pop": ["pope", "pope_adv"]}}, "'pop' is no task .*; near: pope, pope_adv;"),
        ({"missing": {"xyz": []}}, r"'xyz' is no task of lmms-eval [\d.]+; expected"),
        ({"results": {}, "errors": ["Error in generating"]}, "1 errors, first: Error in generat"),
        (
            {"samples": {"pope": [{**SAMPLE, "filtered_resps": f"{FAILED} after 1] 503"}]}},
            r"1 questions got no answer, first: \[LMMS_EVAL_REQUEST_FAILED after 1\] 503",
        ),
        ({"results": 3}, "its result is of another form"),
    ],
)
def test_what_it_could_not_do_is_one_line(answering: Path, value: Any, words: str) -> None:
    with pytest.raises(TrainError, match=words) as said:
        found(answering, value)
    assert "\n" not in str(said.value)


def test_its_end_without_a_result_shows_its_last_words(answering: Path) -> None:
    with pytest.raises(TrainError, match=r"it ended with 1: .*said\.json"):
        with_harness(HarnessRequest(tasks=("pope",)), answering.parent)


def test_metrics_are_its_numbers_by_their_names(answering: Path) -> None:
    result = {"results": {"pope": {"alias": "pope", "pope_accuracy,none": 0.5, "n,none": "N/A"}},
              "samples": {"pope": [SAMPLE]}, "errors": []}  # fmt: skip
    answered = found(answering, result)
    assert answered.metrics == {"pope": {"pope_accuracy": 0.5}}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset=d"], "dataset: d means nothing to lmms_eval"),
        (["--scorers=exact"], "scorers: exact means nothing"),
        (["--num_workers=2"], "num_workers: 2 means nothing"),
        (["--limit=-1"], "limit: -1; expected"),
        (["--batch=0"], "batch: 0, "),
        (["--include_path=nowhere"], "include_path: .*nowhere is no folder"),
        (["--through=hf"], "through: hf, and .* is no export in transformers' form"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    answering: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    answering.write_text("{}")
    run = tmp_path / "model"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model_type": "llava"}))
    if "--through=hf" in flags:
        (run / "config.json").unlink()
    with pytest.raises(TrainError, match=words):
        pipelines.evaluate.main([f"--run={run}", "--lmms_eval=pope", "--device=cpu", *flags])


def test_names_and_its_settings_belong_together() -> None:
    with pytest.raises(TrainError, match="names of tasks, separated by commas"):
        pipelines.evaluate.main(["--run=r", "--lmms_eval=pope,,mme"])
    with pytest.raises(TrainError, match="are for --lmms_eval"):
        pipelines.evaluate.main(["--run=r", "--limit=4"])


def test_our_scorers_read_its_samples(tmp_path: Path) -> None:
    path = tmp_path / "pope.jsonl"
    more = {"doc_id": 1, "target": "['a dog', 'dog']", "filtered_resps": "dog", "question_id": "7"}
    path.write_text("".join(json.dumps(one) + "\n" for one in (SAMPLE, more)), encoding="utf-8")
    responses = read_answers(path)
    assert [one.question_id for one in responses] == ["0", "7"]
    assert responses[1].expected == ("a dog", "dog")
    output = tmp_path / "scores.json"
    assert pipelines.score.main([str(path), "--scorers=exact", f"--output={output}"]) == 0
    assert json.loads(output.read_text())[0]["metrics"]["accuracy"] == 1.0
    path.write_text(json.dumps({**SAMPLE, "filtered_resps": [[-1.5, False]]}), encoding="utf-8")
    with pytest.raises(DataError, match="line 1 is no answer"):  # likelihoods
        read_answers(path)


def test_answers_of_a_file_are_found_by_the_questions_own_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = types.ModuleType("lmms_eval.api.model")
    module.lmms = type("lmms", (), {})
    monkeypatch.setitem(sys.modules, "lmms_eval", types.ModuleType("lmms_eval"))
    monkeypatch.setitem(sys.modules, "lmms_eval.api", types.ModuleType("lmms_eval.api"))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", module)
    model = runner.given({"q7": "yes", "1": "no"})
    model.task_dict = {"t": {"test": [{"question_id": "q7"}, {}, {"id": "x"}]}}
    asked = [types.SimpleNamespace(args=("", {}, None, n, "t", "test")) for n in range(3)]
    assert model.generate_until(asked[:2]) == ["yes", "no"]
    with pytest.raises(KeyError, match="none to question x of t"):
        model.generate_until(asked)


def test_a_sample_is_written_as_lmms_eval_writes_it() -> None:
    sample = {
        "doc_id": 3, "doc": {"questionId": 12}, "target": ["a", "b"], "arguments": [["Who?", {}]],
        "resps": [[" a"]], "filtered_resps": ["a"], "exact_match": 1.0,
    }  # fmt: skip
    assert runner.row(sample) == {
        "doc_id": 3, "question_id": "12", "target": "['a', 'b']", "input": "Who?", "resps": " a",
        "filtered_resps": "a", "exact_match": 1.0,
    }  # fmt: skip
