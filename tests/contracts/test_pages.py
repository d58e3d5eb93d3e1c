"""Pages: short paragraphs, links that lead somewhere, a README in every folder."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.contracts.pages import (
    EXTERNAL,
    PAGES,
    ROOT,
    addresses,
    blocks,
    files,
    links_page,
    name_of,
    prose,
)

MOST_WORDS = 1200
MOST_IN_A_PARAGRAPH = 90
MOST_FILES = 3  # of a folder without a README
RECORDS = {"LOG.md", "CHANGELOG.md"}  # they grow
LINK = re.compile(r"\]\(([^()\s]+)\)")
# Packages and rooms whose modules their package's README lists.
EXPLAINED = {f"packages/{one}/lapilli/{one}" for one in ("data", "model", "train")}


def paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists; no tables and no headings."""
    found = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    return [one for one in found if not one.lstrip().startswith(("|", "#", "<!--"))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_read_in_minutes(page: Path) -> None:
    if page.name in RECORDS:
        return
    if page.name == "README.md":
        assert len(page.read_text(encoding="utf-8").split()) <= MOST_WORDS
    long = {
        one[:60]: n
        for one in paragraphs(prose(page))
        if (n := len(one.split())) > MOST_IN_A_PARAGRAPH
    }
    assert long == {}, f"paragraphs of more than {MOST_IN_A_PARAGRAPH} words"


def test_a_long_paragraph_is_found() -> None:
    text = "# A heading\n\n| a | table |\n\n" + "word " * 91 + "\n\n- item\n- " + "word " * 8
    assert [len(one.split()) for one in paragraphs(text)] == [91, 2, 9]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    found = Counter[str]()
    names: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain).strip().lower().replace(" ", "-")
        names.add(f"{name}_{found[name]}" if found[name] else name)
        found[name] += 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    dead: list[str] = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_there = file.is_relative_to(ROOT) and file.exists()
        if not is_there or (anchor and anchor not in anchors(prose(file))):
            dead.append(target)
    assert dead == []


def test_dead_links_are_found() -> None:
    assert LINK.findall("[a](b.md) ![c](d.png) [`e`](f.md#g-h)") == ["b.md", "d.png", "f.md#g-h"]
    assert anchors("# A `b.c`: d\n## What's new\n## What's new") == {
        "a-bc-d", "whats-new", "whats-new_1"
    }  # fmt: skip


def test_every_external_link_is_listed() -> None:
    """`python -m tests.contracts.pages` writes the page."""
    assert EXTERNAL.read_text(encoding="utf-8") == links_page()
    assert "https://github.com/haotian-liu/LLaVA" in addresses()


def test_folders_of_several_files_have_a_readme() -> None:
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    sizes = Counter(str(Path(name).parent) for name in names)
    large = {folder for folder, count in sizes.items() if count > MOST_FILES} - EXPLAINED
    kept_as_found = {folder for folder in large if {"vendor", "goldens"} & {*Path(folder).parts}}
    bare = {one for one in large - kept_as_found if str(Path(one) / "README.md") not in names}
    # or a page of the folder's name beside it
    assert {one for one in bare if not (ROOT / f"{one}.md").exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_says_what_it_is(page: Path) -> None:
    """`bash` is parsed, `python` and `sh` are run by tests; everything else is `text`, or data."""
    assert [*blocks(page, "")] == []


def test_a_program_that_a_page_shows_is_a_file_that_tests_run() -> None:
    """It lies below the page's folder; data that a page shows are written by the reader."""
    for page in PAGES:
        for name, text in files(page):
            found = [*page.parent.rglob(name)]
            assert found or not name.endswith(".py"), f"{name_of(page)}: {name}"
            assert [one for one in found if one.read_text(encoding="utf-8") != text] == []


def test_a_block_with_a_title_is_a_file_and_no_block(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('```python title="a.py"\nx = 1\n```\n\n```python\ny = 2\n```\n')
    assert [*files(page)] == [("a.py", "x = 1\n")]
    assert [*blocks(page, "python")] == ["y = 2\n"]
    assert prose(page).strip() == ""
