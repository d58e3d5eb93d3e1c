"""Score a model, or the answers of a file, by tasks of lmms-eval."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from lapilli.data.io.access import is_folder
from lapilli.data.io.atomic import write_json, write_text
from lapilli.data.io.writer_lock import only_writer
from lapilli.model.interop.foreign import kind_of
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import open_assistant
from lapilli.train.scoring.responses import Response
from pipelines.cli.command import say
from pipelines.cli.settings import EvaluateConfig, ServeConfig
from pipelines.lmms_eval.harness import (
    LOG,
    HarnessRequest,
    TaskScores,
    require_environment,
    with_harness,
)
from pipelines.serving.background import in_background

__all__ = ["answers_by_task", "evaluate_tasks", "say_metrics"]

# Settings of `evaluate` that have a meaning with tasks of lmms-eval.
TAKEN = frozenset(
    {"run", "view", "device", "output", "template", "batch", "lmms_eval", "through",
     "include_path", "limit", "trust_remote_code", "allow_pickle", "allow_code"}
)  # fmt: skip
MOST_AT_ONCE = 32  # requests to the server
NAME = "lapilli"  # lmms-eval takes names with o1 or o3 in them for models of other settings


def evaluate_tasks(config: EvaluateConfig) -> TaskScores:
    """Score a model by tasks; `output` becomes a folder of results and samples.

    An export in transformers' form is loaded by lmms-eval's own class; anything else is served on
    a port of this machine and asked by lmms-eval's client. `through` decides otherwise.

    Raises:
        TrainError: A setting without a meaning here, or as `with_harness`.
        DataError, ModelError: The model cannot be opened, or the output not be written.
    """
    _check(config)
    request = HarnessRequest(
        tasks=tuple(_names(config.lmms_eval)),
        include_path=str(Path(config.include_path).absolute()) if config.include_path else "",
        limit=config.limit,
    )
    require_environment()
    if not config.output:
        with tempfile.TemporaryDirectory() as folder:
            return _asked(config, request, Path(folder))
    output = Path(config.output)
    with only_writer(output, "written"):
        found = _asked(config, request, output)
        _write(output, config, found)
    return found


def answers_by_task(responses: Sequence[Response], tasks: str, include_path: str) -> TaskScores:
    """The scores that lmms-eval gives to answers.

    Args:
        responses: Answers, by the ids that the task's questions have.
        tasks: Names, separated by commas.
        include_path: A folder of tasks; empty for none.

    Raises:
        TrainError: A question without an answer, and as `with_harness`.
    """
    request = HarnessRequest(
        tasks=tuple(_names(tasks)),
        include_path=str(Path(include_path).absolute()) if include_path else "",
        answers={str(one.question_id): one.given for one in responses},
    )
    with tempfile.TemporaryDirectory() as folder:
        return with_harness(request, Path(folder))


def say_metrics(found: TaskScores) -> None:
    """Print a line a task."""
    for task, metrics in found.metrics.items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        samples = found.samples.get(task)
        over = f", over {len(samples)} questions" if samples else ""
        say(f"{task}: {shown or 'no metric; its server has the truth'}{over}")


def _check(config: EvaluateConfig) -> None:
    for one in fields(config):
        default = one.default if one.name != "truth_patterns" else {}
        if one.name not in TAKEN and getattr(config, one.name) != default:
            raise TrainError(
                f"{one.name}: {getattr(config, one.name)} means nothing to lmms_eval, whose tasks "
                "have questions and metrics of their own; leave one of the two out"
            )
    if min(config.batch, config.limit + 1) < 1:
        raise TrainError(
            f"batch: {config.batch}, limit: {config.limit}; expected batch from 1, limit from 0"
        )
    if config.output and Path(config.output).exists() and not is_folder(Path(config.output)):
        raise TrainError(f"output: {config.output} is a file; lmms_eval writes a folder")


def _names(tasks: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise TrainError(f"lmms_eval: {tasks!r}; expected names of tasks, separated by commas")
    return names


def _asked(config: EvaluateConfig, request: HarnessRequest, folder: Path) -> TaskScores:
    with _model(config, request) as filled:
        say(f"lmms-eval asks by its class {filled.model}; its own output: {folder / LOG}")
        return with_harness(filled, folder)


@contextmanager
def _model(config: EvaluateConfig, request: HarnessRequest) -> Generator[HarnessRequest]:
    """The request with lmms-eval's class of the model and its arguments."""
    folder = Path(config.run).absolute()
    is_hf = kind_of(folder) == "hf"
    if config.through == "hf" and not is_hf:
        raise TrainError(
            f"through: hf, and {config.run} is no export in transformers' form; run lapilli export "
            "with --to hf, or leave --through out"
        )
    device = choose_device(config.device, visible_devices())
    if config.through == "hf" or (config.through == "auto" and is_hf and device != "hpu"):
        name = "cuda:0" if device == "cuda" else device
        arguments = {"pretrained": str(folder), "device_map": name}
        yield replace(request, model="llava_hf", model_args=arguments, device=name)
        return
    assistant = open_assistant(
        folder, torch_device(device), config.trust, template=config.template, view=config.view
    )
    at_once = min(config.batch, MOST_AT_ONCE)
    serve = ServeConfig(model=config.run, port=0, name=NAME, batch=at_once)
    with in_background(assistant, serve) as port:
        arguments = {
            "model": NAME,
            "base_url": f"http://127.0.0.1:{port}/v1",
            "api_key": "none",
            "num_concurrent": at_once,
            "max_retries": 1,
            "httpx_trust_env": False,
        }
        yield replace(request, model="openai", model_args=arguments)


def _write(output: Path, config: EvaluateConfig, found: TaskScores) -> None:
    for task, samples in found.samples.items():
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
        write_text(output / f"{task}.jsonl", lines)
    write_json(
        output / "results.json",
        {
            "lmms_eval": found.version,
            "model": config.run,
            "limit": config.limit,
            "metrics": found.metrics,
            "questions": {task: len(samples) for task, samples in found.samples.items()},
        },
    )
    say(f"results and samples: {output}")
