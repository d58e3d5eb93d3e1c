"""The site of the pages builds without a warning and fetches nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typing_extensions import override

from tests.contracts.pages import PAGES, ROOT

NOT_IN_IT = {ROOT / name for name in ("docs/README.md", ".ci/README.md", "tests/vendor/README.md")}
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "srcset"}


class Requests(HTMLParser):
    """The addresses that a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if (
            tag in FETCHED
            and (where := values.get(FETCHED[tag]))
            and values.get("rel") != "canonical"
        ):
            self.found.append(where)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_it(site: Path) -> None:
    made = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")}
    pages = {*PAGES} - NOT_IN_IT
    names = {str(page.relative_to(ROOT)).removeprefix("docs/") for page in pages}
    names = {"index.md" if name == "README.md" else name for name in names}
    names = {name.replace("README.md", "index.md") for name in names}
    assert names - made == set()


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    found: set[str] = set()
    for page in site.rglob("*.html"):
        requests = Requests()
        requests.feed(page.read_text(encoding="utf-8"))
        found |= {one for one in requests.found if re.match(r"(?:https?:)?//", one)}
    assert found == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import", styles) == []


def test_the_api_pages_have_every_public_name(site: Path) -> None:
    import lapilli.data
    import lapilli.model
    import lapilli.train

    for package in (lapilli.data, lapilli.model, lapilli.train):
        name = package.__name__.rpartition(".")[2]
        text = (site / "api" / f"{name}.html").read_text(encoding="utf-8")
        told = set(re.findall(rf'id="lapilli\.{name}\.(\w+)"', text))
        assert {*package.__all__} - told == set()


def test_the_search_finds_a_setting_by_its_words(site: Path) -> None:
    """The page cuts texts and queries at the same places; a dotted name is several words."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    separator = re.compile(index["config"]["separator"])
    found: list[str] = []
    for page in index["docs"]:
        words = separator.split(re.sub(r"<[^>]+>", " ", page["text"]))
        found += [page["location"]] if {"loss", "spike", "factor"} <= {*words} else []
    assert any("health" in location for location in found)
