"""Several verbs in one process, one after the other: `python -m tests.pipelines.verbs JSON`.

JSON is a list of commands, each a verb and its flags. What a command prints is followed by a line
`exit CODE`, and a mistake is its line, as `lapilli VERB` does it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

from lapilli.data.errors import DataError
from lapilli.train.errors import TrainError

__all__ = ["commands", "parted"]


def commands(given: Sequence[Sequence[str]]) -> list[str]:
    """Arguments of Python that run them."""
    return ["-m", "tests.pipelines.verbs", json.dumps([*map(list, given)])]


def parted(said: str) -> list[list[str]]:
    """The lines of each command, the last one its exit code."""
    found: list[list[str]] = [[]]
    for line in said.splitlines():
        found[-1].append(line.strip())
        if line.startswith("exit "):
            found.append([])
    return found[:-1]


def run(verb: str, *flags: str) -> int:
    """A verb's exit code."""
    try:
        return importlib.import_module(f"pipelines.{verb}").main([*flags])
    except (DataError, TrainError) as error:
        print(f"error: {error}")
        return 2


if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        print(f"exit {run(*command)}", flush=True)
