"""Count what a source holds beside its records: unread fields, archive members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Members", "Tally", "describe_tally", "named", "tally_facts"]

MOST_NAMES = 200  # a file of strangers may have another name in each record
OTHER_NAMES = "(other names)"
SHOWN = 12  # names on one line


@dataclass
class Members:
    """The members of a source's archives by suffix; `used` and `unused` are all of them.

    Attributes:
        used: Images and texts that records are made of.
        unused: All others: folders, further images, what no suffix tells.
        unknown: Of the unused those whose suffix the reader does not know.
    """

    used: Counter[str] = field(default_factory=Counter[str])
    unused: Counter[str] = field(default_factory=Counter[str])
    unknown: Counter[str] = field(default_factory=Counter[str])

    def count(self, suffix: str, used: bool, unknown: bool) -> None:
        """Count one member; of very many suffixes those of one kind are counted together."""
        counts = self.used if used else self.unused
        name = suffix if suffix in counts or len(counts) < MOST_NAMES else OTHER_NAMES
        counts[name] += 1
        if unknown and not used:
            self.unknown[name] += 1

    @property
    def total(self) -> int:
        """Members in the archives."""
        return self.used.total() + self.unused.total()


@dataclass
class Tally:
    """What was met while a source was read.

    Attributes:
        fields: Records by the name of a field that nothing reads.
        members: The members of its archives, for a source of archives, when all is read.
        most: Names that are counted apart, those met first.
    """

    fields: Counter[str] = field(default_factory=Counter[str])
    members: Members | None = None
    most: int = MOST_NAMES

    def count(self, names: Iterable[str], times: int = 1) -> None:
        """Count some records' fields, each name once."""
        for name in dict.fromkeys(names):
            known = name in self.fields or len(self.fields) < self.most
            self.fields[name if known else OTHER_NAMES] += times


def tally_facts(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """`fields` and `members` by source, as a manifest has them; sources without any left out."""
    members = {
        name: {
            "total": tally.members.total,
            "used": dict(sorted(tally.members.used.items())),
            "unused": dict(sorted(tally.members.unused.items())),
            "unknown": dict(sorted(tally.members.unknown.items())),
        }
        for name, tally in tallies.items()
        if tally.members is not None
    }
    fields = {
        name: dict(sorted(tally.fields.items(), key=lambda item: (-item[1], item[0])))
        for name, tally in tallies.items()
        if tally.fields
    }
    return {"fields": fields, "members": members}


def describe_tally(tally: Tally) -> list[str]:
    """What a source holds beside its records, a line each of fields and of members."""
    lines: list[str] = []
    if tally.fields:
        lines.append(f"fields not read, by records: {named(tally.fields)}")
    if (members := tally.members) is not None:
        line = f"{members.total:,} members: {members.used.total():,} used ({named(members.used)})"
        if members.unused:
            line += f", {members.unused.total():,} not used ({named(members.unused)})"
        if members.unknown:
            line += f", of these of an unknown suffix {named(members.unknown)}"
        lines.append(line)
    return lines


def named(counts: Mapping[str, int]) -> str:
    """Names with their numbers, the largest first, on one line."""
    pairs = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    return ", ".join(f"{name} {number:,}" for name, number in pairs[:SHOWN]) + more
