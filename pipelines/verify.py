"""A dataset verified, and mended, with a bar: what `show --verify` and `show --repair` do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lapilli.data.building.repair import repair_dataset
from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.dataset.verify import Verification, verify_dataset
from lapilli.data.trust import NOTHING, Trust
from pipelines.cli import command
from pipelines.cli.command import UsageError, progress_bar, say
from pipelines.reports.describe import bytes_text, counted, kind_of

__all__ = ["verify_folders"]

NAMED = 20  # files of a kind, after which they are counted


def verify_folders(
    folders: Sequence[Path], *, repair: bool, root: str, trust: Trust = NOTHING
) -> bool:
    """Verify each dataset, and mend it if that is asked for; whether all are whole in the end.

    Raises:
        UsageError: A run among the folders, or a root that nothing is to be mended from.
        DataError: A folder that is no dataset, or sources that have changed.
    """
    if root and not repair:
        raise UsageError("root: is where --repair reads; give --repair, or leave it out")
    runs = [folder for folder in folders if kind_of(folder) == "run"]
    if runs:
        raise UsageError(f"verify: {runs[0]} is a run; expected datasets")
    whole = [_verify_one(folder, repair=repair, root=root, trust=trust) for folder in folders]
    return all(whole)


def _verify_one(folder: Path, *, repair: bool, root: str, trust: Trust) -> bool:
    found = _verify(folder)
    if found.is_whole or not repair:
        if not found.is_whole:
            say(f"mend it with: python -m pipelines.show {folder} --repair")
        return found.is_whole
    config = read_build_config(folder, trust)
    with progress_bar() as bar:
        task = bar.add_task("shards", total=None)
        made = repair_dataset(
            folder,
            replace(config, root=root) if root else config,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    say(f"{folder}: {counted(made, 'shard')} made again")
    return _verify(folder).is_whole


def _verify(folder: Path) -> Verification:
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
    _tell([f"{damage.path}: {damage.problem}" for damage in found.damaged])
    _tell([f"{name}: foreign, of no build of this dataset" for name in found.foreign])
    return found


def _tell(lines: Sequence[str]) -> None:
    for line in lines[:NAMED]:
        say(f"  {line}")
    if len(lines) > NAMED:
        say(f"  and {len(lines) - NAMED:,} more")
