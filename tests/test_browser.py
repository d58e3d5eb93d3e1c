"""The browser check finds what it is there to find."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lapilli.data.text.token_text import Piece
from pipelines.reports.page import Figure, GalleryItem, Page
from tests.browser import Chromium

HEAD = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
SCHEMES = "<style>:root { color-scheme: light dark }</style>"


def problems(chromium: Chromium, folder: Path, body: str) -> list[str]:
    page = folder / "page.html"
    page.write_text(HEAD + SCHEMES + body, encoding="utf-8")
    return chromium.problems(page)


def test_a_plain_page_is_well(chromium: Chromium, tmp_path: Path) -> None:
    assert problems(chromium, tmp_path, "<p>Nothing to see.</p>") == []


def test_each_thing_that_is_wrong_is_named(chromium: Chromium, tmp_path: Path) -> None:
    found = problems(
        chromium,
        tmp_path,
        "<style>body { background: white }</style>"
        "<script>console.error('oh no')</script><script>undefined.field</script>"
        "<img alt=hole src='data:image/png;base64,AAAA'><img src='nowhere.png'>"
        "<p class=broad style='width: 700px'>x</p>",
    )
    for words in ("oh no", "script: ", "image shows nothing: hole", "asked for", "failed: "):
        for scheme in ("light", "dark"):
            assert [line for line in found if words in line and scheme in line], words
    assert "light, 390 px: 708 px wide: p.broad" in found
    assert "dark, 1280 px: background of brightness 255" in found
    assert not [line for line in found if "1280 px" in line and "wide" in line]


def test_a_page_of_every_block_is_well(chromium: Chromium, tmp_path: Path) -> None:
    page = Page("Everything", "with long_words_" * 20)
    page.figures([Figure("loss", "0.5", "of a run with a long remark")] * 5).text("A text. " * 90)
    page.code("python -m pipelines.show " + "x" * 200)
    page.section("Tables").table(["name", *"abcdefgh"], [["n" * 60, *range(8)]] * 3)
    page.key_values({"path": "/a" * 120, "settings": {"betas": (0.9, 0.999)}})
    pieces = [Piece("a word " * 60, "text", i % 2 == 0, (7,)) for i in range(3)]
    page.transcript(pieces, "a caption").transcript(pieces, tokens=True)
    page.section("Charts").line_chart({"loss": (range(50), [1 / (i + 1) for i in range(50)])})
    page.bar_chart(["a long label of a bar"], {"share": [0.5]}, "title", ".1%")
    page.histogram(np.arange(100.0))
    picture = np.full((64, 48, 3), 90, np.uint8)
    page.section("Pictures").gallery([GalleryItem(picture, [("answer", "red " * 30)], "right")] * 5)
    assert chromium.problems(page.write(tmp_path / "page.html")) == []
