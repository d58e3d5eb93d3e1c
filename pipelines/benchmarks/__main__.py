"""`python -m pipelines.benchmarks TOPIC [flags]`; without a topic, the list of them.

`figures` writes the newest figure of each topic into README between two marks; a test compares them
with the rows.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.benchmarks import (
    build,
    feed,
    images,
    loss,
    merge,
    opening,
    planning,
    reading,
    sharing,
    tokens,
    whole,
)
from pipelines.benchmarks.harness import RESULTS
from pipelines.benchmarks.plans import plan_scale
from pipelines.benchmarks.scaling import measured as scaling_measured
from pipelines.benchmarks.scaling import topic as scaling
from pipelines.benchmarks.step import (
    auxiliary,
    checkpoint,
    grouping,
    memory,
    roofline,
    serving,
    shared_rows,
    teachers,
    training,
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
    "plan_scale": plan_scale.main,
    "share": sharing.main,
    "group": grouping.main,
    "share_step": shared_rows.main,
    "scaling": scaling.main,
    "scaling_measured": scaling_measured.main,
    "tokens": tokens.main,
    "merge": merge.main,
    "loss": loss.main,
    "whole": whole.main,
    "check": whole.check,
    "feed": feed.main,
    "train": training.main,
    "run": whole_run.main,
    "roofline": roofline.main,
    "checkpoint": checkpoint.main,
    "memory": memory.main,
    "serve": serving.main,
    "teachers": teachers.main,
    "targets": teachers.costs,
    "auxiliary": auxiliary.main,
}


README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- newest figures: begin -->\n", "<!-- newest figures: end -->\n"


@dataclass(frozen=True)
class ReadmeFigure:
    """One line of the table.

    Attributes:
        topic: Its rows are those of `results/TOPIC.csv`.
        what: What was measured.
        text: The figure, a format over the row's columns.
        where: Columns that the row must have so; the last such row counts.
    """

    topic: str
    what: str
    text: str
    where: Mapping[str, str] = field(default_factory=dict[str, str])


FIGURES = (
    ReadmeFigure("images", "640x480 photo to 336 px on one core", "{images_per_cpu_second} images/s, "
           "{of_llava} x LLaVA's path, {time_of_floor} of the floor's time",
           {"size": "640x480", "side": "lapilli torch exact"}),
    ReadmeFigure("build", "photos to shards on Ray Data", "{images_per_second} images/s on {workers} "
           "cores, {of_two_bare} of two bare loops",
           {"side": "lapilli, Ray Data", "workers": "2", "images": "9000"}),
    ReadmeFigure("build", "the same, 100,000 of them", "{images_per_second} images/s",
           {"side": "lapilli, Ray Data", "workers": "2", "images": "100000"}),
    ReadmeFigure("build", "the same by plain Ray Data on Pillow", "{images_per_second} images/s",
           {"side": "plain Ray Data on Pillow", "images": "9000"}),
    ReadmeFigure("read", "warm random reads, copied", "{samples_per_second} samples/s, {of_floor} of a "
           "bare numpy map", {"side": "lapilli, copied"}),
    ReadmeFigure("open", "opening {records} records", "{seconds} s, {megabytes} MB", {"side": "lapilli"}),
    ReadmeFigure("open", "the same by bare pyarrow", "{seconds} s, {megabytes} MB", {"side": "bare"}),
    ReadmeFigure("plan", "tokens computed in an epoch, `grouped`", "{of_llava} of LLaVA's; planned in "
           "{seconds} s", {"policy": "grouped"}),
    ReadmeFigure("plan", "the same, prismatic's rule", "{of_llava} of LLaVA's", {"policy": "prismatic"}),
    ReadmeFigure("plan", "the same, modalities apart and no more", "{of_ungrouped} of no grouping",
           {"policy": "modality"}),
    ReadmeFigure("tokens", "records to token shards on one core", "{tokens_per_cpu_second} tokens/s, "
           "{ratio} of the bare tokenizer"),
    ReadmeFigure("feed", "samples from shards, two threads", "{per_second} samples/s, {of_llava} x "
           "LLaVA's dataset", {"way": "ours, 2 threads"}),
    ReadmeFigure("whole", "{records} records and {images} photos through `preprocess`", "{seconds} s"),
    ReadmeFigure("roofline", "floor of a step, LLaVA-1.5-7B full, on an H200 as torch computes it",
           "{seconds measured} s, MFU at most {mfu measured}",
           {"size": "7b", "mode": "full", "way": "torch kernels"}),
    ReadmeFigure("roofline", "the same with all fused", "{seconds measured} s, {mfu measured}",
           {"size": "7b", "mode": "full", "way": "all fused"}),
    ReadmeFigure("check", "`check` on {records} records and {files} files", "{seconds} s, {peak_mb} MB"),
)  # fmt: skip


def newest_table(folder: Path = RESULTS) -> str:
    """The table in Markdown.

    Raises:
        UsageError: A topic has no such row.
    """
    lines = ["| topic | what | newest figure | when, where |", "|---|---|---|---|"]
    for figure in FIGURES:
        row = _newest(folder / f"{figure.topic}.csv", figure.where)
        what, text = figure.what.format(**row), figure.text.format(**row)
        lines.append(f"| `{figure.topic}` | {what} | {text} | {row['date']}, {row['processor']} |")
    return "\n".join(lines) + "\n"


def _newest(path: Path, where: Mapping[str, str]) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if where.items() <= row.items()]
    if not rows:
        raise UsageError(f"{path}: no row with {dict(where)}; run the topic")
    return rows[-1]


def with_table(readme: str, folder: Path = RESULTS) -> str:
    """README's text with the table of the rows as they are."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"{README}: the marks {BEGIN.strip()} and {END.strip()} are not there")
    return before + begin + newest_table(folder) + end + after


def _renew(argv: Sequence[str]) -> int:
    """Write the table of README anew."""
    if argv:
        raise UsageError(f"figures takes no flags, not {' '.join(argv)}")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


COMMANDS = {**TOPICS, "figures": _renew}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        say(f"python -m pipelines.benchmarks TOPIC [--help]; topics: {', '.join(TOPICS)}")
        return 0
    if given[0] not in COMMANDS:
        raise UsageError(f"topic {given[0]!r} is unknown: take one of {', '.join(TOPICS)}")
    return COMMANDS[given[0]](given[1:])


if __name__ == "__main__":
    run(main)
