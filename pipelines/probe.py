"""Measure what each layer of a model knows of a teacher's features.

lapilli probe RUN_OR_EXPORT --dataset DIR --target depth --layers 8,16,24 --output DIR
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lapilli.data.dataset.dataset import Dataset
from lapilli.data.dataset.targets import open_targets, require_target
from lapilli.data.io.access import exists, is_folder, require_writable
from lapilli.data.io.atomic import write_json, write_text
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import open_trained
from lapilli.train.inference.evaluate import only_view, open_test
from lapilli.train.inference.probing import (
    LayerScore,
    ProbePlan,
    ProbeScores,
    chosen_layers,
    train_probes,
)
from lapilli.train.run_folder.names import REPORT
from pipelines.cli.command import first_as, parse, progress_bar, run, say
from pipelines.cli.settings import ProbeConfig
from pipelines.reports.probe_report import write_probe_report

__all__ = ["main", "probe"]

RESULT, TABLE = "probe.json", "probe.csv"


def probe(config: ProbeConfig) -> ProbeScores:
    """Train the probes, measure them, and write `probe.json`, `probe.csv` and `report.html`.

    Raises:
        DataError: Another process writes the output, or it cannot be written.
        DataError, ModelError, TrainError: Model, dataset and target do not fit, or a wrong setting.
    """
    output = Path(config.output)
    if exists(output) and not is_folder(output):
        raise TrainError(f"output: {output} is a file; expected a folder")
    require_writable("output", output)
    with only_writer(output, "written"):
        return _probe(config, output)


def _probe(config: ProbeConfig, output: Path) -> ProbeScores:
    dataset = Path(config.dataset)
    require_target(read_manifest(dataset), dataset, config.target)
    device = torch_device(choose_device(config.device, visible_devices()))
    trained = open_trained(
        Path(config.run), dataset, device, config.trust, template=config.template
    )
    plan = ProbePlan(
        target=config.target, layers=chosen_layers(config.layers, trained.model),
        steps=config.steps, batch_size=config.batch, lr=config.lr, samples=config.samples,
        seed=config.seed,
    )  # fmt: skip
    view = config.view or only_view(dataset)
    train, held_out = (open_test(dataset, view, trained, split) for split in (TRAIN, HELD_OUT))
    with progress_bar() as bar:
        task = bar.add_task("probe steps", total=plan.steps)
        scores = train_probes(
            trained.model, train, held_out, plan, device,
            lambda step, loss: bar.update(task, completed=step),
        )  # fmt: skip
    _write(config, output, plan, train, scores)
    return scores


def _write(
    config: ProbeConfig, output: Path, plan: ProbePlan, dataset: Dataset, scores: ProbeScores
) -> None:
    name = Path(config.run).resolve().name
    facts = open_targets(dataset, plan.target).facts
    teacher: dict[str, Any] = {"teacher": facts.teacher, "made": facts.made}
    teacher |= {"rows": facts.rows, "width": facts.width}
    write_json(output / RESULT, {
        "run": name, "dataset": dataset.manifest.fingerprint, **teacher,
        "settings": asdict(plan), **asdict(scores),
    })  # fmt: skip
    columns = [one.name for one in fields(LayerScore)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(layer) for layer in scores.layers)
    write_text(output / TABLE, text.getvalue())
    write_probe_report(output / REPORT, name, plan, scores, teacher)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    what = "Train a small resampler on each layer of a frozen model, and measure it."
    config = parse(ProbeConfig, first_as("run", argv), what)
    scores = probe(config)
    say(
        f"smooth L1 on {scores.held_out:,} held-out images, of {config.target}; "
        f"the mean target has {scores.mean_smooth_l1:.4f}"
    )
    for layer in scores.layers:
        say(f"  layer {layer.layer:>3}  {layer.smooth_l1:.4f}  cosine {layer.cosine:.4f}")
    say(f"report: {Path(config.output) / REPORT}")
    return 0


if __name__ == "__main__":
    run(main)
