"""Convert Pillow's modes to RGB as LLaVA does, or with a view's transparency and depth settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BAND_PIXELS", "Alpha", "Depth", "bands", "to_rgb"]

Alpha: TypeAlias = Literal["ignore", "white", "mean"]
Depth: TypeAlias = Literal["clip", "scale"]

BAND_PIXELS = 2 << 20  # a large image is worked on in bands of rows of so many pixels
NEARLY_ALL = 0.9  # a ramp of 16 bits has 1 pixel in 256 that is not white when it is clipped
_WHITE = (255, 255, 255)


def to_rgb(
    image: Image.Image, *, alpha: Alpha, depth: Depth, fill: tuple[int, int, int]
) -> tuple[Image.Image, bool]:
    """Convert a loaded image to RGB.

    Args:
        image: Any mode.
        alpha: `ignore` transparency, or put the image on `white` or on `fill` (`mean`).
        depth: How values of more than 8 bits are converted: `clip` to 0 to 255, or `scale`, 16 bits
            from their whole range, other integers and floats from their lowest and highest value.
        fill: RGB, 0 to 255.

    Returns:
        The image, and whether its pixels are alike now, all or nearly all, as they were not before.
    """
    source, is_deep = image, image.mode == "F" or image.mode.startswith("I")
    has_alpha = not is_deep and image.has_transparency_data
    if is_deep and depth == "scale":
        is_16 = image.mode.startswith("I;16")
        image = _scaled(image, *((0.0, 65535.0) if is_16 else _range(image)))
    if has_alpha and alpha != "ignore":
        rgb = _over(image, _WHITE if alpha == "white" else fill)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if rgb is source or not (is_deep or has_alpha):
        return rgb, False
    return rgb, _became_flat(source, rgb, is_deep=is_deep)


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in bands of rows, each with the number of its first row."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _over(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image on a ground of one colour."""
    ground = Image.new("RGB", image.size, colour)
    for top, band in bands(image):
        rgba = band.convert("RGBA")
        ground.paste(rgba, (0, top), rgba)
    return ground


def _scaled(image: Image.Image, lowest: float, highest: float) -> Image.Image:
    """One channel of any depth to 8 bits, so that these two values become 0 and 255."""
    scale = 255 / (highest - lowest) if highest > lowest else 0.0
    pixels = np.empty((image.height, image.width), np.uint8)
    for top, band in bands(image):
        values = np.nan_to_num(_values(band).astype(np.float64), nan=lowest)
        scaled = np.rint((np.clip(values, lowest, highest) - lowest) * scale)
        pixels[top : top + band.height] = scaled
    return Image.fromarray(pixels)


def _range(image: Image.Image) -> tuple[float, float]:
    """Lowest and highest value that is a number."""
    found = [values[np.isfinite(values)] for values in (_values(band) for _, band in bands(image))]
    found = [values for values in found if values.size]
    if not found:
        return 0.0, 0.0
    return float(min(v.min() for v in found)), float(max(v.max() for v in found))


def _values(image: Image.Image) -> NDArray[np.generic]:
    return np.asarray(image)


def _became_flat(source: Image.Image, rgb: Image.Image, *, is_deep: bool) -> bool:
    """Whether all pixels, or nearly all, are alike in RGB and are not in the source."""
    after = _flatness(np.array(rgb.histogram()).reshape(3, 256))
    if after < NEARLY_ALL:
        return False
    counts = np.zeros(256, np.int64)
    if is_deep:
        counts += np.array(_scaled(source, *_range(source)).histogram())
    else:
        for _, band in bands(source):
            counts += np.array(band.convert("RGBA").getchannel("A").histogram())
    before = _flatness(counts[None])
    return before < NEARLY_ALL or before < 1 == after


def _flatness(counts_C256: NDArray[np.int64]) -> float:
    """The largest share of pixels within one level of each other, in the channel it is least in."""
    pairs = counts_C256[:, :-1] + counts_C256[:, 1:]
    return float((pairs.max(1) / counts_C256.sum(1)).min())
