"""Write report.html of datasets and runs.

lapilli report DIR [DIR ...] [--predictions N]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from lapilli.data.cluster.places import check_places
from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.cluster.probe import JobPlaces
from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.io.access import exists, require_writable
from lapilli.data.io.remote_path import Output, RemotePath, open_output
from lapilli.data.shards.manifest import NAME as MANIFEST
from lapilli.data.trust import NOTHING, Trust
from lapilli.train.run_folder.names import REPORT
from lapilli.train.run_folder.settings import read_run_config
from pipelines.cli.command import UsageError, read_arguments, run, say
from pipelines.cli.trust_flags import trusted_names
from pipelines.reports.dataset_report import write_dataset_report
from pipelines.reports.describe import kind_of
from pipelines.reports.run_report import write_run_report

if TYPE_CHECKING:
    from lapilli.train.inference.target_predictions import ImagePrediction

__all__ = ["main", "report"]


def report(place: Output, trust: Trust = NOTHING, *, predictions: int = 0) -> Output:
    """Write the report of a dataset or a run; its path.

    Args:
        place: Folder or address of the dataset or run.
        trust: What its own files may ask for.
        predictions: Images that a run's predictors are asked about, with its newest checkpoint.

    Raises:
        DataError, TrainError: Neither of them, or damaged; a run without predictors that is asked
            for predictions.
    """
    if isinstance(place, Path):
        if kind_of(place) == "run":
            return write_run_report(place, _predictions(place, trust, predictions))
    elif not exists(place / MANIFEST):
        return _report_of_store(place, trust, predictions)
    return write_dataset_report(place, read_build_config(place, trust))


def _report_of_store(run: RemotePath, trust: Trust, predictions: int) -> RemotePath:
    """Write the report of a run in a store from this machine's copy of its records."""
    from lapilli.train.checkpoint.at_hand import local_records, local_run  # need torch

    folder = local_run(str(run), "folders") if predictions else local_records(str(run))[0]
    write_run_report(folder, _predictions(folder, trust, predictions))
    (run / REPORT).put(folder / REPORT)
    return run / REPORT


def _predictions(run: Path, trust: Trust, count: int) -> Sequence[ImagePrediction]:
    """What a run says of images that it holds out, else of those that it was trained on."""
    if not count:
        return []
    if count < 0:
        raise UsageError(f"predictions: {count}; expected a number of images")
    # torch and the model, which a page without predictions needs not
    from lapilli.data.dataset.dataset import open_dataset
    from lapilli.data.shards.schemas import HELD_OUT
    from lapilli.train.device import choose_device, torch_device, visible_devices
    from lapilli.train.inference.evaluate import load_trained
    from lapilli.train.inference.target_predictions import predict_targets

    config = read_run_config(run)
    if not config.model.aux.heads:
        raise UsageError(f"predictions: {run} has no predictors; expected a run with aux.layers")
    device = torch_device(choose_device("auto", visible_devices()))
    model = load_trained(run, device, trust).model
    opened = partial(
        open_dataset, config.dataset, view=config.view, image_tokens=model.image_tokens
    )
    dataset = opened()
    if dataset.manifest.mixture["held_out"]:
        dataset = opened(split=HELD_OUT)
    return predict_targets(model, dataset, count, device)


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
    parser.add_argument(
        "--predictions",
        type=int,
        default=0,
        help="images whose targets and predictions are shown, of runs with embedding losses; needs "
        "memory for the model",
    )
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read weights that a run names and that are not in safetensors, for --predictions",
    )
    found = read_arguments(parser, argv, addresses=["folders"])
    folders = [open_output(folder) for folder in found.folders]
    for folder in folders:
        if isinstance(folder, Path):
            require_writable("report", folder, "free space or check rights")
        else:
            check_places(JobPlaces({}, {}, {"report": str(folder)}), PoolConfig())
    for folder in folders:
        trust = Trust(pickle=found.allow_pickle, code=trusted_names(found.allow_code))
        say(f"report: {report(folder, trust, predictions=found.predictions)}")
    return 0


if __name__ == "__main__":
    run(main)
