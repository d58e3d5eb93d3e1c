"""The public names of the packages, written down: `python -m tests.contracts.public_names`.

A line is `module: name`; a function has its parameters behind it (`*` before those that need their
name), a dataclass its fields, an enumeration its values.
"""

from __future__ import annotations

import enum
import importlib
import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

__all__ = ["LISTING", "listing"]

LISTING = Path(__file__).with_name("public_names.txt")
HEADER = "# The public names. Renew by `make public-names`, and tell of it in the commit message."

PACKAGES = ("lapilli.data", "lapilli.model", "lapilli.train")


def listing() -> str:
    """The file as it should be."""
    names = [
        f"{package}:{name}"
        for package in PACKAGES
        for name in sorted(importlib.import_module(package).__all__)
    ]
    return "\n".join([HEADER, *map(line, names)]) + "\n"


def line(full_name: str) -> str:
    """`module: name(parameters)`."""
    module, name = full_name.split(":")
    return f"{module}: {name}{shape(getattr(importlib.import_module(module), name))}"


def shape(value: Any) -> str:
    """What a caller writes between the brackets, if the name can be called."""
    if isinstance(value, enum.EnumMeta):
        members: list[Any] = list(value)
        return "{" + ", ".join(str(member.value) for member in members) + "}"
    if is_dataclass(value) and isinstance(value, type):
        return "(" + ", ".join(field.name for field in fields(value)) + ")"
    if inspect.isfunction(value):
        return "(" + ", ".join(parameters(value)) + ")"
    return ""


def parameters(function: Any) -> list[str]:
    """Names as in a signature, without types and defaults."""
    found: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(parameter.name)
    return found


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
    print(f"written: {LISTING}")
