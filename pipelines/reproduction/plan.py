"""The steps of a published system, as commands with time, disk and what they make."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.io.typed_json import as_type
from lapilli.data.io.yaml_text import load_yaml

__all__ = [
    "Benchmark",
    "PlannedCommand",
    "PublishedSystem",
    "SystemFolders",
    "planned",
    "read_system",
    "tolerance",
]

FOLDER = Path(__file__).parent
DEVIATIONS = 2.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step before the benchmarks.

    Attributes:
        command: With `{places}` in braces.
        hours: About, by model where they differ; empty for what nobody has published.
        gigabytes: Disk, 10**9 bytes, likewise.
        source: Where both are from.
    """

    command: str
    hours: float | dict[str, float] = field(default_factory=dict[str, float])
    gigabytes: float | dict[str, float] = field(default_factory=dict[str, float])
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A column of the published table.

    Attributes:
        title: Its name.
        questions: Independent ones, for the tolerance.
        scores: Published, by model.
        commands: With `{places}` in braces.
        found: A JSON file below the scores, then the keys to the score in it.
        times: What brings that score to the published scale.
        largest: Score that the published scale ends with.
        by_hand: How the score is got where no command gets it.
        note: What else differs from the published way.
    """

    title: str
    questions: int
    scores: dict[str, float]
    commands: list[str]
    found: list[str | int] = field(default_factory=list[str | int])
    times: float = 100.0
    largest: float = 100.0
    by_hand: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedSystem:
    """A system: where its table is from, its steps and benchmarks, in order."""

    title: str
    repository: str
    commit: str
    path: str
    models: dict[str, dict[str, str]]
    steps: dict[str, Step]
    evaluation: str
    benchmarks: dict[str, Benchmark]


@dataclass(frozen=True)
class SystemFolders:
    """Folders that fill the braces of commands."""

    root: str
    output: str
    evaluation: str

    @property
    def scores(self) -> Path:
        """Where answers and scores lie."""
        return Path(self.output) / "scores"


@dataclass(frozen=True, kw_only=True)
class PlannedCommand:
    """A command of the plan.

    Attributes:
        name: Of its step or benchmark.
        words: Verb and arguments.
        hours: About; None for what nobody has published.
        gigabytes: Disk; None likewise.
        source: Where both are from.
    """

    name: str
    words: tuple[str, ...]
    hours: float | None = None
    gigabytes: float | None = None
    source: str = ""

    def value(self, flag: str) -> str:
        """The last value of a flag; empty if it is not given."""
        start = f"--{flag}="
        given = [word.removeprefix(start) for word in self.words if word.startswith(start)]
        return given[-1] if given else ""


def read_system(name: str) -> PublishedSystem:
    """A system of this folder.

    Raises:
        DataError: No such system; says those that there are.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in names:
        near = get_close_matches(name, names, 1, 0.5)
        raise DataError(
            f"system: {name!r}; expected one of {', '.join(names)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    values: Any = load_yaml(text)
    return as_type(values, PublishedSystem)


def planned(
    system: PublishedSystem,
    model: str,
    places: SystemFolders,
    benchmarks: Sequence[str],
    more: Mapping[str, str],
) -> list[PlannedCommand]:
    """All commands in order.

    Args:
        system: What is reproduced.
        model: One of its models.
        places: Folders.
        benchmarks: Those to score; none for all.
        more: Arguments to add, by the name of a step or a benchmark, which has several commands:
            `textvqa.generate` is one of them.

    Raises:
        DataError: A model, a benchmark or a step that it does not have.
    """
    if model not in system.models:
        raise DataError(f"model: {model!r}; expected one of {', '.join(system.models)}")
    for setting, known, given in (
        ("benchmarks", system.benchmarks, benchmarks),
        ("more", system.steps | system.benchmarks, [key.partition(".")[0] for key in more]),
    ):
        if strange := [name for name in given if name not in known]:
            raise DataError(f"{setting}: {strange[0]!r}; expected one of {', '.join(known)}")
    braces = {
        **system.models[model],
        "root": places.root,
        "output": places.output,
        "eval": places.evaluation,
        "scores": str(places.scores),
    }

    def words(name: str, command: str) -> tuple[str, ...]:
        found = [word.format(**braces) for word in shlex.split(command)]
        added = [more.get(key, "") for key in (name, f"{name}.{found[0]}")]
        return (*found, *shlex.split(" ".join(added)))

    found = [
        PlannedCommand(
            name=name,
            words=words(name, step.command),
            hours=_of(step.hours, model),
            gigabytes=_of(step.gigabytes, model),
            source=step.source,
        )
        for name, step in system.steps.items()
    ]
    for name in benchmarks or system.benchmarks:
        commands = system.benchmarks[name].commands
        found += [PlannedCommand(name=name, words=words(name, command)) for command in commands]
    return found


def tolerance(benchmark: Benchmark, model: str) -> float:
    """Two standard errors of the difference between two models that are equally good.

    As if each answered `questions` independent questions, right with the published share. What a
    second training with the same settings changes beyond that is published by nobody.
    """
    share = benchmark.scores[model] / benchmark.largest
    return DEVIATIONS * benchmark.largest * math.sqrt(2 * share * (1 - share) / benchmark.questions)


def _of(value: float | dict[str, float], model: str) -> float | None:
    return value.get(model) if isinstance(value, dict) else float(value)
