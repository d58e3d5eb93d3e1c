"""Run lmms-eval's tasks: `runner.py REQUEST RESULT`, two JSON files.

The interpreter of lmms-eval's own environment runs this file, so that it imports nothing of this
project. A request and a result are described in `harness.py`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

NAMES = ("question_id", "questionId", "id", "index")  # what benchmarks call a question's name
NEAR = 3


def name_of(doc: dict[str, Any], number: int) -> str:
    """A question's name in its data, else its number."""
    return next((str(doc[name]) for name in NAMES if doc.get(name) is not None), str(number))


def given(answers: dict[str, str]) -> Any:
    """A model that gives the answers of a file."""
    api: Any = importlib.import_module("lmms_eval.api.model")

    class AnswersOfFile(api.lmms):
        """Looks an answer up by the name of its question."""

        is_simple = True

        def generate_until(self, requests: list[Any]) -> list[str]:
            """The answers of a task's questions."""
            found: list[str] = []
            for request in requests:
                _, _, _, number, task, split = request.args
                name = name_of(self.task_dict[task][split][number], number)
                if name not in answers:
                    raise KeyError(f"answers: none to question {name} of {task}")
                found.append(answers[name])
            return found

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            """No answer has it."""
            raise NotImplementedError("answers: this task scores likelihoods, not texts")

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            """No answers file has it."""
            raise NotImplementedError("answers: this task asks in rounds")

    return AnswersOfFile()


def model_of(request: dict[str, Any]) -> Any:
    """The model of a request; made here, for a text of arguments cannot hold any path."""
    if request["answers"] is not None:
        return given(request["answers"])
    models: Any = importlib.import_module("lmms_eval.models")
    kind = models.get_model(request["model"], False)
    return kind(**request["model_args"], device=request["device"], batch_size=1)


def one(value: Any) -> Any:
    """The element of lists of one, as lmms-eval's files have it."""
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return value


def row(sample: dict[str, Any]) -> dict[str, Any]:
    """A line of lmms-eval's samples, and the question's name."""
    doc: dict[str, Any] = sample.pop("doc", None) or {}
    arguments = sample.pop("arguments", None) or [""]
    responses = one(sample.pop("resps", None))
    first = arguments[0]
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return {
        **sample,
        "question_id": name_of(doc, sample["doc_id"]),
        "target": str(sample.get("target", "")),
        "resps": responses,
        "filtered_resps": one(sample["filtered_resps"]),
        "input": first,
    }


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The result of a request."""
    loguru: Any = importlib.import_module("loguru")
    tasks: Any = importlib.import_module("lmms_eval.tasks")
    evaluator: Any = importlib.import_module("lmms_eval.evaluator")
    loguru.logger.remove()
    loguru.logger.add(sys.stderr, level="INFO")
    errors: list[str] = []  # a model's class logs an error and gives an empty answer
    loguru.logger.add(lambda message: errors.append(message.record["message"]), level="ERROR")
    manager = tasks.TaskManager(
        "WARNING", include_path=request["include_path"] or None, model_name=request["model"]
    )
    known = {*manager.all_tasks}
    missing = [name for name in request["tasks"] if name not in known]
    if missing:
        return {"missing": {name: difflib.get_close_matches(name, known, NEAR) for name in missing}}
    command: Any = importlib.import_module("lmms_eval.__main__")
    # tasks read arguments of its command: where files for a server go, tags that are cut out
    sys.argv = ["lmms_eval", "--output_path", request["output"]]
    _, arguments = command.parse_eval_args()
    found = evaluator.simple_evaluate(
        model=model_of(request),
        tasks=request["tasks"],
        batch_size=1,
        limit=request["limit"] or None,
        log_samples=True,
        task_manager=manager,
        cli_args=arguments,
    )
    samples = {task: [row(sample) for sample in some] for task, some in found["samples"].items()}
    return {"results": found["results"], "samples": samples, "errors": errors}


def main() -> None:
    """Entry point."""
    request, result = map(Path, sys.argv[1:])
    found = run(json.loads(request.read_text(encoding="utf-8")))
    text = json.dumps(found, ensure_ascii=False, default=str)
    result.write_text(text, encoding="utf-8")
    sys.stderr.flush()
    os._exit(0)  # threads of its clients may not end


if __name__ == "__main__":
    main()
