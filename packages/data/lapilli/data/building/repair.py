"""Rebuild missing or damaged shards of a dataset from its sources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from lapilli.data.building.driver import build
from lapilli.data.building.runners import Runner, run_on_ray
from lapilli.data.config import BuildConfig
from lapilli.data.dataset.verify import checksummed
from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import Task
from lapilli.data.shards.manifest import read_manifest

__all__ = [
    "repair_dataset",
]


def repair_dataset(
    path: Output,
    config: BuildConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    damaged: Iterable[str] = (),
    runner: Runner | None = None,
) -> int:
    """Make again, from the sources, the shards that are missing or damaged; the others stay.

    The dataset's own build is run again; every shard must have the SHA-256 that the manifest
    records.

    Args:
        path: The dataset's folder or address.
        config: The settings it was built with, from its `config.json`; a root that has moved is
            given here.
        on_progress: As in `build`.
        damaged: Files of a store that are known to be damaged, which are removed once the sources
            are known to be what they were: a build looks at sizes there, and not at bytes.
        runner: As in `build`.

    Returns:
        The number of shards made.

    Raises:
        DataError: The sources are gone or are not what they were; nothing has been changed then,
            or only the file that was damaged anyway.
    """
    manifest = read_manifest(path)
    plan = plan_build(replace(config, output=str(path)))
    _require_same(path, manifest.plan, plan.digests)
    expected = {shard.path: shard for shard in checksummed(manifest)}
    if isinstance(path, Path):
        _check_links(path, expected)
    else:
        for name in damaged:
            (path / name).unlink(missing_ok=True)

    made_by = runner or partial(run_on_ray, pool=config.build)

    def held_to_manifest(tasks: list[Task], output: Output, workers: int) -> Iterator[ShardFacts]:
        for made in made_by(tasks, output, workers):
            if made != expected.get(made.path):
                raise DataError(
                    f"{path}: {made.path} differs after rebuilding: an image or a library has "
                    "changed since; bring it back, or preprocess into another --output"
                )
            yield made

    report = build(plan, on_progress, runner=held_to_manifest)
    if report.manifest.fingerprint != manifest.fingerprint:
        raise DataError(
            f"{path}: rebuilt, it is another dataset (fingerprint "
            f"{report.manifest.fingerprint[:12]}, it was {manifest.fingerprint[:12]}); runs that "
            "used it cannot go on"
        )
    return report.shards_built


def _require_same(path: Output, before: dict[str, str], now: dict[str, str]) -> None:
    """Stop where inputs or settings are not what a dataset was built of."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise DataError(
            f"{path}: cannot be repaired: not as when it was built: {', '.join(changed)}; "
            "restore these, or preprocess into another --output"
        )


def _check_links(path: Path, names: Iterable[str]) -> None:
    """Refuse to write through a link inside a dataset: it may lead to any folder."""
    for name in names:
        folder = (path / name).parent
        if not folder.resolve().is_relative_to(path.resolve()):
            raise DataError(
                f"{folder}: leads out of the dataset, and nothing is written there; put the folder "
                "itself in the link's place"
            )
