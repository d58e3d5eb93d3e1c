"""Distinct photos of a size as JPEG files: pieces of scikit-image's and scikit-learn's photos."""

from __future__ import annotations

import importlib.util
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

from PIL import Image

from pipelines.cli.command import UsageError

__all__ = ["photo_name", "sources", "write_photos"]

# In the package's folder, the photos; which are drawn follows from the seed, so all are needed.
PHOTOS = {
    "skimage": (
        "data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/hubble_deep_field.jpg",
        "data/ihc.png", "data/motorcycle_left.png", "data/retina.jpg", "data/rocket.jpg",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}  # fmt: skip
NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
QUALITY = 90
AT_ONCE = 250


def photo_name(number: int) -> str:
    """The file of photo `number`, in COCO's manner."""
    return f"{number:012d}.jpg"


def write_photos(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> int:
    """Write what is missing of `count` photos of `size` (width, height); returns their bytes.

    Raises:
        UsageError: scikit-image or scikit-learn is not installed.
    """
    sources()
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [n for n in range(count) if not (folder / photo_name(n)).exists()]
    parts = [numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_write, folder, size, seed), parts))
    return sum((folder / photo_name(n)).stat().st_size for n in range(count))


@cache
def sources() -> tuple[Path, ...]:
    """Every photo's file; the packages themselves are not imported."""
    files: list[Path] = []
    for package, photos in PHOTOS.items():
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise UsageError(
                f"photos: {NAMES[package]} is not installed; pip install -e '.[bench]'"
            )
        files += (Path(found.origin).parent / photo for photo in photos)
    return tuple(files)


@cache
def _photo(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _write(folder: Path, size: tuple[int, int], seed: int, numbers: list[int]) -> None:
    for number in numbers:
        temporary = folder / f".{photo_name(number)}.{os.getpid()}"
        _piece(size, random.Random(f"{seed}/{number}")).save(temporary, "JPEG", quality=QUALITY)
        temporary.replace(folder / photo_name(number))


def _piece(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A piece of a photo in the proportions of `size`, at least half of what fits, scaled to it."""
    photo = _photo(rng.choice(sources()))
    scale = rng.uniform(0.5, 1.0) * min(photo.width / size[0], photo.height / size[1])
    width, height = int(size[0] * scale), int(size[1] * scale)
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    piece = photo.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece
