"""Run by `test_hostile_dataset` in a process of its own: flipped bytes may end it.

python -m tests.data.flipped_files DATASET TIMES
"""

from __future__ import annotations

import sys
from pathlib import Path

from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.planning.incremental import read_previous
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.trust import NOTHING
from pipelines.reports.dataset_report import write_dataset_report
from pipelines.reports.describe import describe_dataset
from tests.hostile import flipped, refuses, vouch

__all__ = ["read_all"]


def read_all(dataset: Path) -> None:
    """Read every sample of every view, and what is read of an earlier build."""
    manifest = read_manifest(dataset)
    for view in manifest.views:
        opened = open_dataset(dataset, view=view, image_tokens=4)
        for index in range(len(opened)):
            opened.sample(index)
            opened.sample_id(index)
        opened.token_row(0)
        _ = opened.llava_lengths, opened.template
    read_previous(dataset)


def _main() -> None:
    dataset, times = Path(sys.argv[1]), int(sys.argv[2])
    manifest, config = read_manifest(dataset), read_build_config(dataset, NOTHING)
    shards = [view.shards[0] for view in manifest.views.values()]
    assert manifest.inputs is not None
    names = [one.path for one in (manifest.selection, manifest.inputs, manifest.tokens[0], *shards)]
    refused = read = 0
    for number, name in enumerate([*names, "quarantine.parquet"]):
        data, said = (dataset / name).read_bytes(), (dataset / "manifest.json").read_text()
        for turn, changed in enumerate(flipped(data, times, seed=number)):
            (dataset / name).write_bytes(changed)
            vouch(dataset, name)
            for look in (read_all, describe_dataset):
                is_refused = refuses(lambda look=look: look(dataset), (name, turn))
                refused, read = refused + is_refused, read + (not is_refused)
            if turn % 8 == 0:
                refuses(lambda: write_dataset_report(dataset, config), (name, turn))
        (dataset / name).write_bytes(data)
        (dataset / "manifest.json").write_text(said)
    print(refused, read)


if __name__ == "__main__":
    _main()
