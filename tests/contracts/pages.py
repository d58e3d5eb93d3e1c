"""The Markdown pages of the project, and what the tests of pages read from them.

`python -m tests.contracts.pages` writes `docs/external_links.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "EXTERNAL",
    "PAGES",
    "ROOT",
    "addresses",
    "blocks",
    "files",
    "links_page",
    "name_of",
    "prose",
]

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "packages", "pipelines", "tests", ".ci")
PAGES = sorted(
    {*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))}
)
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ADDRESS = re.compile(r"https?://[^\s)`<>\"']+")
EXTERNAL = ROOT / "docs" / "external_links.md"
TITLE = re.compile(r"title=\"([^\"]+)\"")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a page in a language ("" for none), but for those that show a file."""
    for named, info, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if named == language and not TITLE.search(info):
            yield text


def files(page: Path) -> Iterator[tuple[str, str]]:
    """The blocks of a page that show a file, `title="NAME"`: its name and its text."""
    for _, info, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if named := TITLE.search(info):
            yield named[1], text


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def addresses() -> list[str]:
    """The addresses that pages link to."""
    used: set[str] = set()
    for page in {*PAGES} - {EXTERNAL}:
        used |= {one.rstrip(".,;:") for one in ADDRESS.findall(prose(page))}
    return sorted(used)


def links_page() -> str:
    """The page that lists them: what may change without us."""
    lines = "".join(f"- <{one}>\n" for one in addresses())
    head = "Every address that a page links to, as `python -m tests.contracts.pages` writes them."
    return f"# External links\n\n{head}\n\n{lines}"


if __name__ == "__main__":
    EXTERNAL.write_text(links_page(), encoding="utf-8")
