"""`python -m pipelines.benchmarks TOPIC [flags]`; without a topic, the list of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pipelines.benchmarks import (
    build,
    feed,
    images,
    loss,
    merge,
    opening,
    planning,
    reading,
    roofline,
    scaling,
    tokens,
    training,
    whole,
    whole_run,
)
from pipelines.cli.command import UsageError, run, say

# A topic is a module whose `main` takes the flags behind its name, measures and adds a row.
TOPICS: dict[str, Callable[[Sequence[str]], int]] = {
    "images": images.main,
    "build": build.main,
    "open": opening.main,
    "read": reading.main,
    "plan": planning.main,
    "scaling": scaling.main,
    "tokens": tokens.main,
    "merge": merge.main,
    "loss": loss.main,
    "whole": whole.main,
    "feed": feed.main,
    "train": training.main,
    "run": whole_run.main,
    "roofline": roofline.main,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        say(f"python -m pipelines.benchmarks TOPIC [--help]; topics: {', '.join(TOPICS)}")
        return 0
    if given[0] not in TOPICS:
        raise UsageError(f"topic {given[0]!r} is unknown: take one of {', '.join(TOPICS)}")
    return TOPICS[given[0]](given[1:])


if __name__ == "__main__":
    run(main)
