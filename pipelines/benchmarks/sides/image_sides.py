"""What is measured of images: ours, LLaVA's own path, and the floors; here or in another process.

Pillow and pillow-simd cannot be loaded together, so one of them may be in a process of another
environment, which is asked over a pipe: a line `SIDE FOLDER` in, seconds and page faults back.
Ours and the floors have C's allocator set as a build's workers have; LLaVA's path has it as it is.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from lapilli.data.images.buffers import keep_freed
from lapilli.data.images.codecs import Resizer, is_simd
from lapilli.data.images.view import ImageSpec, prepare
from pipelines.cli.command import UsageError

__all__ = ["FILL", "SIZE", "Apart", "Spent", "llava_pixels", "llava_square", "sides", "spent"]

SIZE = 336
FILL = (122, 116, 104)  # CLIP's mean, LLaVA's colour of padding
PILLOWS_PIXEL = 4  # bytes that Pillow keeps of an RGB pixel
Work = Callable[[bytes], object]


def sides() -> dict[str, Work]:
    """What this process can measure, by name."""
    plain: Resizer = "simd" if is_simd() else "pillow"
    found: dict[str, Work] = {}
    for resizer in ("torch", plain):
        for mode in ("exact", "fast"):
            spec = ImageSpec(size=SIZE, fill=FILL, resizer=resizer, mode=mode)
            found[f"lapilli {resizer} {mode}"] = partial(prepare, spec=spec)
    found[f"floor {plain}"] = _floor_pillow
    found["floor torch"] = _floor_torch
    if not is_simd():
        found["llava"] = llava_pixels
    return found


@dataclass(frozen=True)
class Spent:
    """What a side needs for a folder's files: seconds of the processor, pages of fresh memory."""

    seconds: float
    faults: int


def spent(side: str, folder: Path) -> Spent:
    """Let this thread work through a folder's files."""
    work = sides()[side]
    files = _files(folder)
    started, faults = time.thread_time(), _faults()
    for data in files:
        work(data)
    return Spent(time.thread_time() - started, _faults() - faults)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@cache
def _files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]


def llava_square(data: bytes, size: int = SIZE) -> Image.Image:
    """LLaVA's pad-then-resize on Pillow: onto a square of the mean's colour, then bicubic."""
    import io

    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), FILL)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.resize((size, size), Image.Resampling.BICUBIC)


def llava_pixels(data: bytes) -> Any:
    """LLaVA's whole path of an image: padded, then CLIP's processor, to a normalised tensor."""
    import io

    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), FILL)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return _processor()(canvas, return_tensors="pt")["pixel_values"][0]


@cache
def _processor() -> Any:
    from transformers.models.clip import image_processing_pil_clip as clip

    return clip.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )


def _scaled(width: int, height: int) -> tuple[int, int]:
    longest = max(width, height)
    return max(1, width * SIZE // longest), max(1, height * SIZE // longest)


def _floor_torch(data: bytes) -> object:
    """A bare decoding and one bare bicubic, called in the quickest way known: no padding."""
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    height, width = pixels.shape[:2]
    across, down = _scaled(width, height)
    # strides of a whole batch: only so does torch see channels-last, and copies nothing
    tensor = torch.from_numpy(pixels.reshape(1, height, width, 3)).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(
        tensor, (down, across), mode="bicubic", antialias=True, align_corners=False
    )


def _floor_pillow(data: bytes) -> object:
    """The same with Pillow, which is handed the decoder's memory as its own."""
    import pyarrow as pa

    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGBX")
    height, width = pixels.shape[:2]
    values = pa.Array.from_buffers(pa.uint8(), pixels.size, [None, pa.py_buffer(pixels)])
    kind = pa.list_(pa.uint8(), PILLOWS_PIXEL)
    whole = pa.Array.from_buffers(kind, height * width, [None], children=[values])
    image = Image.fromarrow(whole, "RGB", (width, height))
    return image.resize(_scaled(width, height), Image.Resampling.BICUBIC)


class Apart:
    """Sides that are measured in a process of their own, perhaps of another environment."""

    def __init__(self, python: str, *, keeps: bool) -> None:
        """Start it.

        Args:
            python: Its Python.
            keeps: Whether C's allocator keeps what is freed, as in a build's workers.

        Raises:
            UsageError: It does not start.
        """
        self._process = subprocess.Popen(
            [python, "-m", "pipelines.benchmarks.sides.image_sides", "keep" if keeps else "plain"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.sides = self._read().split(",")

    def spent(self, side: str, folder: Path) -> Spent:
        """As the function of that name, over there."""
        assert self._process.stdin
        self._process.stdin.write(f"{side}\t{folder}\n")
        self._process.stdin.flush()
        seconds, faults = self._read().split()
        return Spent(float(seconds), int(faults))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line:
            raise UsageError(
                f"simd_python: {self._process.args} ended with exit code {self._process.wait()}; "
                "expected a Python with pillow-simd and lapilli's own packages"
            )
        return line


def _serve(lines: Iterable[str]) -> None:
    print(",".join(sides()), flush=True)
    for line in lines:
        side, folder = line.rstrip("\n").split("\t")
        found = spent(side, Path(folder))
        print(found.seconds, found.faults, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["keep"]:
        keep_freed()
    _serve(sys.stdin)
