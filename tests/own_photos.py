"""Photos that a person might take, drawn: a mug on a table, and what is asked about it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["COLOURS", "SIDES", "Photo", "draw_photo", "own_photos", "write_photos"]

COLOURS = {
    "red": (200, 40, 40), "green": (50, 150, 60), "blue": (50, 80, 190), "yellow": (230, 200, 60),
    "white": (235, 235, 230), "black": (30, 30, 35),
}  # fmt: skip
SIDES = ("left", "right")


@dataclass(frozen=True)
class Photo:
    """A photo and what is to be seen on it.

    Attributes:
        name: File name.
        colour: Of the mug.
        side: Half of the picture that the mug stands in.
    """

    name: str
    colour: str
    side: str

    def questions(self) -> Iterator[tuple[str, str]]:
        """Questions with their answers."""
        yield "What colour is the mug?", self.colour
        yield "On which side is the mug?", self.side


def draw_photo(photo: Photo, seed: int) -> Image.Image:
    """A wall, a table, a mug with a handle, noise: 320x240, the mug of varying size and place."""
    rng = np.random.default_rng(seed)
    wall, table = rng.integers(130, 190, 3), rng.integers(80, 150, 3)
    horizon = int(rng.integers(90, 130))
    pixels = np.empty((240, 320, 3))
    pixels[:horizon], pixels[horizon:] = wall, table
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    width, height = int(rng.integers(70, 100)), int(rng.integers(80, 120))
    left = int(rng.integers(10, 60)) + (150 if photo.side == "right" else 0)
    top = int(rng.integers(60, 110))
    colour = tuple(int(c + rng.integers(-15, 16)) for c in COLOURS[photo.colour])
    handle = (left + width - 12, top + 15, left + width + 22, top + height - 25)
    draw.ellipse(handle, outline=colour, width=9)
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    rim = tuple(c // 2 for c in colour)
    draw.ellipse((left, top - 10, left + width, top + 10), fill=colour, outline=rim, width=3)
    noise = rng.normal(0, 8, (240, 320, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def own_photos(count: int, seed: int = 0) -> list[Photo]:
    """Photos in a random order, colours and sides equally often."""
    kinds = [(colour, side) for colour in COLOURS for side in SIDES]
    order = np.random.default_rng(seed).permutation(count)
    return [Photo(f"IMG_{n:04d}.jpg", *kinds[int(k) % len(kinds)]) for n, k in enumerate(order)]


def write_photos(folder: Path, photos: list[Photo]) -> None:
    """The photos as JPEG, and `captions.csv` with a line a question."""
    folder.mkdir(parents=True)
    for number, photo in enumerate(photos):
        draw_photo(photo, number).save(folder / photo.name, quality=88)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer"])
        rows.writerows((p.name, *pair) for p in photos for pair in p.questions())
