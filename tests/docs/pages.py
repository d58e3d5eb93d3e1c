"""Sections, code blocks and tables of a page of `docs/`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOCS", "Block", "blocks", "matches", "rows", "section", "sections"]

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is the content of, and its text."""

    language: str
    title: str
    text: str


def sections(page: str, level: int) -> dict[str, str]:
    """The text below each heading of a level, up to the next of this level or above."""
    text = (DOCS / page).read_text(encoding="utf-8")
    plain = FENCE.sub(lambda fence: re.sub(r"^#", "\x00", fence[0], flags=re.MULTILINE), text)
    parts = re.split(rf"^(#{{1,{level}}}) (.+)\n", plain, flags=re.MULTILINE)
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {name: body.replace("\x00", "#") for marks, name, body in found if len(marks) == level}


def section(page: str, name: str) -> str:
    """The text below one heading of the second level, subsections included."""
    return sections(page, 2)[name]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text."""
    return [Block(*found) for found in FENCE.findall(text)]


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of all tables of a text, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {place for place, row in enumerate(cells) if set("".join(row)) <= {"-", ":"}}
    return [row for place, row in enumerate(cells) if not {place, place + 1} & heads]


def matches(line: str, output: str) -> bool:
    """Whether an output has a line of a page's, in which `...` stands for anything on the line."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in line.strip().split("...")]
    return re.search(r"[^\n]*?\s*".join(parts), output) is not None
