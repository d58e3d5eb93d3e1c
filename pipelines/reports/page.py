"""Build a report as one self-contained HTML file.

Each block is a macro of the template beside this file. All text is escaped, and a
content security policy forbids scripts and requests, so a page may hold the data of strangers.
Absolute paths in titles, texts and settings are shown by their last name, since pages are sent on.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, cast

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from lapilli.data.io.atomic import write_text
from lapilli.data.io.printable import relative_names, spell_out
from lapilli.data.text.token_text import Piece, join_pieces
from pipelines.reports import charts
from pipelines.reports.ticks import Values, number

__all__ = ["Figure", "GalleryItem", "Page"]

Line: TypeAlias = str | tuple[str, str]

_NUMBER_LIKE = re.compile(r"[+\-−±]?\d[\d,.]*(e[+\-]?\d+)?\s?(%|[kMBGT]|[KMGT]i?B|B|s|ms|min|h)?")
_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}
_SMALL = 160  # pixels; a smaller picture is enlarged with its pixels kept sharp


@dataclass(frozen=True, slots=True)
class Figure:
    """A headline number: what it is, its value as text, and a remark."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """A picture with lines below it.

    `image` is a uint8 array (height x width, with 1, 3 or 4 channels or none) or the bytes of a
    PNG, JPEG, GIF or WebP file; it goes into the page as it is, so shrink large ones before. A line
    is a text, or a pair of label and text.
    """

    image: npt.NDArray[np.uint8] | bytes
    lines: Sequence[Line] = ()
    verdict: Literal["right", "wrong"] | None = None


@dataclass(frozen=True, slots=True)
class _Picture:
    source: str
    width: int
    height: int
    alt: str
    lines: tuple[tuple[str, str], ...]
    verdict: str | None
    small: bool


def _setting(value: object) -> str:
    """A value of any settings file as one line."""
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value).items()
        return ", ".join(f"{key}: {_setting(item)}" for key, item in pairs) or "—"
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, cast("Sequence[object]", value))) or "—"
    return relative_names(number(value))


def _is_number(cell: object) -> bool:
    if isinstance(cell, str):
        return _NUMBER_LIKE.fullmatch(cell.strip()) is not None
    return isinstance(cell, Real) and cell is not True and cell is not False


def _is_numeric(cells: Sequence[object]) -> bool:
    filled = [cell for cell in cells if cell is not None and cell not in ("", "—", "-")]
    return bool(filled) and all(map(_is_number, filled))


def _png(image: npt.NDArray[Any]) -> bytes:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        raise ValueError(f"an image is a uint8 array, not {image.dtype} of shape {image.shape}")
    if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
        raise ValueError(f"an image has 1, 3 or 4 channels, not {image.shape[2]}")
    flat = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(flat).save(buffer, "PNG")
    return buffer.getvalue()


def _size_and_type(data: bytes) -> tuple[int, int, str]:
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_MIME)) as image:
            return image.width, image.height, _MIME[image.format or "PNG"]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("image bytes are not a PNG, JPEG, GIF or WebP file") from error


def _picture(item: GalleryItem) -> _Picture:
    data = item.image if isinstance(item.image, bytes) else _png(item.image)
    width, height, mime = _size_and_type(data)
    lines = tuple(("", line) if isinstance(line, str) else line for line in item.lines)
    return _Picture(
        source=f"data:{mime};base64,{base64.b64encode(data).decode()}",
        width=width,
        height=height,
        alt=f"Image: {lines[0][1]}" if lines else "Image",
        lines=lines,
        verdict=item.verdict,
        small=max(width, height) < _SMALL,
    )


@functools.cache
def _macros() -> Any:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).module


@dataclass
class Page:
    """A report under construction; every method adds one block and returns the page.

    Attributes:
        title: The heading, and the name of the browser's tab.
        subtitle: One line below it.
    """

    title: str
    subtitle: str = ""
    _lead: list[Markup] = field(default_factory=list[Markup], init=False, repr=False)
    _sections: list[tuple[str, list[Markup]]] = field(
        default_factory=list[tuple[str, list[Markup]]], init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Take the folders out of title and subtitle."""
        self.title, self.subtitle = map(relative_names, (self.title, self.subtitle))

    def _add(self, kind: str, *values: object) -> Self:
        """Add what the template's macro of that name makes of the values."""
        blocks = self._sections[-1][1] if self._sections else self._lead
        blocks.append(getattr(_macros(), kind)(*values))
        return self

    def section(self, title: str) -> Self:
        """Open a section: the blocks that follow belong to it."""
        self._sections.append((relative_names(title), []))
        return self

    def text(self, text: str) -> Self:
        """Add a paragraph; line breaks are kept."""
        return self._add("text", relative_names(text))

    def code(self, text: str) -> Self:
        """Add text in a fixed-width type, such as a command to repeat."""
        return self._add("code", text)

    def links(self, paths: Sequence[str]) -> Self:
        """Add files that lie beside the page, by their paths from its folder."""
        return self._add("links", paths)

    def figures(self, figures: Sequence[Figure]) -> Self:
        """Add a row of headline numbers."""
        return self._add("figures", figures)

    def key_values(self, values: Mapping[str, object]) -> Self:
        """Add names with their values: settings, versions."""
        return self._add("key_values", [(str(k), _setting(v)) for k, v in values.items()])

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str | None = None,
    ) -> Self:
        """Add a table; columns of numbers, or of text that reads as numbers, stand to the right.

        Args:
            columns: The heads of the columns.
            rows: The cells of each row. Numbers are written with few digits, None as a dash.
            caption: A line above the table.

        Returns:
            The page.

        Raises:
            ValueError: A row has not one cell for each column.
        """
        for index, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(f"row {index} has {len(row)} cells for {len(columns)} columns")
        numeric = [_is_numeric([row[place] for row in rows]) for place in range(len(columns))]
        cells = [[number(cell) for cell in row] for row in rows]
        return self._add("table", columns, cells, numeric, caption or "")

    def line_chart(
        self,
        series: Mapping[str, tuple[Values, Values]],
        x_label: str = "",
        y_label: str = "",
        title: str = "",
    ) -> Self:
        """Add series as lines: by name, x values and y values; see `charts.line_chart`."""
        return self._add("chart", charts.line_chart(series, x_label, y_label, title))

    def bar_chart(
        self,
        labels: Sequence[str],
        series: Mapping[str, Values],
        title: str = "",
        value_format: str = "",
    ) -> Self:
        """Add grouped horizontal bars; `value_format` is like `.1%`; see `charts.bar_chart`."""
        return self._add("chart", charts.bar_chart(labels, series, title, value_format))

    def histogram(self, values: Values, bins: int = 40, title: str = "", x_label: str = "") -> Self:
        """Add a histogram of values; see `charts.histogram`."""
        return self._add("chart", charts.histogram(values, bins, title, x_label))

    def gallery(self, items: Sequence[GalleryItem]) -> Self:
        """Add pictures with captions, each marked right or wrong or not at all.

        Args:
            items: The pictures.

        Returns:
            The page.

        Raises:
            ValueError: An image is neither a uint8 array nor a PNG, JPEG, GIF or WebP file.
        """
        pictures = [_picture(item) for item in items]
        shapes = sorted(picture.width / picture.height for picture in pictures)
        middle = shapes[len(shapes) // 2] if shapes else 1.0  # width by height of the frames
        return self._add("gallery", pictures, min(1.6, max(0.75, middle)))

    def transcript(
        self, pieces: Sequence[Piece], caption: str = "", *, tokens: bool = False
    ) -> Self:
        """Add a conversation whose trained text is marked; see `transcript.transcript`.

        Args:
            pieces: The conversation.
            caption: A line above it.
            tokens: Show where one token ends and the next begins, and each one's id.

        Returns:
            The page.
        """
        return self._add("transcript", pieces if tokens else join_pieces(pieces), caption, tokens)

    def html(self) -> str:
        """The page as HTML; the same blocks give the same text."""
        text = _macros().page(self.title, self.subtitle, self._lead, self._sections)
        return spell_out(text)

    def write(self, path: str | Path) -> Path:
        """Write the page, whole or not at all; folders are made as needed.

        Args:
            path: Where to; a file there is replaced.

        Returns:
            The path.

        Raises:
            DataError: The disk is full or the folder cannot be written; the old page stays.
        """
        target = Path(path)
        write_text(target, self.html(), choose="another file")
        return target
