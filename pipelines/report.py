"""Write report.html of datasets and runs.

lapilli report DIR [DIR ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.io.access import require_writable
from lapilli.data.trust import NOTHING, Trust
from pipelines.cli.command import read_arguments, run, say
from pipelines.cli.trust_flags import trusted_names
from pipelines.reports.dataset_report import write_dataset_report
from pipelines.reports.describe import kind_of
from pipelines.reports.run_report import write_run_report

__all__ = ["main", "report"]


def report(folder: Path, trust: Trust = NOTHING) -> Path:
    """Write the report of a dataset or a run; its path.

    Raises:
        DataError, TrainError: Neither of them, or damaged.
    """
    if kind_of(folder) == "run":
        return write_run_report(folder)
    return write_dataset_report(folder, read_build_config(folder, trust))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = ArgumentParser(
        prog="lapilli report",
        description="Write report.html of datasets and runs, as preprocess and train do.",
        exit_on_error=False,
    )
    parser.add_argument("folders", nargs="+", type=str, help="datasets and runs")
    parser.add_argument(
        "--allow_code",
        type=str,
        default="",
        help="readers package.module:name, separated by commas, that a dataset's own settings may "
        "import",
    )
    found = read_arguments(parser, argv)
    folders = [Path(folder) for folder in found.folders]
    for folder in folders:
        require_writable("report", folder, "free space or check rights")
    for folder in folders:
        say(f"report: {report(folder, Trust(code=trusted_names(found.allow_code)))}")
    return 0


if __name__ == "__main__":
    run(main)
