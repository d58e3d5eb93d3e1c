"""`ImageSpec` and `prepare`: turn an image's bytes into a square of pixels. Pure."""

from __future__ import annotations

import functools
import io
import re
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image, UnidentifiedImageError

from lapilli.data.errors import DataError
from lapilli.data.images.codecs import Resizer, resolve_resizer
from lapilli.data.images.pixel_modes import BAND_PIXELS, Alpha, Depth, bands, to_rgb
from lapilli.data.images.side_data import without_side_data
from lapilli.data.io.file_kinds import what_it_is_instead
from lapilli.data.io.typed_json import JsonError, as_type
from lapilli.data.record import Reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BadImage", "Decoded", "ImageSpec", "Note", "decode", "prepare", "square"]


PILLOWS_PIXEL = pa.list_(pa.uint8(), 4)  # Pillow keeps a byte behind each RGB that means nothing

# Above this many pixels Pillow itself refuses a file as a decompression bomb.
PILLOW_LIMIT = 178_956_970
MOST_PIXELS = 2**31 - 1  # Pillow's sizes are C's int

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageSpec:
    """A view: how an image becomes a square of `size` x `size` pixels.

    Attributes:
        size: Side of the square, in pixels.
        fill: RGB colour of the padding, 0 to 255; in a recipe `mean` too, that of `tower`, which
            `preprocess` replaces by its numbers. CLIP's mean is (122, 116, 104).
        aspect: `pad` to a square (LLaVA's 665K stage), `crop` the centre after resizing the short
            side (its 558K stage), or `stretch`.
        mode: `exact` decodes every pixel; `fast` lets the JPEG decoder scale down first.
        resizer: `pillow` gives LLaVA's pixels bit for bit; `simd` and `torch` equal each other and
            differ from Pillow's by 1 of 255 in 0.3 % of a photo's values, by 2 in one of 1.5
            million; `auto` takes torch, or simd where torch is not installed.
        orient: `ignore` the EXIF orientation as LLaVA does, or follow it (`exif`).
        max_pixels: An image that would need more pixels in memory at any step, the strips between
            two passes included, is `image_too_large`.
        alpha: `ignore` transparency as LLaVA does, or put the image on `white` or on `fill`
            (`mean`).
        depth: `clip` values of more than 8 bits to 0 to 255 as LLaVA does, or `scale` them: 16
            bits from their whole range, other integers and floats from their lowest and highest.
        tower: Whose mean `fill: mean` is: `clip`, `siglip`, `dinov2`, or a vision model's hub name
            or folder.
    """

    size: int
    fill: tuple[int, int, int] | Literal["mean"]
    aspect: Literal["pad", "crop", "stretch"] = "pad"
    mode: Literal["exact", "fast"] = "exact"
    resizer: Literal["auto", "pillow", "simd", "torch"] = "auto"
    orient: Literal["ignore", "exif"] = "ignore"
    max_pixels: int = PILLOW_LIMIT
    alpha: Alpha = "ignore"
    depth: Depth = "clip"
    tower: str = ""

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if self.size < 1:
            raise DataError(f"size: {self.size}; expected a number of pixels, at least 1")
        if self.fill == "mean":
            if not self.tower:
                raise DataError(
                    "fill: mean without a tower; set tower beside it to clip, siglip, dinov2 or a "
                    "vision model's hub name or folder, or fill to three numbers from 0 to 255"
                )
        elif self.tower:
            raise DataError(f"tower: {self.tower!r} is for fill: mean alone; leave it out")
        elif len(self.fill) != 3 or not all(0 <= channel <= 255 for channel in self.fill):
            raise DataError(f"fill: {self.fill}; expected three numbers from 0 to 255, or mean")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise DataError(f"max_pixels: {self.max_pixels}; expected 1 to {MOST_PIXELS}")

    @property
    def colour(self) -> tuple[int, int, int]:
        """RGB of the padding.

        Raises:
            DataError: The fill is still a tower's `mean`.
        """
        if self.fill == "mean":
            raise DataError(f"fill: mean of {self.tower}; expected its numbers, as preprocess sets")
        return self.fill

    def facts(self) -> dict[str, Any]:
        """The settings as a dataset stores them; those in `LATER` only if they are set.

        Raises:
            DataError: As `colour`.
        """
        unset = {name for name, default in LATER.items() if getattr(self, name) == default}
        found = asdict(self) | {"fill": self.colour}
        return {name: value for name, value in found.items() if name not in unset}

    @staticmethod
    def of(facts: Mapping[str, Any]) -> ImageSpec:
        """The view of a dataset's or a model's facts.

        Raises:
            DataError: A setting that this version does not know, or a wrong value.
        """
        unknown = sorted(set(facts) - {field.name for field in fields(ImageSpec)})
        if unknown:
            raise DataError(
                f"view: setting {unknown[0]!r} is unknown here; expected one of "
                f"{', '.join(field.name for field in fields(ImageSpec))}; use the version of "
                "lapilli that made it"
            )
        try:
            fill = facts.get("fill", ())
            return as_type({**facts, "fill": fill if fill == "mean" else [*fill]}, ImageSpec)
        except (JsonError, TypeError) as error:
            raise DataError(f"view: {error}") from None


LATER = {"alpha": "ignore", "depth": "clip", "tower": ""}
"""Settings that came later, by their default: a view that leaves them is what it was before."""


class Note(StrEnum):
    """What was unusual about an image that is used; a closed list, which reports rely on."""

    FLAT = "flat_after_conversion"  # all pixels or nearly all alike in RGB, and not in the file
    SIDE_DATA = "side_data_ignored"  # damaged or overlong data beside the pixels


class BadImage(Exception):
    """An image that cannot be used: the reason and a detail. Its record is quarantined."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Decoded:
    """Decoded RGB pixels, and the size of the source before any scaling.

    `image` is uint8 [height, width, 3], or [height, width, 4] as Pillow has it in memory.
    """

    image: NDArray[np.uint8]
    source_width: int
    source_height: int
    notes: tuple[Note, ...] = ()


def decode(data: bytes, spec: ImageSpec, resizer: Resizer = "torch") -> Decoded:
    """Decode `data` to RGB; the format is found by content.

    The pixel count is checked from the header, before anything is decoded. Pillow reads the header
    and decides whether it is an image. JPEGs that libjpeg-turbo warns about, and all other formats,
    are decoded by Pillow; what Pillow rejects is tried once more without its side data.

    Args:
        data: A file's bytes.
        spec: The view; its size and aspect bound the scaling of mode `fast`.
        resizer: Which resizer takes the pixels: `torch` takes three bytes each, Pillow four.

    Raises:
        BadImage: `image_too_large` or `image_undecodable`.
    """
    try:
        return _decode(data, spec, resizer)
    except BadImage as bad:
        bare = without_side_data(data) if bad.reason == Reason.IMAGE_UNDECODABLE else None
        if bare is None:
            raise
        try:
            decoded = _decode(bare, spec, resizer)
        except BadImage as worse:
            raise (worse if worse.reason == Reason.IMAGE_TOO_LARGE else bad) from None
    return replace(decoded, notes=(*decoded.notes, Note.SIDE_DATA))


def _decode(data: bytes, spec: ImageSpec, resizer: Resizer) -> Decoded:
    notes: tuple[Note, ...] = ()
    try:
        with _pillow_bound(spec), Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            _check_size(width, height, spec)
            pixels = _decode_jpeg(data, image, spec, "RGB" if resizer == "torch" else "RGBX")
            if pixels is None:
                rgb, is_flat = _decode_with_pillow(image, spec)
                pixels = _pixels(rgb) if resizer == "torch" else _from_pillow(rgb)
                notes = (Note.FLAT,) if is_flat else ()
            if spec.orient == "exif":
                pixels = _upright(pixels, image)
            return Decoded(pixels, width, height, notes)
    except Image.DecompressionBombError as error:
        raise BadImage(Reason.IMAGE_TOO_LARGE, _describe(error)) from None
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly any class on damaged input
        instead = isinstance(error, UnidentifiedImageError) and what_it_is_instead(data, "image")
        detail = f"{len(data)} bytes: {instead or _describe(error)}"
        raise BadImage(Reason.IMAGE_UNDECODABLE, detail) from None


def _decode_jpeg(
    data: bytes, header: Image.Image, spec: ImageSpec, layout: Literal["RGB", "RGBX"]
) -> NDArray[np.uint8] | None:
    """A JPEG's pixels straight from libjpeg-turbo, which are Pillow's; None leaves it to Pillow."""
    if header.format not in ("JPEG", "MPO") or header.mode not in ("RGB", "L"):
        return None  # CMYK and YCCK become RGB in Pillow's own way
    width, height = header.size
    options: dict[str, Any] = {}
    if spec.mode == "fast":
        step = _scale_down(width, height, spec)
        least = {"min_width": -(-width // step), "min_height": -(-height // step)}
        options = {"fastdct": True, "fastupsample": True} | (least if step > 1 else {})
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, layout, strict=True, **options)
    except ValueError:  # damaged, truncated or odd
        return None
    return pixels if spec.mode == "fast" or pixels.shape[:2] == (height, width) else None


def _decode_with_pillow(image: Image.Image, spec: ImageSpec) -> tuple[Image.Image, bool]:
    """RGB, and whether converting has made it one colour."""
    if spec.mode == "fast":
        image.draft("RGB", _least_size(*image.size, spec))
    image.load()
    _check_size(*image.size, spec)  # an icon may hold more than its header says
    return to_rgb(image, alpha=spec.alpha, depth=spec.depth, fill=spec.colour)


@contextmanager
def _pillow_bound(spec: ImageSpec) -> Generator[None]:
    """Raise Pillow's process-wide bound on pixels to what the view allows."""
    if spec.max_pixels <= PILLOW_LIMIT:
        yield
        return
    with _BOUND:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = spec.max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


_BOUND = threading.Lock()


@functools.cache
def _formats() -> list[str]:
    """All formats that Pillow reads by itself: for EPS it would run Ghostscript on the file."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _describe(error: Exception) -> str:
    """A Pillow error as text that is equal in every process, since it is stored in a shard."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format that is known"
    message = re.sub(r"0x[0-9a-fA-F]{6,}", "0x...", " ".join(str(error).split()))
    return f"{type(error).__name__}: {message}"


def _check_size(width: int, height: int, spec: ImageSpec) -> None:
    """Refuse an image that would need more than `max_pixels` at any step on its way."""
    if width < 1 or height < 1:
        raise BadImage(Reason.IMAGE_UNDECODABLE, f"{width}x{height} pixels")
    needed, side = width * height, max(width, height)
    if spec.aspect == "pad":
        needed = max(needed, side * min(side, spec.size))
    elif spec.aspect == "crop":  # across a row at a time, then down as a whole
        short = min(width, height)
        needed = max(needed, spec.size * width // short, spec.size * (spec.size * height // short))
    if needed > spec.max_pixels:
        detail = f"{width}x{height} needs {needed} pixels, over max_pixels {spec.max_pixels}"
        raise BadImage(Reason.IMAGE_TOO_LARGE, detail)


def _least_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """The least width and height of a scaled decoding: what the view needs."""
    if spec.aspect != "pad":
        return spec.size, spec.size
    longest = max(width, height)
    return -(-spec.size * width // longest), -(-spec.size * height // longest)


def _scale_down(width: int, height: int, spec: ImageSpec) -> int:
    """By how much a JPEG may be scaled while it is decoded: 8, 4, 2, or 1 for not at all.

    libjpeg-turbo has SIMD code for these; 5/8 and its like are no faster than a whole decoding.
    """
    least_width, least_height = _least_size(width, height, spec)
    fitting = (n for n in (8, 4, 2) if width >= n * least_width and height >= n * least_height)
    return next(fitting, 1)


def _upright(pixels: NDArray[np.uint8], header: Image.Image) -> NDArray[np.uint8]:
    """Turn the picture as its EXIF says; an EXIF block that cannot be read says nothing."""
    try:
        step = UPRIGHT.get(header.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # as in `decode`: damaged blocks raise nearly any class
        return pixels
    if step is None:
        return pixels
    turned = _to_pillow(pixels).transpose(step)
    return np.asarray(turned) if pixels.shape[2] == 3 else _from_pillow(turned)


def square(image: NDArray[np.uint8], spec: ImageSpec, resizer: Resizer) -> NDArray[np.uint8]:
    """Make an RGB image square as LLaVA does: pad then resize, or resize then crop.

    Bicubic with antialiasing, across first and then down, with 8 bits between. Pillow 9.5 to 12.1
    and torch do so too; Pillow 13 takes some tall images vertically first, up to 18 off at hard
    edges. Since the passes are apart, rows of padding need no pass across, and columns that are
    cut off none down: the pixels are those of the whole.

    Args:
        image: uint8 [height, width, 3 or 4], as `decode` gives it to this resizer.
        spec: The view.
        resizer: Who computes a pass.

    Returns:
        uint8 [size, size, 3].
    """
    pixels = _square(image, spec, resizer)
    return pixels if pixels.shape[2] == 3 else np.asarray(_to_pillow(pixels))


def _square(image: NDArray[np.uint8], spec: ImageSpec, resizer: Resizer) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    size = spec.size
    if spec.aspect == "stretch":
        return _down(_across(image, size, resizer), size, resizer)
    if spec.aspect == "crop":
        short = min(width, height)
        long_width, long_height = size * width // short, size * height // short
        top, left = (long_height - size) // 2, (long_width - size) // 2

        def cut(band: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return _across(band, long_width, resizer)[:, left : left + size]

        across = _by_bands(image, max(width, long_width), spec, cut)
        return _down(np.ascontiguousarray(across), long_height, resizer)[top : top + size]
    side = max(width, height)

    def pad(band: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return _across(_centre(band, len(band), side, spec.colour), size, resizer)

    across = _by_bands(image, side, spec, pad)
    return _down(_centre(across, side, size, spec.colour), size, resizer)


def _by_bands(
    image: NDArray[np.uint8],
    row_pixels: int,
    spec: ImageSpec,
    across: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
) -> NDArray[np.uint8]:
    """Resize horizontally in bands of rows, whose number is bounded."""
    # a multiple of the 4 rows that SIMD code takes at once
    rows = max(4, min(BAND_PIXELS, spec.max_pixels) // row_pixels // 4 * 4)
    if len(image) <= rows:
        return across(image)
    first = across(image[:rows])
    _, columns, channels = first.shape
    whole = np.empty((len(image), columns, channels), np.uint8)
    whole[:rows] = first
    for top in range(rows, len(image), rows):
        # a small band may be in Pillow's memory where a large one was not
        whole[top : top + rows] = across(image[top : top + rows])[..., :channels]
    return whole


def _centre(
    image: NDArray[np.uint8], height: int, width: int, fill: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """The image in the middle of a canvas of `fill`; the odd pixel goes to the far side."""
    rows, columns, channels = image.shape
    if (rows, columns) == (height, width):
        return image
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas = np.empty((height, width, channels), np.uint8)
    colour = np.array([*fill, 0][:channels], np.uint8)
    line = np.tile(colour, (width, 1))  # whole rows are copied fast, pixels not
    canvas[:top] = line
    canvas[top + rows :] = line
    middle = canvas[top : top + rows]
    middle[:, :left] = line[:left]
    middle[:, left + columns :] = line[left + columns :]
    middle[:, left : left + columns] = image
    return canvas


def _across(image: NDArray[np.uint8], width: int, resizer: Resizer) -> NDArray[np.uint8]:
    """Resize horizontally."""
    return _resize(image, width, image.shape[0], resizer)


def _down(image: NDArray[np.uint8], height: int, resizer: Resizer) -> NDArray[np.uint8]:
    """Resize vertically."""
    return _resize(image, image.shape[1], height, resizer)


def _resize(
    image: NDArray[np.uint8], width: int, height: int, resizer: Resizer
) -> NDArray[np.uint8]:
    """One pass; uint8 [height, width, 3 or 4]."""
    if image.shape[:2] == (height, width):
        return image
    if resizer == "torch":
        return _resize_with_torch(image, width, height)
    return _from_pillow(_to_pillow(image).resize((width, height), Image.Resampling.BICUBIC))


def _to_pillow(image: NDArray[np.uint8]) -> Image.Image:
    """RGB for Pillow, without a copy where it is laid out as Pillow's own memory is."""
    height, width, channels = image.shape
    if channels == 3:
        return Image.fromarray(image)
    values = pa.Array.from_buffers(pa.uint8(), image.size, [None, pa.py_buffer(image)])
    pixels = pa.Array.from_buffers(PILLOWS_PIXEL, height * width, [None], children=[values])
    return Image.fromarrow(pixels, "RGB", (width, height))


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]; of a large image without a second copy at any time."""
    if image.width * image.height <= BAND_PIXELS:
        return np.asarray(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, band in bands(image):
        pixels[top : top + band.height] = np.asarray(band)
    return pixels


def _from_pillow(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [height, width, 4] in Pillow's own memory, or 3 copied where that is in pieces."""
    try:
        pixels = pa.array(image)
    except ValueError:  # over 16 MB
        return _pixels(image)
    return np.asarray(pixels.values).reshape(image.height, image.width, 4)


def _resize_with_torch(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    import torch

    if not image.flags.writeable:  # Pillow's memory; torch warns of what it might write
        image = image.copy()
    # `reshape`, not `unsqueeze`: only with the strides of a whole batch does torch see
    # channels-last, whose code is SIMD and needs no copy, neither before nor after.
    tensor = torch.from_numpy(image.reshape(1, *image.shape)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        tensor, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1).contiguous().numpy()[0]


def prepare(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """An image file's bytes to the pixels of a view.

    Returns:
        uint8 [size, size, 3], RGB.

    Raises:
        BadImage: The bytes are not an image, or a damaged or too large one.
        DataError: The resizer asked for is not installed.
    """
    resizer = resolve_resizer(spec.resizer)
    return square(decode(data, spec, resizer).image, spec, resizer)
