"""Hash every byte of a dataset and compare it with the manifest.

lapilli verify DATASET [DATASET ...]
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lapilli.data.dataset.verify import Verification, verify_dataset
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.remote_path import Output, open_output
from pipelines.cli import command
from pipelines.cli.command import UsageError, read_arguments, run, say
from pipelines.reports.describe import kind_of
from pipelines.reports.ticks import counted

__all__ = ["DAMAGED", "main", "require_dataset", "verify"]

DAMAGED = 1  # exit code
NAMED = 20  # files of a kind, after which they are counted


def verify(folder: Output) -> Verification:
    """Verify a dataset with a bar, and print what is damaged or foreign in it."""
    columns = (BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    started = time.monotonic()
    with Progress(TextColumn("  {task.description}"), *columns, console=command.console) as bar:
        task = bar.add_task("hashing", total=None)
        found = verify_dataset(
            folder, lambda done, total: bar.update(task, completed=done, total=total)
        )
    seconds = max(time.monotonic() - started, 1e-9)
    rate = f"{bytes_text(found.bytes)} in {seconds:.1f} s, {found.bytes / seconds / 1e9:.2f} GB/s"
    state = "whole" if found.is_whole else f"{counted(len(found.damaged), 'file')} damaged"
    say(f"{folder}: {state} ({counted(found.files, 'file')}, {rate})")
    _print_first([f"{damage.path}: {damage.problem}" for damage in found.damaged])
    _print_first([f"{name}: foreign, of no build of this dataset" for name in found.foreign])
    return found


def _print_first(lines: Sequence[str]) -> None:
    for line in lines[:NAMED]:
        say(f"  {line}")
    if len(lines) > NAMED:
        say(f"  and {len(lines) - NAMED:,} more")


def require_dataset(verb: str, folder: Output) -> None:
    """Refuse a run.

    Raises:
        UsageError: It is one.
        DataError: It is neither.
    """
    if isinstance(folder, Path) and kind_of(folder) == "run":
        raise UsageError(f"{verb}: {folder} is a run; expected datasets")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = ArgumentParser(
        prog="lapilli verify",
        description="Hash every byte of datasets; name files that are damaged, missing or foreign. "
        "Exit code 1 where one is damaged.",
        exit_on_error=False,
    )
    parser.add_argument("folders", nargs="+", type=str, help="datasets")
    found = read_arguments(parser, argv, addresses=["folders"])
    folders = [open_output(folder) for folder in found.folders]
    for folder in folders:
        require_dataset("verify", folder)
    damaged = [folder for folder in folders if not verify(folder).is_whole]
    for folder in damaged:
        say(f"repair it with: lapilli repair {folder}")
    return DAMAGED if damaged else 0


if __name__ == "__main__":
    run(main)
