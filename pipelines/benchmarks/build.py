"""Photos to shards of squares on all cores: ours beside what people use today, by turns.

Each side is a process of its own, from `build_sides.py`, with the same photos and the same work.
The floor is a loop on one core that reads, makes square, writes and hashes; as many of them at once
as there are cores say what this machine can do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.benchmarks.harness import (
    Bar,
    Spread,
    by_turns,
    draw_bars,
    provenance,
    publish,
)
from pipelines.benchmarks.material.photos import photo_name, write_photos
from pipelines.benchmarks.sides.build_sides import SIDES, shown_side
from pipelines.cli.command import UsageError, parse, say

__all__ = ["BuildTopicConfig", "main"]

OURS = ("here", "lapilli")
FLOORS = ("bare", "two_bare")
SHOWN = {
    "side": "side", "images/s": "images_per_second", "least": "low", "most": "high",
    "x two bare loops": "of_two_bare", "MB written": "megabytes",
}  # fmt: skip
ON_PILLOW = ("plain_pillow",)  # whatever the work of the others


@dataclass(frozen=True)
class BuildTopicConfig:
    """What is measured.

    Attributes:
        folder: Keeps the photos between runs; else they are made anew.
        photos: Distinct photos of 640x480.
        images: Images that are built; above `photos`, links to them under other names.
        rounds: Turns that count.
        work: `best`, lapilli's own, or `pillow`, as people write it; the plain pipeline is run both
            ways beside `best`.
        sides: Which ones; empty takes all.
        workers: Processes; 0 takes every core.
        warm: Run each side once before, uncounted.
        plot: A PNG, SVG or PDF file for the picture.
        save: Add rows to `results/build.csv`.
    """

    folder: str = ""
    photos: int = 3000
    images: int = 6000
    rounds: int = 3
    work: str = "best"
    sides: tuple[str, ...] = ()
    workers: int = 0
    warm: bool = False
    plot: str = ""
    save: bool = True

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.work not in ("best", "pillow"):
            raise UsageError(f"work: {self.work!r}; expected best or pillow")
        for side in self.sides:
            if side not in SIDES:
                raise UsageError(f"sides: {side!r}; expected some of {', '.join(SIDES)}")


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each side."""
    config = parse(BuildTopicConfig, argv, "Images a second into shards, beside other systems.")
    head = provenance(("ray", "torch", "pyarrow", "simplejpeg", "pillow"), "build", argv)
    if config.folder:
        Path(config.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.folder or None) as scratch:
        photos = Path(config.folder or scratch) / "photos"
        rows = measure(config, photos, Path(scratch))
    ranked = sorted(rows, key=lambda row: -row["images_per_second"])
    title = f"{config.images:,} photos of 640x480, work: {config.work}"
    publish("build", head, ranked, SHOWN, title=title, save=config.save)
    for row in rows:
        if row["cold_seconds"]:
            say(
                f"{row['side']}: {row['cold_seconds']} s where its workers start first; Ray's own "
                f"processes took {row['rays_own_seconds']} processor seconds of the others"
            )
    if config.plot:
        _draw(Path(config.plot), config, ranked, str(head["processor"]))
    return 0


def measure(config: BuildTopicConfig, photos: Path, scratch: Path) -> list[dict[str, Any]]:
    """All sides by turns; what cannot run here is named and left out."""
    _make_photos(config, photos)
    only_best = OURS + ON_PILLOW
    sides = [s for s in config.sides or SIDES if config.work == "best" or s not in only_best]
    settings = {
        "photos": str(photos),
        "count": config.images,
        "work": config.work,
        "workers": config.workers or os.cpu_count() or 1,
    }
    extras: dict[str, list[dict[str, float]]] = {side: [] for side in sides if _is_here(side)}
    clocks: dict[str, Callable[[], float]] = {
        side: partial(_run, side, settings, scratch / "out", extras[side]) for side in extras
    }
    spreads = by_turns(clocks, config.rounds, warm=config.warm)
    return [
        _row(side, spread.rate(config.images), spreads, extras[side], config)
        for side, spread in spreads.items()
    ]


def _make_photos(config: BuildTopicConfig, photos: Path) -> None:
    distinct = min(config.photos, config.images)
    write_photos(photos, distinct, (640, 480))
    for number in range(distinct, config.images):
        link = photos / photo_name(number)
        if not link.exists():
            os.link(photos / photo_name(number % distinct), link)


PACKAGES = {"datasets": "datasets", "mosaic": "streaming", "litdata": "litdata"}


def _is_here(side: str) -> bool:
    """Whether what a side needs is installed; says so where it is not."""
    package = PACKAGES.get(side)
    if package is None or importlib.util.find_spec(package):
        return True
    say(f"{side}: left out, {package} is not installed; see README for an environment that has it")
    return False


def _run(
    side: str, settings: dict[str, Any], output: Path, extras: list[dict[str, float]]
) -> float:
    """A side in a process of its own; keeps what else it says, and how much it wrote."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    given = json.dumps(settings | {"output": str(output)})
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.benchmarks.sides.build_sides", side, given],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise UsageError(f"{side}: ended with exit code {done.returncode}: {last[0]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    found["bytes"] = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    extras.append(found)
    shutil.rmtree(output)
    return found["seconds"]


def _row(
    side: str, rate: Spread, spreads: dict[str, Spread], extras: list[dict[str, float]],
    config: BuildTopicConfig,
) -> dict[str, Any]:  # fmt: skip
    def middle(name: str) -> float | str:
        values = [extra[name] for extra in extras if name in extra]
        return round(Spread.of(values).median, 2) if values else ""

    two = spreads.get("two_bare")
    return {
        "side": shown_side(side), "work": "pillow" if side in ON_PILLOW else config.work,
        "images": config.images, "distinct": min(config.photos, config.images),
        "workers": config.workers or os.cpu_count(), "rounds": config.rounds,
        "images_per_second": round(rate.median, 1),
        "low": round(rate.low, 1), "high": round(rate.high, 1),
        "of_two_bare": round(rate.median * two.median / config.images, 3) if two else "",
        "megabytes": round(Spread.of([extra["bytes"] for extra in extras]).median / 1e6),
        "cold_seconds": middle("cold_seconds"), "rays_own_seconds": middle("rays_own_seconds"),
    }  # fmt: skip


def _draw(
    path: Path, config: BuildTopicConfig, rows: Sequence[dict[str, Any]], processor: str
) -> None:
    names = {shown_side(side): side for side in SIDES}
    bars = [
        Bar.of(
            row,
            "images_per_second",
            "ours"
            if (side := names[row["side"]]) in OURS
            else "floor"
            if side in FLOORS
            else "other",
        )
        for row in rows
    ]
    cores = config.workers or os.cpu_count()
    draw_bars(
        path, f"640x480 photos to shards of 336 px on {cores} cores", "images a second", bars,
        f"{processor}. The same work for all ({config.work}) but where Pillow is named. "
        "Line: least and most of a side.",
    )  # fmt: skip
