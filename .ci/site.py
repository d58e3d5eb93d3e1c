"""Hooks of mkdocs: the repository's READMEs are pages of the site, and links are resolved in it.

A link is written as it works in the repository. A page keeps its path from the root, but for the
pages of `docs/`, which are on top, and the root's README, which is the site's first page. A link to
a file that is no page (code, a recipe, a table of figures) becomes the text alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

__all__ = ["on_config", "on_files", "on_page_markdown", "resolved", "site_path"]

ROOT = Path(__file__).parents[1]
FIRST = "README.md"
TOP = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PACKAGES = ("data", "model", "train")
FOLDERS = ("packages", "pipelines", "tests")
PICTURES = (".png", ".svg", ".webp")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def pages() -> list[str]:
    """Pages outside `docs/`, as paths from the root."""
    found = [FIRST, *TOP]
    for folder in FOLDERS:
        found += sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.md"))
    return [name for name in found if "vendor" not in name]


def site_path(name: str) -> str:
    """The path of a repository's file among the site's sources."""
    return "index.md" if name == FIRST else name.removeprefix("docs/")


def source_of(page: str) -> str:
    """The file that a page of the site is made of; `site_path` backwards."""
    if page == "index.md":
        return FIRST
    return f"docs/{page}" if (ROOT / "docs" / page).exists() else page


def resolved(target: str, page: str) -> tuple[str, str]:
    """A link's file as a path from the repository's root, and its anchor."""
    path, _, anchor = target.partition("#")
    return posixpath.normpath(
        posixpath.join(posixpath.dirname(page), path)
    ) if path else page, anchor


def decisions() -> list[str]:
    """The pages of the decisions, their list first."""
    return [
        "decisions/README.md",
        *sorted(f"decisions/{p.name}" for p in (ROOT / "docs/decisions").glob("[0-9]*.md")),
    ]


def rooms(package: str) -> list[str]:
    """A package's README and those of its rooms."""
    found = sorted((ROOT / "packages" / package / "lapilli").rglob("README.md"))
    return [f"packages/{package}/README.md", *(str(path.relative_to(ROOT)) for path in found)]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the sections of the navigation that folders decide."""
    lists = {
        "Decisions": decisions(),
        **{f"lapilli.{one}, room by room": rooms(one) for one in PACKAGES},
    }
    config.nav = filled(config.nav, lists)
    return config


def filled(nav: Any, lists: dict[str, list[str]]) -> Any:
    """The navigation with the entries of the sections that `mkdocs.yml` leaves empty."""
    if isinstance(nav, dict):
        return {
            name: lists[name] if entry == [] else filled(entry, lists)
            for name, entry in nav.items()
        }
    if isinstance(nav, list):
        return [filled(entry, lists) for entry in nav]
    return nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside `docs/` and the pictures that they show."""
    for name in pages():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, site_path(name), abs_src_path=str(ROOT / name)))
        for _, _, target in LINK.findall(text):
            picture, _ = resolved(target, name)
            source = site_path(picture)
            if picture.endswith(PICTURES) and files.get_file_from_path(source) is None:
                files.append(File.generated(config, source, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository as links between pages of the site."""
    here = page.file.src_uri
    source = (
        FIRST
        if here == "index.md"
        else here
        if not (ROOT / "docs" / here).exists()
        else f"docs/{here}"
    )

    def rewrite(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        name, anchor = resolved(target, source)
        if (ROOT / name).is_dir():
            name += "/README.md"
        found = files.get_file_from_path(site_path(name))
        if found is None:
            return text if (ROOT / name).exists() else match[0]
        path = posixpath.relpath(found.src_uri, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({path}{'#' + anchor if anchor else ''})"

    parts: list[str] = []
    end = 0
    for code in CODE.finditer(markdown):
        parts += [markdown[end : code.start()], code[0]]
        end = code.end()
    parts.append(markdown[end:])
    # Links stand in the text between code; a link whose text is code holds a piece of it.
    whole = "\0".join(parts[::2])
    codes = iter(parts[1::2])
    whole = LINK.sub(rewrite, whole)
    return re.sub("\0", lambda _: next(codes), whole)
