"""A self-contained page as a reader's browser shows it: headless Chromium says what is wrong.

    def test_the_report_is_fit_to_be_read(chromium: Chromium, tmp_path: Path) -> None:
        assert chromium.problems(tmp_path / "report.html") == []

The fixture `chromium` is skipped, with the reason, where there is no Chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal

__all__ = ["Chromium", "find_chromium"]

NAMES = ("chromium", "chromium-browser", "google-chrome")  # Debian's, Ubuntu's, Google's
PHONE, DESK = (390, 844), (1280, 900)  # CSS pixels
# As root there is no sandbox; nothing is fetched, updated or reported by the browser itself.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
TIMEOUT_MS = 30_000
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")

# Per image: what it is and whether there is anything to see.
IMAGES = """[...document.images].map(image =>
    [image.alt || image.src.slice(0, 60), image.complete && image.naturalWidth > 0])"""
# What reaches over the right edge, the deepest elements first, unless something scrolls it.
OVERFLOW = """(() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    const wide = [...document.querySelectorAll("body *")]
        .filter(element => element.getBoundingClientRect().right > width + 0.5)
        .map(element => element.tagName.toLowerCase() + "." + element.className);
    return [document.documentElement.scrollWidth, ...wide.slice(-3)];
})()"""
# 0 for black to 255 for white; a page that sets no background has the scheme's canvas colour.
BRIGHTNESS = """(() => {
    const colour = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).map(Number);
    return colour[3] === 0 ? null : (colour[0] + colour[1] + colour[2]) / 3;
})()"""


def find_chromium() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A Chromium that is started anew, with an empty profile, for every page."""

    def __init__(self, path: str) -> None:
        self._path = path

    def problems(self, page: Path, *, screenshots: Path | None = None) -> list[str]:
        """What a reader would stumble over, on a phone and on a desk, in light and in dark.

        Args:
            page: An HTML file that needs no other file.
            screenshots: Folder for a picture of the whole page in each of the four.

        Returns:
            A line for each error in the console, each request that is not the page itself, each
            image that shows nothing, whatever makes a phone scroll sideways, and a background that
            does not follow the colour scheme; empty for a page that is well.
        """
        from playwright.sync_api import sync_playwright

        found: list[str] = []
        # Not kept open: while it is, this thread has a running event loop, and other tests may not.
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=self._path, args=FLAGS, timeout=TIMEOUT_MS
            )
            for scheme, (width, height) in product(SCHEMES, (PHONE, DESK)):
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                tab = context.new_page()
                lines = [*self._complaints(tab, page), *self._looks(tab, scheme)]
                found += [f"{scheme}, {width} px: {line}" for line in lines]
                if screenshots:
                    file = screenshots / f"{page.stem}-{scheme}-{width}.png"
                    tab.screenshot(path=file, full_page=True)
                context.close()
            browser.close()
        return found

    def _complaints(self, tab: Any, page: Path) -> list[str]:
        """Load a page; what the browser complained of meanwhile."""
        lines: list[str] = []
        url = page.resolve().as_uri()
        tab.on("console", lambda said: said.type == "error" and lines.append(said.text))
        tab.on("pageerror", lambda error: lines.append(f"script: {error}"))
        tab.on("requestfailed", lambda asked: lines.append(f"failed: {asked.url[:80]}"))
        tab.on("request", lambda asked: lines.extend(_foreign(asked.url, url)))
        tab.goto(url, wait_until="load", timeout=TIMEOUT_MS)
        return lines

    def _looks(self, tab: Any, scheme: Scheme) -> Iterator[str]:
        for name, is_seen in tab.evaluate(IMAGES):
            if not is_seen:
                yield f"image shows nothing: {name}"
        if wide := tab.evaluate(OVERFLOW):
            yield f"{wide[0]} px wide: {', '.join(map(str, wide[1:]))}"
        brightness = tab.evaluate(BRIGHTNESS)
        if brightness is not None and (brightness > 127) != (scheme == "light"):
            yield f"background of brightness {brightness:.0f}"


def _foreign(asked: str, page: str) -> list[str]:
    """A complaint if something else than the page itself was asked for."""
    is_own = asked.partition("#")[0] == page or asked.startswith("data:")
    return [] if is_own else [f"asked for {asked[:80]}"]
