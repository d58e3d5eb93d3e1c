"""Read LLaMA-Factory's or ms-swift's settings from YAML or JSON, as the flags that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lapilli.data.io.whole_file import read_whole
from lapilli.data.io.yaml_text import UnusableYaml, load_yaml
from pipelines.cli.command import UsageError
from pipelines.launch_scripts.shell import LIST, Launch

__all__ = ["read_settings", "settings_of_file"]


def read_settings(text: str) -> dict[str, str] | None:
    """The flags of a settings file; None for a text that is no mapping, such as a script.

    Raises:
        UsageError: A value that is a mapping, or a list of lists.
    """
    try:
        found: Any = load_yaml(text)
    except UnusableYaml:
        return None
    if not isinstance(found, dict):
        return None
    values: dict[Any, Any] = found
    return {
        f"{name}": _text(f"{name}", value) for name, value in values.items() if value is not None
    }


def _text(name: str, value: Any) -> str:
    """A value as a command would give it."""
    values: list[Any] = value if isinstance(value, list) else [value]
    if bad := [one for one in values if isinstance(one, (dict, list))]:
        raise UsageError(f"{name}: {str(bad[0])[:60]!r}; expected a value, or a list of values")
    return LIST.join(map(str, values))


def settings_of_file(launch: Launch, folder: Path) -> Launch:
    """A command with the settings of the file that it names, below its own flags.

    Raises:
        UsageError: The file is not there, or holds no settings.
    """
    path = folder / launch.file
    try:
        found = read_settings(read_whole(path).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{launch.file}: cannot be read ({error}); expected it below --folder"
        ) from None
    if found is None:
        raise UsageError(f"{launch.file}: no settings; expected YAML of NAME: VALUE")
    return launch.with_flags({**found, **launch.flags})
