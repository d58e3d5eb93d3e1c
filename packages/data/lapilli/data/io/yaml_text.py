"""Parse YAML with bounds on size, depth and alias expansion.

A few lines of nested aliases can expand to more values than fit in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import yaml

from lapilli.data.record import excerpt

__all__ = ["UnusableYaml", "load_yaml"]

LONGEST = 16 << 20  # characters
DEEPEST = 64  # lists and mappings in each other
MOST_NODES = 1 << 20  # with what aliases unfold to; a long text counts as several
LONG_TEXT = 64  # characters of a text that count as one node
LONGEST_NUMBER = 4300  # digits, as Python's own limit
NUMBER = re.compile(r"[-+]?[0-9][0-9_:.]*")


class UnusableYaml(yaml.YAMLError):
    """A text that is not YAML, or exceeds the bounds; one line."""


@dataclass
class _Open:
    """A list or a mapping that has begun: its anchor, and the nodes before it."""

    anchor: str | None
    before: int


def load_yaml(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """What a YAML text holds.

    Args:
        text: The text.
        load: Reads it once it is known to be small.

    Raises:
        UnusableYaml: It is not YAML, or is too large, too deep, or expands to too many values.
    """
    try:
        _check(text)
        return load(text)
    except UnusableYaml:
        raise
    except yaml.YAMLError as error:
        raise UnusableYaml(excerpt(" ".join(str(error).split()), 300)) from None
    except Exception as error:  # constructors raise what `int` and others do
        what = " ".join(str(error).split()) or type(error).__name__
        raise UnusableYaml(f"a value that cannot be read: {excerpt(what)}") from None


def _check(text: str) -> None:
    if len(text) > LONGEST:
        raise UnusableYaml(f"{len(text)} characters; at most {LONGEST} are read")
    nodes = 0
    sizes: dict[str, int] = {}
    opened: list[_Open] = []
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in cast("Any", yaml.parse(text, Loader=loader)):
        anchor: str | None = getattr(event, "anchor", None)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Open(anchor, nodes))
            nodes += 1
            if len(opened) > DEEPEST:
                raise UnusableYaml(f"nested more than {DEEPEST} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = opened.pop()
            if ended.anchor is not None:
                sizes[ended.anchor] = nodes - ended.before
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value) // LONG_TEXT
            nodes += size
            if anchor is not None:
                sizes[anchor] = size
            if len(event.value) > LONGEST_NUMBER and NUMBER.fullmatch(event.value):
                raise UnusableYaml(f"a number of {len(event.value)} digits")
        elif isinstance(event, yaml.AliasEvent) and anchor is not None:
            if any(one.anchor == anchor for one in opened):
                raise UnusableYaml(f"'{excerpt(anchor)}' holds itself")
            nodes += sizes.get(anchor, 1)
        if nodes > MOST_NODES:
            raise UnusableYaml(f"its aliases expand to more than {MOST_NODES} values")
