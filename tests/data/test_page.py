from __future__ import annotations

import base64
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lapilli.data.errors import DataError
from lapilli.data.text.token_text import Piece
from pipelines.reports import charts
from pipelines.reports import ticks as scales
from pipelines.reports.page import Figure, GalleryItem, Page

VOID = {"meta", "link", "img", "br"}
EVIL = "</figcaption><script>alert(1)</script>\"'&\x00\ud800\x1b[2J\u202e"
Element: TypeAlias = ElementTree.Element

any_float = st.floats(allow_nan=True, allow_infinity=True, width=64)
few = st.one_of(
    st.lists(any_float, min_size=1, max_size=30),
    st.builds(lambda v, n: [v] * n, any_float, st.integers(1, 9)),
    st.builds(lambda v, d: [v, v * (1 + d)], any_float, st.sampled_from([1e-15, 1e-12, 1e-8])),
)
spread = st.one_of(
    few,
    st.builds(
        lambda seed, scale: list(np.random.default_rng(seed).normal(size=1500) * 10.0**scale),
        st.integers(0, 9),
        st.integers(-320, 300),
    ),
)


class Reader(HTMLParser):
    """Checks that elements nest, and keeps what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def svgs(html: str) -> list[Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def numbers_of(element: Element, *names: str) -> list[float]:
    return [float(element.attrib[name]) for name in names]


def places(svg: Element) -> list[tuple[float, float]]:
    """Every point that a line, bar, dot or grid line of the picture touches."""
    found: list[tuple[float, float]] = []
    for mark in svg.iter():
        if mark.tag == "polyline":
            found += [
                (float(x), float(y))
                for x, y in (pair.split(",") for pair in mark.attrib["points"].split())
            ]
        elif mark.tag == "circle":
            cx, cy = numbers_of(mark, "cx", "cy")
            found.append((cx, cy))
        elif mark.tag == "rect":
            x, y, width, height = numbers_of(mark, "x", "y", "width", "height")
            assert width >= 0
            assert height >= 0
            found += [(x, y), (x + width, y + height)]
        elif mark.tag == "line":
            x1, y1, x2, y2 = numbers_of(mark, "x1", "y1", "x2", "y2")
            found += [(x1, y1), (x2, y2)]
        elif mark.tag == "text":
            x, y = numbers_of(mark, "x", "y")
            found.append((x, y))
    return found


def check_inside(svg: Element) -> None:
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for x, y in places(svg):
        assert -0.11 <= x <= width + 0.11
        assert -0.11 <= y <= height + 0.11


def full_page() -> Page:
    page = Page(EVIL, EVIL).figures([Figure(EVIL, EVIL, EVIL)]).text(EVIL).code(EVIL)
    page.section(EVIL).table([EVIL, "n"], [[EVIL, 3]], EVIL).table([], [])
    page.line_chart({EVIL: ([0, 1], [2, 3]), "b": ([0], [1])}, EVIL, EVIL, EVIL)
    page.section("two").bar_chart([EVIL, "x"], {EVIL: [1, None], "b": [2, -3]}, EVIL)
    page.histogram([1, 2, 2.5], 5, EVIL, EVIL)
    evil = [Piece(EVIL, "text", True, (1, 2)), Piece(EVIL, "special", False, (3,))]
    page.transcript(evil, EVIL).transcript(evil, EVIL, tokens=True)
    page.section("three").key_values({EVIL: {EVIL: [EVIL, 1]}})
    image = np.zeros((4, 6, 3), np.uint8)
    return page.gallery([GalleryItem(image, [EVIL, (EVIL, EVIL)], "wrong")])


def test_the_page_asks_for_nothing_from_outside() -> None:
    html = full_page().html()
    reader = read(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    sources = [a[key] or "" for _, a in reader.tags for key in ("src", "href") if key in a]
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    policy = next(a for a in reader.all("meta") if a.get("http-equiv"))
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_text_of_strangers_is_only_text(tmp_path: Path) -> None:
    html = full_page().html()
    reader = read(html)
    assert reader.all("script") == []
    assert not [a for _, a in reader.tags for key in a if key.startswith("on")]
    assert html.count("&lt;script&gt;alert(1)") > 20
    assert not {"\x00", "\ud800", "\x1b", "\u202e"} & {*html}
    written = full_page().write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"\x00\ud800\x1b[2J\u202e" in written


def test_a_transcript_marks_what_is_trained() -> None:
    pieces = [
        Piece("<image 9 tokens>", "image", False, (-200,)),
        Piece("  a\n", "text", False, (5,)),
        Piece("b <i>", "text", True, (6,)),
        Piece(" c", "text", True, (7, 8)),
        Piece("</s>", "special", True, (2,)),
    ]
    plain = read(Page("t").transcript(pieces).html())
    told = [(tag, text) for tag, text in plain.words if tag in ("span", "mark")]
    assert told == [
        ("span", "<image 9 tokens>"),
        ("span", "  a↵\n"),
        ("mark", "b <i> c"),
        ("mark", "</s>"),
    ]
    tokens = read(Page("t").transcript(pieces, tokens=True).html())
    assert [mark["title"] for mark in tokens.all("mark")] == ["6", "7 8", "2"]


def test_links_lead_to_sections() -> None:
    reader = read(full_page().html())
    ids = {a["id"] for _, a in reader.tags if "id" in a}
    assert {(a["href"] or "")[1:] for a in reader.all("a")} == ids
    assert len(ids) == 3


def test_an_empty_page_is_a_page() -> None:
    reader = read(Page("nothing").html())
    assert ("h1", "nothing") in reader.words


def test_same_blocks_same_text() -> None:
    assert full_page().html() == full_page().html()


def test_pictures_and_tables_are_named() -> None:
    html = full_page().html()
    for svg in svgs(html):
        assert svg.attrib["role"] == "img"
        assert svg[0].tag == "title"
        assert svg[0].text
        check_inside(svg)
    reader = read(html)
    assert all(a.get("alt") for a in reader.all("img"))
    assert all(a.get("scope") in ("col", "row") for a in reader.all("th"))


@settings(deadline=None, max_examples=60)
@given(spread, few)
def test_line_chart_stays_inside(first: list[float], second: list[float]) -> None:
    series = {
        "a": (list(range(len(first))), first),
        "b": (sorted(second, key=str), second),
    }
    chart = charts.line_chart(series, "step", "loss", "t")
    points = [pair for xs, ys in series.values() for pair in zip(xs, ys, strict=True)]
    usable = any(math.isfinite(x) and math.isfinite(y) for x, y in points)
    assert bool(chart.pictures) == usable
    for picture in chart.pictures:
        svg = ElementTree.fromstring(picture)
        check_inside(svg)
        for line in svg.iter("polyline"):
            assert len(line.attrib["points"].split()) <= 400


@settings(deadline=None)
@given(few)
def test_bars_and_histograms_stay_inside(values: list[float]) -> None:
    bars = charts.bar_chart([f"label {i}" for i in range(len(values))], {"a": values, "b": values})
    for picture in (*bars.pictures, *charts.histogram(values, 30, "t", "x").pictures):
        check_inside(ElementTree.fromstring(picture))


@settings(deadline=None, max_examples=60)
@given(spread.filter(lambda values: any(map(math.isfinite, values))), st.integers(1, 50))
def test_a_histogram_counts_every_value_once(values: list[float], bins: int) -> None:
    chart = charts.histogram(values, bins)
    svg = ElementTree.fromstring(chart.pictures[0])
    bars = [rect.findtext("title") or "" for rect in svg.iter("rect")]
    counts = [int(text.rsplit(": ", 1)[1].replace(",", "")) for text in bars]
    assert sum(counts) == sum(map(math.isfinite, values))
    assert len(counts) <= bins


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(4, 500))
def test_thin_keeps_ends_and_peaks(values: list[float], limit: int) -> None:
    ys = np.array(values)
    xs = np.arange(len(ys), dtype=np.float64)
    thin_xs, thin_ys = scales.thin(xs, ys, limit)
    assert len(thin_xs) == len(thin_ys) <= max(limit, 4)
    assert (np.diff(thin_xs) > 0).all()
    assert (ys[thin_xs.astype(int)] == thin_ys).all()
    assert (thin_ys[0], thin_ys[-1]) == (ys[0], ys[-1])
    assert (thin_ys.min(), thin_ys.max()) == (ys.min(), ys.max())


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 10))
@example(500_001.0, 400_000_000_401.0, 2)
def test_ticks_are_round_few_and_told_apart(low: float, span: float, count: int) -> None:
    if span < abs(low) * 1e-9:
        return
    found = scales.ticks(low, low + span, count)
    assert 1 <= len(found) <= count + 1
    assert all(low - span * 1e-3 <= tick <= low + span * 1.001 for tick in found)
    labels = scales.tick_labels(found)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.0, 2000.0, ["0", "500", "1,000", "1,500", "2,000"]),
        (0.0, 1e4, ["0", "2k", "4k", "6k", "8k", "10k"]),
        (0.0, 2.5e6, ["0", "0.5M", "1M", "1.5M", "2M", "2.5M"]),
        (0.0, 2e-5, ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]),
        (-2e20, 2e20, ["-2e20", "-1e20", "0", "1e20", "2e20"]),
    ],
)
def test_tick_labels(low: float, high: float, labels: list[str]) -> None:
    assert scales.tick_labels(scales.ticks(low, high, 5)) == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (np.int64(12), "12"),
        (np.float32(0.5), "0.5"),
        (0.912345, "0.9123"),
        (12345.678, "12,346"),
        (99.99999, "100"),
        (2e-5, "2e-5"),
        (float("nan"), "NaN"),
        (float("-inf"), "-∞"),
        (-0.0, "0"),
        ("<b>", "<b>"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert scales.number(value) == text


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    chart = charts.line_chart({"a": ([0, 1, 2, 3], [1.0, float("nan"), None, 2.0])})
    (line,) = ElementTree.fromstring(chart.pictures[0]).iter("polyline")
    assert len(line.attrib["points"].split()) == 2
    assert chart.note == "2 values not finite, left out"
    note = charts.histogram([1, 1, 2, 40, float("inf")]).note
    assert note == "4 values · median 1.5 · 95% at most 40 · 1 value not finite, left out"


def test_nothing_to_draw_is_said() -> None:
    page = Page("t").line_chart({}).line_chart({"a": ([], [])}).histogram([]).bar_chart([], {})
    page.histogram([float("nan")]).gallery([]).figures([]).table(["a"], []).key_values({})
    reader = read(page.html())
    assert [text for _, text in reader.words].count("nothing to draw") == 5
    assert ("td", "no rows") in reader.words


def test_missing_bar_has_no_width() -> None:
    chart = charts.bar_chart(["a", "b"], {"s": [None, 0.5]}, value_format=".1%")
    svg = ElementTree.fromstring(chart.pictures[0])
    widths = [float(rect.attrib["width"]) for rect in svg.iter("rect")]
    assert widths[0] == 0 < widths[1]
    assert [t.text for t in svg.iter("text") if t.get("class") == "value"] == ["—", "50.0%"]


def test_columns_of_numbers_stand_right() -> None:
    rows = [["a", 1, "12.5%", "x", None], ["b", 2.5, "3%", "4", 7]]
    reader = read(Page("t").table(["name", "n", "share", "mixed", "gaps"], rows).html())
    heads = [a.get("class") for a in reader.all("th") if a.get("scope") == "col"]
    assert heads == [None, "number", "number", None, "number"]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_array_pixels_come_back(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (attributes,) = read(Page("t").gallery([GalleryItem(array)]).html()).all("img")
    kind, _, data = (attributes["src"] or "").partition(";base64,")
    assert kind == "data:image/png"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(decoded, array.reshape(decoded.shape))
    assert (attributes["width"], attributes["height"]) == ("7", "5")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_image_files_go_in_as_they_are(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, kind)
    html = Page("t").gallery([GalleryItem(buffer.getvalue())]).html()
    encoded = base64.b64encode(buffer.getvalue()).decode()
    assert f"data:image/{kind.lower()};base64,{encoded}" in html


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"<svg/>",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n" + b"\x00" * 40,
        b"RIFF\x00\x00\x00\x00WEBP",
        np.zeros((2, 2, 3), np.float32),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image: bytes | np.ndarray) -> None:
    with pytest.raises(ValueError, match="image"):
        Page("t").gallery([GalleryItem(image)])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Page("t").table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="2 x values and 1 y values"):
        Page("t").line_chart({"a": ([1, 2], [1])})
    with pytest.raises(ValueError, match="1 values for 2 labels"):
        Page("t").bar_chart(["a", "b"], {"s": [1]})
    with pytest.raises(ValueError, match="at least 1 bin"):
        Page("t").histogram([1], 0)


def test_write_makes_folders_and_leaves_no_part(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "page.html"
    assert Page("first").write(path) == path
    assert Page("second").write(str(path)) == path
    assert "second" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Page("old").write(tmp_path / "page.html")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DataError, match="disk full"):
        Page("new").write(path)
    assert "old" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_importing_the_page_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, pipelines.reports.page;"
        "print(sorted({'torch', 'ray'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
