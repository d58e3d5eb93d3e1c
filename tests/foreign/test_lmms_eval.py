"""One model, three ways to its answers: our own, lmms-eval's class, its OpenAI client.

A YAML task over a local JSON, the hub offline. The table is kept in `README.md` beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pipelines.evaluate
import pipelines.generate
import pipelines.score
from lapilli.train.errors import TrainError
from pipelines.lmms_eval.environment import REQUIREMENTS, make_environment
from pipelines.lmms_eval.harness import version
from tests.foreign.environments import READERS, ROOT
from tests.foreign.trained_runs import TOKENS, Forms

pytestmark = [pytest.mark.readers, pytest.mark.timeout(600)]

TABLE = ROOT / "outputs" / "lmms_eval.md"
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: made_up_vqa
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: submission, aggregation: !function utils.hand_in, higher_is_better: true}}
"""
FUNCTIONS = """
import json
from PIL import Image
from lmms_eval.tasks._task_utils.file_utils import generate_submission_file

def results(doc, found):
    is_right = found[0].strip() == doc["answer"]
    return {"exact_match": float(is_right), "submission": {"id": doc["question_id"]}}

def hand_in(rows, args):  # as tasks whose truth a server has
    with open(generate_submission_file("made_up.json", args), "w") as file:
        json.dump(rows, file)

def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]
"""
TEXTS = (
    "What colour is the goat?", "Which?", "What is this, in a word or two?",
    "Is it red or is it blue, and why do you think so?", "Who?", "What colour is the cat?",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A run, its export, our own answers by question, and the task's folder."""

    folder: Path
    run: Path
    export: Path
    answers: Path
    ours: dict[str, str]
    tasks: Path


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Generator[Asked]:
    """Half of the questions expect what the model says."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    forms = Forms(folder / "forms")
    run = forms.run("whole")
    export = forms.export(run, "hf", "exported")
    questions = [
        {"question_id": f"q{n}", "text": text, "image": f"photo{n % 3}.png"}
        for n, text in enumerate(TEXTS)
    ]
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    answers = folder / "ours.jsonl"
    arguments = [f"--questions={rows}", f"--images={forms.folder}", f"--output={answers}"]
    decoding = f"--decoding.max_new_tokens={TOKENS}"
    assert pipelines.generate.main([str(run), *arguments, decoding, "--device=cpu"]) == 0
    said = {one["question_id"]: one["text"] for one in map(json.loads, answers.open())}
    assert len({*said.values()}) > 1  # answers that tell questions apart
    data, tasks = folder / "questions.json", folder / "tasks"
    tasks.mkdir()
    docs: list[dict[str, str]] = []
    for number, one in enumerate(questions):
        answer = said[one["question_id"]].strip() if number % 2 else "neither"
        docs.append({**one, "image": str(forms.folder / one["image"]), "answer": answer})
    data.write_text(json.dumps(docs), encoding="utf-8")
    (tasks / "utils.py").write_text(FUNCTIONS, encoding="utf-8")
    (tasks / "task.yaml").write_text(TASK.format(data=data, tokens=TOKENS), encoding="utf-8")
    make_environment(REQUIREMENTS, READERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAPILLI_ENVIRONMENTS", str(READERS))
        patch.setenv("HF_HOME", str(folder / "hub"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield Asked(folder, run, export, answers, said, tasks)


def samples(path: Path) -> dict[str, str]:
    return {
        one["question_id"]: one["filtered_resps"]
        for one in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    }


def test_three_ways_give_the_same_answers_and_scores(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ["| way | answers as ours | exact_match |", "|---|---|---|"]
    for way, model in (("hf", asked.export), ("serve", asked.run)):
        output = asked.folder / way  # `auto` takes the way by what the folder is
        arguments = [f"--run={model}", "--lmms_eval=made_up_vqa", f"--output={output}"]
        more = [f"--include_path={asked.tasks}", "--device=cpu"]
        assert pipelines.evaluate.main([*arguments, *more]) == 0
        said = " ".join(capsys.readouterr().out.split())
        name = {"hf": "llava_hf", "serve": "openai"}[way]
        assert f"by its class {name};" in said
        found = samples(output / "made_up_vqa.jsonl")
        theirs = {name: text.strip() for name, text in found.items()}
        assert theirs == {name: text.strip() for name, text in asked.ours.items()}
        results = json.loads((output / "results.json").read_text())
        assert results["lmms_eval"] == version()
        assert results["metrics"]["made_up_vqa"]["exact_match"] == 0.5
        handed_in = json.loads((output / "submissions" / "made_up.json").read_text())
        assert {one["id"] for one in handed_in} == {*asked.ours}
        table.append(f"| `{name}` | {len(theirs)} of {len(TEXTS)} | 0.5 |")
        scores = asked.folder / f"{way}.json"  # the same line in our scorer
        arguments = [str(output / "made_up_vqa.jsonl"), f"--output={scores}"]
        assert pipelines.score.main([*arguments, "--scorers=exact"]) == 0
        assert json.loads(scores.read_text())[0]["metrics"]["accuracy"] == 0.5
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(table) + "\n", encoding="utf-8")


def test_lmms_eval_scores_our_answers(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--lmms_eval=made_up_vqa", f"--include_path={asked.tasks}"]
    assert pipelines.score.main([str(asked.answers), *task]) == 0
    assert "exact_match 0.5000" in capsys.readouterr().out


def test_a_task_that_it_does_not_have_is_one_line_with_near_names(asked: Asked) -> None:
    task = ["--lmms_eval=made_up_vqb,pope", f"--include_path={asked.tasks}"]
    with pytest.raises(TrainError, match=r"'made_up_vqb' is no task .*near: made_up_vqa") as found:
        pipelines.score.main([str(asked.answers), *task])
    assert "\n" not in str(found.value)
