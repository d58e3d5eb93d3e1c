"""Expand brace patterns and globs, with bounds."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from braceexpand import alphabet, braceexpand

from lapilli.data.io.access import folders_below

__all__ = ["MOST_NAMES", "expand_braces", "matching"]

MOST_NAMES = 1_000_000  # that the braces of one pattern may stand for
DEEPEST = 8  # braces in braces
NUMBERS = re.compile(r"(-?\d{1,15})\.\.(-?\d{1,15})(?:\.\.-?(\d{1,15}))?")
LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d{1,15}))?")
RANGE = re.compile(r"-?\d+\.\.")


def expand_braces(pattern: str) -> list[str] | None:
    """`part-{000..003}.json` to the names it matches; other braces are literal.

    Returns:
        None for more than `MOST_NAMES`, all of which `braceexpand` would hold.
    """
    if not _is_balanced(pattern):
        return [pattern]
    return None if _most_names(pattern) > MOST_NAMES else list(braceexpand(pattern))


def _is_balanced(pattern: str) -> bool:
    depth = 0
    for letter in re.sub(r"\\.", "", pattern):
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0


def _most_names(pattern: str, depth: int = 0) -> int:
    """How many names the braces of a pattern stand for, at most; too many where they go deep."""
    if depth > DEEPEST:
        return MOST_NAMES + 1
    names = 1
    for inner in _inside(pattern):
        if (found := NUMBERS.fullmatch(inner)) is not None:
            names *= abs(int(found[2]) - int(found[1])) // max(1, int(found[3] or 1)) + 1
        elif (found := LETTERS.fullmatch(inner)) is not None:
            names *= abs(alphabet.index(found[2]) - alphabet.index(found[1])) + 1
        elif RANGE.match(inner):
            return MOST_NAMES + 1
        else:
            names *= sum(_most_names(part, depth + 1) for part in _between_commas(inner))
        if names > MOST_NAMES:
            break
    return names


def _inside(text: str) -> Iterator[str]:
    """The content of each outermost pair of braces."""
    depth, start = 0, 0
    for at, letter in enumerate(text):
        if letter == "{":
            start = start if depth else at + 1
            depth += 1
        elif letter == "}" and depth:
            depth -= 1
            if not depth:
                yield text[start:at]


def _between_commas(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth <= 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def matching(pattern: str, root: Path) -> list[str]:
    """The paths below a folder that a glob matches, sorted; `**` is any number of folders.

    Links to folders are followed, but not to one above themselves.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        # Path.glob takes no absolute pattern.
        return sorted(glob.glob(pattern, root_dir=root))  # noqa: PTH207
    at = parts.index("**")
    starts = matching("/".join(parts[:at]) + "/", root) if at else [""]
    behind = "/".join(parts[at + 1 :]) or "*"
    found: set[str] = set()
    for start in starts:
        for folder, _ in folders_below(root / start, links=True, hidden=False):
            below = folder.relative_to(root) if folder.is_relative_to(root) else folder
            found.update(str(below / name) for name in matching(behind, folder))
    return sorted(found)
