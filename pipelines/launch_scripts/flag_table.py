"""Read and check the table of a trainer's flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipelines.cli.command import UsageError

__all__ = ["Flag", "FlagTable", "llava_flags"]

TABLE = Path(__file__).parent / "llava.yaml"
TRUE, FALSE = {"true", "yes", "y", "t", "1"}, {"false", "no", "n", "f", "0"}
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Flag:
    """A flag of another trainer; the keys are those of the table's README."""

    name: str
    of: str
    default: Any = None
    type: str = ""
    train: str = ""
    data: str = ""
    values: dict[Any, Any] = field(default_factory=dict[Any, Any])
    how: str = ""
    implied: str = ""
    ignored: str = ""
    unsupported: str = ""
    accepts: tuple[Any, ...] = ()

    def read(self, text: str) -> Any:
        """The value of a text as the trainer's parser reads it.

        Raises:
            UsageError: It is none of the flag's type.
        """
        kinds: dict[str, type] = {"bool": bool, "int": int, "float": float}
        kind = kinds.get(self.type, type(self.default))
        try:
            if kind is bool and text.lower() in TRUE | FALSE:
                return text.lower() in TRUE
            if kind is int and float(text) == int(float(text)):
                return int(float(text))
            if kind is float:
                return float(text)
        except (ValueError, OverflowError):
            pass
        if kind in KINDS:
            raise UsageError(f"--{self.name}: {text!r}; expected {KINDS[kind]}")
        return text

    def setting(self, value: Any) -> Any:
        """What a value is called here.

        Raises:
            UsageError: It means something that is not supported.
        """
        if self.values and value not in self.values:
            known = ", ".join(map(str, self.values))
            raise UsageError(f"--{self.name}: {value!r} is not supported; expected one of {known}")
        if self.accepts and value not in self.accepts:
            known = ", ".join(map(str, self.accepts))
            why = self.unsupported or f"always so here: {self.implied}"
            raise UsageError(f"--{self.name}: {value!r} is not supported ({why}); expected {known}")
        return self.values.get(value, value)


@dataclass(frozen=True)
class FlagTable:
    """The flags of a trainer at one commit of its repository."""

    repository: str
    commit: str
    transformers: str
    flags: dict[str, Flag]


@cache
def llava_flags() -> FlagTable:
    """LLaVA's."""
    values: dict[str, Any] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, Any]] = values.pop("flags")
    flags: dict[str, Flag] = {}
    for name, row in rows.items():
        row["accepts"] = tuple(row.get("accepts", ()))
        flags[name] = Flag(name=name, **row)
    return FlagTable(**{name: str(value) for name, value in values.items()}, flags=flags)
