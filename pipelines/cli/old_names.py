"""Find settings that an earlier version named otherwise, and say their new names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import yaml

from lapilli.data.io.yaml_text import load_yaml
from lapilli.data.renamed import Renamed

__all__ = ["MOVED_FLAGS", "describe_old_names"]

# Flags of train and show that have become verbs.
MOVED_FLAGS = {
    f"--{verb}": f"lapilli {verb}" for verb in ("estimate", "replay", "verify", "repair", "report")
}


def describe_old_names(kind: type[Any], arguments: Sequence[str]) -> str:
    """The new names of all that is old among flags and recipes' keys; empty where nothing is."""
    table: Renamed | None = getattr(kind, "old_names", None)
    if table is None:
        return ""
    found = [said for settings in _given(arguments) for said in table.found_in(settings)]
    return "; ".join(dict.fromkeys(found))


def _given(arguments: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Each flag and each recipe as nested settings; what cannot be read is the parser's to say."""
    for word, after in pairwise([*arguments, ""]):
        if not word.startswith("--"):
            continue
        flag, has_value, value = word[2:].partition("=")
        value = value if has_value else after
        if flag == "config":  # as `with_recipes` leaves it
            yield json.loads(value)
            continue
        with suppress(yaml.YAMLError):
            nested: Any = load_yaml(value) if value.startswith("{") else value
            for name in reversed(flag.removesuffix("+").split(".")):
                nested = {name: nested}
            yield nested
