"""Ask lmms-eval, in its environment, to score a model or the answers of a file."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.record import excerpt
from lapilli.train.errors import TrainError
from pipelines.lmms_eval.environment import MAKE, REQUIREMENTS, environments, interpreter

__all__ = [
    "FAILED",
    "LOG",
    "HarnessRequest",
    "TaskScores",
    "require_environment",
    "version",
    "with_harness",
]

LOG = "lmms_eval.log"
RUNNER = Path(__file__).with_name("runner.py")
# Of an environment around this one: other packages, and a process of several.
FOREIGN = frozenset(
    {"PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
LARGEST_RESULT = 1 << 30  # bytes
FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # what its client gives in an answer's place


@dataclass(frozen=True)
class HarnessRequest:
    """What `runner.py` is asked.

    Attributes:
        tasks: Names of tasks, groups or tags.
        model: lmms-eval's name of a model class.
        model_args: Its arguments.
        device: torch's name of a device.
        include_path: A folder of tasks beside lmms-eval's own; empty for none.
        limit: Questions a task; 0 for all.
        answers: By question, in place of a model's; None for a model.
    """

    tasks: tuple[str, ...]
    model: str = ""
    model_args: Mapping[str, Any] | None = None
    device: str = "cpu"
    include_path: str = ""
    limit: int = 0
    answers: Mapping[str, str] | None = None


@dataclass(frozen=True)
class TaskScores:
    """What lmms-eval found.

    Attributes:
        version: Of lmms-eval.
        metrics: By task, then by metric (`exact_match`), as lmms-eval scales them.
        samples: Lines of its samples file by task, with `question_id`.
    """

    version: str
    metrics: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]]


class _Result(TypedDict, total=False):
    missing: dict[str, list[str]]
    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    errors: list[str]


def version() -> str:
    """The version of lmms-eval that its requirements pin."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("lmms-eval=="))


def require_environment() -> Path:
    """The interpreter of lmms-eval's environment.

    Raises:
        TrainError: It is not made; says the command.
    """
    python = interpreter(REQUIREMENTS, environments())
    if python is None:
        raise TrainError(
            f"lmms_eval: the environment of lmms-eval {version()} is not made yet; run {MAKE}, "
            "which installs about 0.3 GB from the package index"
        )
    return python


def with_harness(request: HarnessRequest, folder: Path) -> TaskScores:
    """Run lmms-eval and wait for it.

    Args:
        request: What it is asked.
        folder: For its log and what its tasks write.

    Raises:
        TrainError: The environment is not made; a task that it does not have, with near names; a
            task or a model that failed, with its last line.
    """
    python = require_environment()
    if request.include_path and not Path(request.include_path).is_dir():
        raise TrainError(
            f"include_path: {request.include_path} is no folder; expected one with tasks as YAML"
        )
    log = folder / LOG
    with tempfile.TemporaryDirectory() as own:
        asked, answered = Path(own) / "request.json", Path(own) / "result.json"
        whole = {**asdict(request), "output": str(folder.absolute())}
        asked.write_text(json.dumps(whole), encoding="utf-8")
        code = _run([python, RUNNER, asked, answered], log)
        if code or not answered.is_file():
            raise TrainError(f"lmms_eval: it ended with {code}: {_last_line(log)} (log: {log})")
        try:
            data = answered.read_bytes()
            if len(data) > LARGEST_RESULT:
                raise TrainError(f"lmms_eval: its result has {len(data)} bytes; ask fewer tasks")
            result = from_json(data, _Result)
        except JsonError as error:
            raise TrainError(f"lmms_eval: its result is of another form ({error})") from None
    return _found(result, log)


def _run(command: Sequence[str | Path], log: Path) -> int:
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*map(str, command)],
            env={"TOKENIZERS_PARALLELISM": "false", **kept},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return excerpt(next((line for line in reversed(lines) if line.strip()), "it said nothing"))


def _found(result: _Result, log: Path) -> TaskScores:
    if missing := result.get("missing"):
        name, near = next(iter(missing.items()))
        others = f"; near: {', '.join(near)}" if near else ""
        raise TrainError(
            f"lmms_eval: {name!r} is no task of lmms-eval {version()}{others}; expected a task, a "
            "group or a tag of its, or of --include_path"
        )
    samples = result.get("samples", {})
    unanswered = [one for some in samples.values() for one in some if _is_failed(one)]
    if unanswered:
        raise TrainError(
            f"lmms_eval: {len(unanswered)} questions got no answer, first: "
            f"{excerpt(str(unanswered[0]['filtered_resps']))} (log: {log})"
        )
    if errors := result.get("errors"):
        raise TrainError(
            f"lmms_eval: {len(errors)} errors, first: {excerpt(errors[0])} (log: {log})"
        )
    metrics = {task: _numbers(found) for task, found in result.get("results", {}).items()}
    return TaskScores(version(), metrics, samples)


def _is_failed(sample: Mapping[str, Any]) -> bool:
    return str(sample.get("filtered_resps")).startswith(FAILED)


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of lmms-eval's names `exact_match,none`, without errors that it did not compute."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
