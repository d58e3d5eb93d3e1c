"""List every command from download to a published table, what is done, and run what is next.

lapilli reproduce llava15 --root playground/data --output outputs/llava15 [--execute]
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from lapilli.data.errors import DataError
from pipelines.cli.command import first_as, parse, run, say, say_title
from pipelines.cli.terminal import print_table
from pipelines.reproduction.plan import (
    PlannedCommand,
    PublishedSystem,
    SystemFolders,
    planned,
    read_system,
)
from pipelines.reproduction.state import is_done, missing
from pipelines.reproduction.table import BY_HAND, TableRow, score_table

__all__ = ["ReproduceConfig", "main", "reproduce"]


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """A published system, and where its reproduction lies.

    Attributes:
        system: The system: llava15.
        root: Folder of the published data; what is missing is downloaded into it.
        output: Folder for datasets, runs, the export and scores.
        model: Row of the published table: 7b, 13b, 7b-lora, 13b-lora.
        benchmarks: Columns of the table, separated by commas; empty for all.
        eval: Folder of the benchmarks' questions and images; empty for `root`/eval.
        more: Arguments to add to a command, as a mapping from the name of its step (`finetune`), or
            of its benchmark and verb (`textvqa.generate`).
        execute: Run what is not done, in order, until something fails. The same command goes on.
    """

    system: str
    root: str
    output: str
    model: str = "7b"
    benchmarks: str = ""
    eval: str = ""
    more: dict[str, str] = field(default_factory=dict[str, str])
    execute: bool = False


def reproduce(config: ReproduceConfig) -> list[TableRow]:
    """List the commands, run those that are not done with `execute`, and print the table.

    Raises:
        DataError: A system, model, benchmark or step that is not there, a command that ended and
            left its work undone, and as the commands.
    """
    system = read_system(config.system)
    places = SystemFolders(
        config.root, config.output, config.eval or str(Path(config.root) / "eval")
    )
    names = [name.strip() for name in config.benchmarks.split(",") if name.strip()]
    commands = planned(system, config.model, places, names, config.more)
    say(
        f"{system.title} {config.model}, as {system.repository} at {system.commit[:8]} reports it "
        f"in {system.path}"
    )
    _say_commands(system, commands)
    if config.execute:
        places.scores.mkdir(parents=True, exist_ok=True)
        _execute(commands)
    rows = score_table(system, config.model, places.scores, names or [*system.benchmarks])
    _say_table(rows, places.scores)
    return rows


def _say_commands(system: PublishedSystem, commands: Sequence[PlannedCommand]) -> None:
    done = [is_done(command) for command in commands]
    is_next = True
    for number, (command, finished) in enumerate(zip(commands, done, strict=True), 1):
        lacking = missing(command)
        state = "done" if finished else "to do"
        if not finished and lacking:
            state = f"needs {', '.join(lacking)}: {system.evaluation}"
        elif not finished and is_next:
            state, is_next = "next", False
        say_title(f"{number}. {command.name}: {state}")
        say(f"lapilli {shlex.join(command.words)}")
        if command.source:
            hours = "time not known" if command.hours is None else f"about {command.hours:g} h"
            say(f"{hours}, about {command.gigabytes or 0:g} GB of disk: {command.source}")
    hours = sum(c.hours or 0 for c, d in zip(commands, done, strict=True) if not d)
    size = sum(c.gigabytes or 0 for c, d in zip(commands, done, strict=True) if not d)
    say_title(f"{sum(done)} of {len(commands)} done")
    say(f"the others take about {hours:.1f} h and {size:,.0f} GB, where these are known")


def _execute(commands: Sequence[PlannedCommand]) -> None:
    waiting: set[str] = set()  # benchmarks without their questions
    for command in commands:
        if missing(command) and not is_done(command):
            waiting.add(command.name)
        if command.name in waiting or is_done(command):
            continue
        say_title(f"{command.name}: lapilli {shlex.join(command.words)}")
        verb, *words = command.words
        module = importlib.import_module(f"pipelines.{verb}")
        code = module.main(words)
        if code or not is_done(command):
            raise DataError(
                f"{command.name}: lapilli {verb} ended with {code or 0} and left its work undone; "
                "see above, then run the same command again to go on"
            )


def _say_table(rows: Sequence[TableRow], scores: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("benchmark")
    for name in ("published", "tolerance", "found"):
        table.add_column(name, justify="right")
    table.add_column("remark")
    for row in rows:
        found = "-" if row.found is None else f"{row.found:.1f}"
        remark = row.how if row.is_within else f"below the tolerance; {row.how}".rstrip("; ")
        table.add_row(row.title, f"{row.published:.1f}", f"{row.tolerance:.1f}", found, remark)
    print_table(table)
    say(
        "tolerance: two standard errors of a difference, by the number of questions; scores of "
        f"servers and judges go into {scores / BY_HAND}, a line each: `vqav2: 78.5`"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    text = "List every command from download to a published table, and run what is next."
    config = parse(ReproduceConfig, first_as("system", argv), text)
    rows = reproduce(config)
    return 0 if all(row.is_within for row in rows) else 1


if __name__ == "__main__":
    run(main)
