"""Encodings of stored pixels: raw, or JPEG with its measured error."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL
from PIL import Image, features

from lapilli.data.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ORIGINAL",
    "Encoding",
    "decode_pixels",
    "encode_pixels",
    "encoding_error",
    "estimated_bytes",
    "pixel_error",
]

ORIGINAL = "original"


@dataclass(frozen=True)
class Encoding:
    """How the pixels of a view are stored in its shards.

    Attributes:
        kind: `raw` is uint8 height x width x RGB, read without any work; `jpeg` takes a tenth of
            the disk and is decoded whenever it is read; `original`, the bytes of the source, is
            set by `keep_original`.
        quality: Of `jpeg`, 1 to 100. Chroma is kept whole (4:4:4).
    """

    kind: Literal["raw", "jpeg", "original"] = "raw"
    quality: int = 95

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if not 1 <= self.quality <= 100:
            raise DataError(f"encodings.quality: {self.quality}; expected 1 to 100, e.g. 95")

    def describe(self) -> str:
        """The encoding with what decides its bytes."""
        if self.kind != "jpeg":
            return self.kind
        return f"jpeg {self.quality} by pillow {PIL.__version__} ({_libjpeg()})"


def _libjpeg() -> str:
    name = "libjpeg_turbo"
    version = features.version_feature(name) if features.check_feature(name) else None
    return f"libjpeg-turbo {version}" if version else f"libjpeg {features.version_codec('jpg')}"


def encode_pixels(pixels: NDArray[np.uint8], encoding: Encoding) -> dict[str, Any]:
    """The columns of an image row that the encoding decides.

    Args:
        pixels: uint8 [height, width, 3].
        encoding: `raw` or `jpeg`.

    Returns:
        `pixels`, the bytes to store; for `jpeg` also `absolute_error` and `squared_error`, summed
        over the values (0 to 255), and `worst_error`, the largest.
    """
    if encoding.kind == "raw":
        return {"pixels": pixels.tobytes()}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=encoding.quality, subsampling=0)
    data = buffer.getvalue()
    return {"pixels": data, **pixel_error(decode_pixels(data, "jpeg"), pixels)}


def pixel_error(pixels: NDArray[np.uint8], exact: NDArray[np.uint8]) -> dict[str, int]:
    """The error of pixels: `absolute_error`, `squared_error` (both summed), `worst_error`."""
    flat = np.abs(pixels.astype(np.int16) - exact).ravel().astype(np.int64)
    return {
        "absolute_error": int(flat.sum()),
        "squared_error": int(flat @ flat),
        "worst_error": int(flat.max()),
    }


def decode_pixels(data: Any, kind: str, side: int = 0) -> NDArray[np.uint8]:
    """Stored JPEG bytes (any buffer) to uint8 [height, width, 3].

    Args:
        data: The bytes.
        kind: How they are encoded.
        side: Expected side of the square in pixels, checked before decoding; 0 for any.

    Raises:
        DataError: `kind` is not `jpeg`, or the bytes are not a JPEG of that side.
    """
    if kind != "jpeg":
        raise DataError(f"encoding: {kind!r} holds no squares of pixels; open another view")
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if side and image.size != (side, side):
                raise DataError(f"encoding: a JPEG of {image.size}, expected {side} x {side} px")
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"encoding: a stored image is no whole JPEG ({error})") from None


def estimated_bytes(values: int, encoding: Encoding) -> int:
    """Estimate the bytes of an image with this many values, for the disk check before a build.

    Padded photos of 336 px (75 pieces of scikit-image's) took 0.06, 0.09 and 0.13 of their raw
    bytes at qualities 80, 90 and 95, the largest 0.18. Detailed images take more; the estimate is
    high on purpose.
    """
    if encoding.kind != "jpeg":
        return values
    return int(values * (0.35 if encoding.quality > 90 else 0.25))


def encoding_error(rows: Iterable[tuple[int, int, int]], values: int) -> dict[str, float]:
    """The error of a view stored as JPEG or decoded fast, over all images that have one.

    Args:
        rows: Absolute, squared and worst error of each image, as `pixel_error` has them.
        values: Values (pixels x channels) of an image.

    Returns:
        `mean` (absolute, 0 to 255), `psnr` in dB (10 log10(255^2 / mean square)), `worst`.
    """
    table = np.array(list(rows), np.int64).reshape(-1, 3)
    if not len(table):
        return {}
    absolute, squared = (float(column.sum()) / (len(table) * values) for column in table.T[:2])
    psnr = 10 * math.log10(255**2 / squared) if squared else math.inf
    return {
        "mean": round(absolute, 4),
        "psnr": round(min(psnr, 999.0), 2),
        "worst": int(table[:, 2].max()),
    }
