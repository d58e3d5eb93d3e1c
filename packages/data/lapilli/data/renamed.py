"""Settings that have been renamed: an old name is an error that says the new one, not an alias.

What an earlier version has written under old names is still read, converted by the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

__all__ = ["BUILD_NAMES", "Renamed"]


@dataclass(frozen=True)
class Renamed:
    """The old names of a config's settings.

    Attributes:
        names: Old dotted name to new dotted name.
        values: Old dotted name to old value to new value, where the values changed too.
    """

    names: Mapping[str, str]
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    def _describe(self, name: str, value: object) -> str:
        changed = self.values.get(name, {}).get(str(value))
        values = f", {value} to {changed}" if changed else ""
        return f"{name}: renamed to {self.names[name]}{values}"

    def found_in(self, settings: Mapping[str, Any]) -> list[str]:
        """What to say of each old name among nested settings: `workers: renamed to num_workers`."""
        return [self._describe(name, value) for name, value in self._old(settings)]

    def with_new_names(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of nested settings in which old names and values are the new ones."""
        old = dict(self._old(settings))
        converted = _without(settings, old, "")
        for name, value in old.items():
            *groups, last = self.names[name].split(".")
            inside: Any = converted
            for group in groups:
                inside = inside.setdefault(group, {}) if isinstance(inside, dict) else None
            if isinstance(inside, dict) and last not in inside:
                inside[last] = self.values.get(name, {}).get(str(value), value)
            else:  # no group, or under both names: who reads it says that the old one is unknown
                converted[name] = value
        return converted

    def _old(self, settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in settings.items():
            name, is_group = f"{prefix}{key}", isinstance(value, Mapping)
            if name in self.names and not (is_group and self.names[name].startswith(f"{name}.")):
                yield name, value
            elif is_group:
                yield from self._old(cast("Mapping[str, Any]", value), f"{name}.")


def _without(settings: Mapping[str, Any], names: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key: _without(cast("Mapping[str, Any]", value), names, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else value
        for key, value in settings.items()
        if f"{prefix}{key}" not in names
    }


BUILD_NAMES = Renamed({"workers": "num_workers", "amend": "incremental"})
