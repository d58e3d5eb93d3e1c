"""A dataset in another form, for other tools.

python -m pipelines.export --to webdataset --dataset datasets/finetune --output shards/finetune
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.export import export_webdataset
from lapilli.data.manifest import read_manifest
from pipelines.command import parse, progress_bar, run, say


@dataclass(frozen=True)
class ExportConfig:
    """What is written in which form.

    Attributes:
        to: `webdataset`: tars of the original images with the conversations as json, an epoch of
            each split.
        output: Folder to write.
        dataset: Folder of a dataset.
        root: Folder of its annotations and images; empty for where it was made of.
        samples_per_tar: Samples in a tar.
    """

    to: str
    output: str
    dataset: str
    root: str = ""
    samples_per_tar: int = 10_000


def to_webdataset(config: ExportConfig) -> None:
    """Write tars and tell what came of it."""
    dataset, output = Path(config.dataset), Path(config.output)
    read_manifest(dataset)  # no dataset, no settings
    build = parse(BuildConfig, [f"--config={dataset / 'config.json'}"], "")
    root = Path(config.root or build.root)
    if not root.is_dir():
        raise DataError(f"root: folder {root} does not exist; pass --root with the data's folder")
    with progress_bar() as bar:
        task = bar.add_task("samples", total=None)
        report = export_webdataset(
            dataset,
            replace(build, root=str(root.resolve())),
            output,
            samples_per_tar=config.samples_per_tar,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for split, samples in report.samples.items():
        if samples:
            say(f"{split}: {samples} samples in {output / split}-*.tar")
    say(f"{report.built} tars built, {report.reused} reused")


FORMS: dict[str, Callable[[ExportConfig], None]] = {"webdataset": to_webdataset}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(ExportConfig, argv, "Write a dataset in another form.")
    if config.to not in FORMS:
        raise DataError(f"to: {config.to!r} is no form; expected one of {', '.join(FORMS)}")
    FORMS[config.to](config)
    return 0


if __name__ == "__main__":
    run(main)
