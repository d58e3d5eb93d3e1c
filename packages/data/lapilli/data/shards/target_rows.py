"""How a teacher's features are stored: 8 bits and a scale a row, or bf16. Pure.

Shape suffix legend: N images, R rows, C width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["decode_rows", "encode_rows", "pool_rows", "stored_rows"]

MOST = 127


def encode_rows(
    rows_RC: NDArray[np.float32], storage: Literal["int8", "bf16"]
) -> tuple[bytes, bytes]:
    """Features and scales as they are stored; bf16 has no scales. Rounds to the nearest, even."""
    if storage == "bf16":
        bits = np.ascontiguousarray(rows_RC, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes(), b""
    scales_R = (np.abs(rows_RC).max(1) / MOST).astype("<f4")
    with np.errstate(divide="ignore", invalid="ignore"):
        values_RC = np.where(scales_R[:, None] > 0, rows_RC / scales_R[:, None], 0.0)
    return np.rint(values_RC).clip(-MOST, MOST).astype(np.int8).tobytes(), scales_R.tobytes()


def stored_rows(
    features: NDArray[np.uint8], scales: NDArray[np.uint8], rows: int, width: int
) -> tuple[NDArray[np.int8] | NDArray[np.uint16], NDArray[np.float32]]:
    """What is stored of an image: int8 or the bits of bf16 [rows, width], and fp32 [rows] scales.

    Raises:
        ValueError: Another number of bytes.
    """
    bytes_each = 1 if len(scales) else 2
    if len(features) != rows * width * bytes_each or len(scales) not in (0, 4 * rows):
        raise ValueError(f"{len(features)} and {len(scales)} bytes for {rows} x {width} numbers")
    if not len(scales):
        return features.view(np.uint16).reshape(rows, width), np.ones(rows, np.float32)
    return features.view(np.int8).reshape(rows, width), scales.view(np.float32)


def decode_rows(
    values_RC: NDArray[np.int8] | NDArray[np.uint16], scales_R: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The features, fp32."""
    if values_RC.dtype == np.uint16:
        return (values_RC.astype(np.uint32) << 16).view(np.float32)
    return values_RC.astype(np.float32) * scales_R[:, None]


def pool_rows(rows_NRC: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Means of square blocks of a square grid of rows: [N, R / block^2, C]."""
    count, rows, width = rows_NRC.shape
    side = round(rows**0.5) // block
    grid = rows_NRC.reshape(count, side, block, side, block, width)
    return grid.mean((2, 4), dtype=np.float32).reshape(count, side * side, width)
