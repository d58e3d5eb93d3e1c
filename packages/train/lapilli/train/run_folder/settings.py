"""Read and write a run's settings and what was computed when it was started.

Its `config.json` describes the run. It may come from somebody else: settings in it that would run
code count only if the command allows them (`lapilli.data.trust`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from lapilli.data.io.access import cannot_read, is_missing
from lapilli.data.io.atomic import write_json
from lapilli.data.io.typed_json import JsonError, Natural, as_type, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt
from lapilli.data.trust import Trust, is_own_code
from lapilli.model.config import KEEP_ALL, ActivationPolicy, ModelConfig
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.renamed import RUN_NAMES
from lapilli.train.run_folder.names import CONFIG, RUN_INFO

__all__ = [
    "RunInfo",
    "as_json",
    "plain_settings",
    "read_run_config",
    "read_run_info",
    "require_current",
    "require_missing",
    "require_trust",
    "settings_of",
    "write_run_config",
    "write_run_info",
]


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What `facts.json` says of a run since its last start. Earlier versions lack the last ones.

    Attributes:
        total_steps: Optimizer steps of the run.
        samples: Samples of the dataset that are used.
        too_long: Samples left out because they exceed `max_length`.
        parameters: Parameters by part: total and trained.
        image_tokens: Tokens an image takes in the sequence.
        device: What the workers compute on.
        start: Step of the last start.
        num_cut: Samples whose text is cut at `max_length`.
        step_seconds: Forward and backward of a step, measured on a core of the driver's machine.
        memory: Bytes a worker holds, by part and kind; activations come on top.
        attention: The attention implementation and why it was chosen.
        kernels: What computes merge, layers and loss, and why it is not what it could be.
        activations: Layers that run again in backward, and where their inputs lie.
        memory_note: That policy in words, with the estimate and the budget.
        environment: Variables that workers on Gaudi were started with.
    """

    total_steps: Natural
    samples: Natural
    too_long: Natural
    parameters: dict[str, tuple[int, int]]
    image_tokens: Annotated[int, lambda value: "" if value > 0 else "1 or more"]
    device: str = ""
    start: Natural = 0
    num_cut: Natural = 0
    step_seconds: float | None = None
    memory: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    attention: dict[str, Any] = field(default_factory=dict[str, Any])
    kernels: dict[str, str] | None = None
    activations: ActivationPolicy = KEEP_ALL
    memory_note: str = ""
    environment: dict[str, str] = field(default_factory=dict[str, str])


def read_run_config(run: Path) -> RunConfig:
    """Read the settings of a run, or of a checkpoint's folder.

    Raises:
        TrainError: No run, or settings that are none.
    """
    path = run / CONFIG
    try:
        return settings_of(read_whole(path), path)
    except OSError as error:
        require_missing(path, error)
        raise TrainError(f"{run}: no run (no {CONFIG}); expected the output of train") from None


def settings_of(found: bytes | Mapping[str, Any], where: object) -> RunConfig:
    """Parse a run's settings from JSON, under today's names or earlier ones.

    Raises:
        TrainError: They are none; names the field.
    """
    try:
        if isinstance(found, bytes):
            found = from_json(found, dict[str, Any])
        return as_type(RUN_NAMES.with_new_names(found), RunConfig)
    except JsonError as error:
        raise TrainError(
            f"{where}: no run's settings ({error}); bring it back from a copy of the run, or "
            "use the version of lapilli that wrote it"
        ) from None


def require_current(run: Path) -> None:
    """Refuse to resume a run of an earlier version, whose settings have other names.

    Raises:
        TrainError: It is such a run; says how to continue from its weights.
    """
    found = from_json(read_whole(run / CONFIG), dict[str, Any])
    if RUN_NAMES.found_in(found):
        raise TrainError(
            f"output: {run} was made by an earlier version and cannot be resumed; start a new run "
            f"from it with --init_from {run} and another --output"
        )


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """Settings as `config.json` has them."""
    return as_json(asdict(config))


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON reads them back: lists in place of tuples."""
    return json.loads(json.dumps(settings))


def read_run_info(run: Path) -> RunInfo | None:
    """What was computed when a run was last started; None if it never was.

    Raises:
        TrainError: The file is damaged or cannot be read.
    """
    path = run / RUN_INFO
    try:
        found = from_json(read_whole(path), dict[str, Any])
        names = {one.name for one in fields(RunInfo)}  # a later version may write more
        return as_type({n: value for n, value in found.items() if n in names}, RunInfo)
    except OSError as error:
        require_missing(path, error)
        return None
    except JsonError as error:
        raise TrainError(
            f"{path}: damaged ({error}); run the same train again, it writes it again"
        ) from None


def write_run_config(run: Path, config: RunConfig) -> None:
    """Write a run's settings."""
    write_json(run / CONFIG, asdict(config))


def write_run_info(run: Path, info: RunInfo) -> None:
    """Write what was computed for this start; workers' messages are timed from here."""
    write_json(run / RUN_INFO, asdict(info))


def require_trust(config: ModelConfig, trust: Trust, where: object) -> None:
    """Reject a model from a run's own file that runs code the command does not allow.

    Args:
        config: The model's settings.
        trust: What the command allows.
        where: The file they stand in, for the error.

    Raises:
        TrainError: Names all that is asked for, and the flags that allow it.
    """
    asked, flags, names = list[str](), list[str](), list[str]()
    language = config.language
    if not trust.remote_code:
        beside = f"the code that comes with {language.pretrained or language.model_type}"
        if language.trust_remote_code:
            asked.append(f"model.language.trust_remote_code runs {beside}")
        if "/" in language.attention:  # a kernel of the hub
            asked.append(f"model.language.attention runs the code of {language.attention}")
        flags += ["--trust_remote_code"] * bool(asked)
    pickles = [p for p in ("vision", "language") if getattr(config, p).allow_pickle]
    if pickles and not trust.pickle:
        asked.append(f"model.{pickles[0]}.allow_pickle reads pickles of weights")
        flags.append("--allow_pickle")
    for setting, name in (("vision.tower", config.vision.tower), ("projector", config.projector)):
        if is_own_code(name) and name not in trust.code:
            asked.append(f"model.{setting} runs code of its own, {name}")
            names.append(name)
    if names:
        flags.append(f"--allow_code {','.join(dict.fromkeys(names))}")
    if asked:
        said = excerpt("; ".join(asked), 400)
        raise TrainError(
            f"{where}: {said}; if you trust whoever made it, pass {excerpt(' '.join(flags), 300)}"
        )


def require_missing(path: Path, error: OSError) -> None:
    """Raise unless the error says that the file is missing.

    Raises:
        TrainError: The file is there, or may be, and cannot be read.
    """
    if not is_missing(error):
        raise TrainError(cannot_read(path, error)) from None
