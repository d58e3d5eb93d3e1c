"""Read and check the tables of trainers' flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipelines.cli.command import UsageError

__all__ = ["TRAINERS", "Flag", "FlagTable", "flag_table", "llava_flags"]

TRAINERS = (
    "llava", "visper_lm", "visper_lm_pretrain", "gaudi_llava", "basic_vlm", "llama_factory",
    "ms_swift",
)  # fmt: skip
"""The trainers whose flags are known, each after the one that its table begins with."""

TRUE, FALSE = {"true", "yes", "y", "t", "1"}, {"false", "no", "n", "f", "0"}
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}
CODE = "code"  # `of` of a value that the trainer's code fixes


@dataclass(frozen=True)
class Flag:
    """A flag of another trainer; the keys are those of the table's README."""

    name: str
    of: str
    default: Any = None
    type: str = ""
    same_as: str = ""
    train: str = ""
    data: str = ""
    values: dict[Any, Any] = field(default_factory=dict[Any, Any])
    how: str = ""
    differs: str = ""
    implied: str = ""
    ignored: str = ""
    unsupported: str = ""
    accepts: tuple[Any, ...] = ()

    @property
    def is_fixed(self) -> bool:
        """Whether the trainer's code fixes the value, and no script gives it."""
        return self.of == CODE

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

    def is_supported(self, value: Any) -> bool:
        """Whether a value has a meaning here."""
        if self.values and value not in self.values:
            return False
        return value in self.accepts if self.accepts else not self.unsupported

    def setting(self, value: Any) -> Any:
        """What a value is called here.

        Raises:
            UsageError: It means something that is not supported.
        """
        if self.values and value not in self.values:
            known = ", ".join(map(str, self.values))
            raise UsageError(f"--{self.name}: {value!r} is not supported; expected one of {known}")
        if not self.is_supported(value):
            known = ", ".join(map(str, self.accepts))
            why = self.unsupported or f"always so here: {self.implied}"
            expected = f"; expected {known}" if known else ""
            raise UsageError(f"--{self.name}: {value!r} is not supported ({why}){expected}")
        return self.values.get(value, value)


@dataclass(frozen=True)
class FlagTable:
    """The flags of a trainer at one commit of its repository.

    Attributes:
        title: What it is called in a message.
        repository: Owner and name on GitHub.
        commit: Of that repository.
        transformers: Version whose `TrainingArguments` it has.
        recognised_by: Parts of a command, or names of flags, that no trainer before it has.
        flags: By name.
    """

    title: str
    repository: str
    commit: str
    transformers: str
    recognised_by: tuple[str, ...]
    flags: dict[str, Flag]


@cache
def flag_table(name: str) -> FlagTable:
    """A trainer's table, on top of the one that its `base` names."""
    path = Path(__file__).parent / f"{name}.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    flags: dict[str, Flag] = {}
    if base := values.pop("base", ""):
        without = values.pop("without", ())
        inherited = flag_table(base)
        flags = {n: f for n, f in inherited.flags.items() if not {n, f.of} & {*without}}
        values.setdefault("transformers", inherited.transformers)
    rows: dict[str, dict[str, Any]] = values.pop("flags")
    for flag, row in rows.items():
        row["accepts"] = tuple(row.get("accepts", ()))
        flags[flag] = Flag(name=flag, **row)
    recognised_by = tuple(map(str, values.pop("recognised_by", ())))
    texts = {key: str(value) for key, value in values.items()}
    return FlagTable(**texts, recognised_by=recognised_by, flags=flags)


def llava_flags() -> FlagTable:
    """LLaVA's."""
    return flag_table("llava")
