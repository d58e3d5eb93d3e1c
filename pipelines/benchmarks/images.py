"""Images a second on one core: ours, LLaVA's own path and the floor, by turns.

The floor of an image is a bare libjpeg-turbo decoding and one bare bicubic of the same sizes by the
resizer used, each called in the quickest way known. LLaVA's path pads the picture on stock Pillow
and runs transformers' CLIP processor to a normalised tensor. What is told are images a second of
the processor, of one thread that is pinned to a core, and pages of fresh memory an image.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from pipelines.benchmarks.harness import (
    Bar,
    Spread,
    by_turns,
    draw_bars,
    pin_to_one_core,
    provenance,
    publish,
)
from pipelines.benchmarks.material.photos import write_photos
from pipelines.benchmarks.sides import image_sides
from pipelines.benchmarks.sides.image_sides import Apart
from pipelines.cli.command import UsageError, parse, say

__all__ = ["ImagesConfig", "main"]

# width x height: COCO, COCO's tall ones, TextVQA, OCR-VQA, LLaVA's 558K
SHOWN = {
    "side": "side", "images/s": "images_per_cpu_second", "least": "low", "most": "high", "ms": "ms",
    "x LLaVA": "of_llava", "x floor": "time_of_floor", "pages": "faults_per_image",
}  # fmt: skip
SIZES = ("640x480", "480x640", "1024x768", "350x500", "448x336")


@dataclass(frozen=True)
class ImagesConfig:
    """What is measured.

    Attributes:
        sizes: Sizes of the photos, as WIDTHxHEIGHT.
        photos: Photos of each size.
        rounds: Turns that count.
        simd_python: Python of an environment with pillow-simd in Pillow's place (`make simd`);
            without one its sides are left out.
        plot: A PNG, SVG or PDF file for the picture of the first size.
        save: Add rows to `results/images.csv`.
    """

    sizes: tuple[str, ...] = SIZES
    photos: int = 40
    rounds: int = 7
    simd_python: str = ""
    plot: str = ""
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add a row for each size and side."""
    config = parse(ImagesConfig, argv, "Images a second on one core, beside LLaVA's own path.")
    say(f"core {pin_to_one_core()}; {config.photos} photos a size to {image_sides.SIZE} px")
    head = provenance(("torch", "simplejpeg", "pillow", "transformers"), "images", argv)
    for number, size in enumerate(config.sizes):
        rows = measure(config, size)
        ranked = sorted(rows, key=lambda row: -row["images_per_cpu_second"])
        publish("images", head, ranked, SHOWN, title=size, save=config.save)
        if config.plot and not number:
            _draw(Path(config.plot), size, ranked, str(head["processor"]))
    return 0


def measure(config: ImagesConfig, size: str) -> list[dict[str, Any]]:
    """All sides by turns on photos of one size; a row each, ours compared with the two others."""
    width_height = _width_height(size)
    with tempfile.TemporaryDirectory() as scratch, _processes(config.simd_python) as homes:
        folder = Path(scratch)
        write_photos(folder, config.photos, width_height)
        faults: dict[str, list[int]] = {side: [] for side in homes}
        clocks: dict[str, Callable[[], float]] = {
            side: partial(_run, homes[side], side, folder, faults[side]) for side in homes
        }
        rates = {
            side: spread.rate(config.photos)
            for side, spread in by_turns(clocks, config.rounds).items()
        }
    return [
        _row(size, side, rates, config)
        | {"faults_per_image": round(median(faults[side]) / config.photos, 1)}
        for side in rates
    ]


@contextmanager
def _processes(simd_python: str) -> Generator[dict[str, Apart]]:
    """The process in which each side is measured, new for each size."""
    with ExitStack() as stack:

        def start(python: str, *, keeps: bool) -> Apart:
            process = Apart(python, keeps=keeps)
            stack.callback(process.close)
            return process

        ours, llavas = (start(sys.executable, keeps=keeps) for keeps in (True, False))
        homes = {side: llavas if side == "llava" else ours for side in ours.sides}
        if simd_python:
            simd = start(simd_python, keeps=True)
            homes |= {side: simd for side in simd.sides if "simd" in side}
        yield homes


def _run(process: Apart, side: str, folder: Path, faults: list[int]) -> float:
    found = process.spent(side, folder)
    faults.append(found.faults)
    return found.seconds


def _width_height(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise UsageError(f"sizes: {size!r}; expected WIDTHxHEIGHT, e.g. 640x480")
    return int(width), int(height)


def _row(size: str, name: str, rates: dict[str, Spread], config: ImagesConfig) -> dict[str, Any]:
    rate = rates[name]
    floor = rates.get(f"floor {name.split()[1]}") if name.startswith("lapilli") else None
    llava = rates.get("llava")
    return {
        "size": size, "side": name, "photos": config.photos, "rounds": config.rounds,
        "images_per_cpu_second": round(rate.median, 1),
        "low": round(rate.low, 1), "high": round(rate.high, 1),
        "ms": round(1000 / rate.median, 3),
        "of_llava": round(rate.median / llava.median, 2) if llava else "",
        "time_of_floor": round(floor.median / rate.median, 3) if floor else "",
    }  # fmt: skip


def _draw(path: Path, size: str, rows: Sequence[dict[str, Any]], processor: str) -> None:
    bars: list[Bar] = []
    for row in rows:
        name = str(row["side"])
        kind = "ours" if name.startswith("lapilli") else "floor" if "floor" in name else "other"
        note = f"{row['of_llava']:.1f}x" if kind == "ours" and row["of_llava"] else ""
        label = "LLaVA's own path" if name == "llava" else name
        bars.append(Bar.of(row | {"side": label}, "images_per_cpu_second", kind, note))
    best = max(float(bar.note.rstrip("x") or 0) for bar in bars)
    draw_bars(
        path,
        f"{size} photos to 336 px: up to {best:.1f} times LLaVA's own path",
        "images a second, one core",
        bars,
        f"{processor}. Floor: bare libjpeg-turbo and one bare bicubic. Line: least and most.",
    )
