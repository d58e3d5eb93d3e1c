"""Make damaged or missing shards of a dataset again from its sources.

lapilli repair DATASET [DATASET ...] [--root DIR]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from lapilli.data.building.repair import repair_dataset
from lapilli.data.cluster.places import check_places
from lapilli.data.cluster.probe import JobPlaces
from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.io.remote_path import Output, open_output
from lapilli.data.sources.root_address import moved_root
from lapilli.data.trust import NOTHING, Trust
from pipelines.cli.command import progress_bar, read_arguments, run, say
from pipelines.cli.trust_flags import trusted_names
from pipelines.reports.ticks import counted
from pipelines.verify import DAMAGED, require_dataset, verify

__all__ = ["main", "repair"]


def repair(folder: Output, root: str = "", trust: Trust = NOTHING) -> bool:
    """Verify a dataset and make again what is damaged; whether it is whole in the end.

    Args:
        folder: The dataset, in a folder or a store.
        root: Folder or address of annotations and images, where it has moved since the build.
        trust: What the command allows of what the dataset's own settings ask for.

    Raises:
        DataError: No dataset, or sources that have changed.
    """
    found = verify(folder)
    if found.is_whole:
        return True
    config = read_build_config(folder, trust)
    if not isinstance(folder, Path):
        check_places(JobPlaces({}, {}, {"folders": str(folder)}), config.build)
    with progress_bar() as bar:
        task = bar.add_task("shards", total=None)
        made = repair_dataset(
            folder,
            moved_root(config, root) if root else config,
            lambda done, total: bar.update(task, completed=done, total=total),
            damaged=[one.path for one in found.damaged],
        )
    say(f"{folder}: {counted(made, 'shard')} made again")
    return verify(folder).is_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = ArgumentParser(
        prog="lapilli repair",
        description="Verify datasets, and make damaged shards again from the sources, with the "
        "SHA-256 they had.",
        exit_on_error=False,
    )
    parser.add_argument("folders", nargs="+", type=str, help="datasets")
    parser.add_argument("--root", type=str, default="", help="where the sources are, if they moved")
    parser.add_argument(
        "--allow_code",
        type=str,
        default="",
        help="readers package.module:name, separated by commas, that a dataset's own settings may "
        "import",
    )
    found = read_arguments(parser, argv, addresses=["folders", "root"])
    folders = [open_output(folder) for folder in found.folders]
    for folder in folders:
        require_dataset("repair", folder)
    trust = Trust(code=trusted_names(found.allow_code))
    whole = [repair(folder, found.root, trust) for folder in folders]
    return 0 if all(whole) else DAMAGED


if __name__ == "__main__":
    run(main)
