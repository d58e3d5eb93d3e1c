"""What a command allows a folder's own files to run. Nothing by default.

Settings on the command line and in a recipe that the user names are the user's word. A run's, a
dataset's or an export's own `config.json` is not: it may come from somebody else.
"""

from __future__ import annotations

from dataclasses import dataclass

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.record import excerpt

__all__ = ["NOTHING", "Trust", "code_line", "is_own_code", "require_readers"]


@dataclass(frozen=True)
class Trust:
    """What the user's command allows.

    Attributes:
        remote_code: The code that comes with a model's weights (`--trust_remote_code`).
        pickle: Weights that are not in safetensors (`--allow_pickle`).
        code: Names `package.module:name` that may be imported (`--allow_code`).
    """

    remote_code: bool = False
    pickle: bool = False
    code: frozenset[str] = frozenset()


NOTHING = Trust()
ALLOW_CODE = "--allow_code"


def is_own_code(name: str) -> bool:
    """Whether a name has the form `package.module:name`, and is not one that the packages know."""
    return ":" in name


def code_line(where: object, field: str, name: str) -> str:
    """The line for a name that a folder asks for and the command does not allow."""
    shown = excerpt(name)
    return (
        f"{where}: {field} asks for code of its own, {shown}; if you know this code, pass "
        f"{ALLOW_CODE} {shown}"
    )


def require_readers(config: BuildConfig, trust: Trust, where: object) -> None:
    """Refuse settings out of a dataset that ask for a reader of their own.

    Args:
        config: The settings.
        trust: What the command allows.
        where: The file they stand in, for the error.

    Raises:
        DataError: Names the source, the reader and the flag that allows it.
    """
    for source in config.sources:
        if is_own_code(source.format) and source.format not in trust.code:
            field = f"sources.format of source {source.name}"
            raise DataError(code_line(where, field, source.format))
    for name, target in config.targets.items():
        if is_own_code(target.teacher) and target.teacher not in trust.code:
            raise DataError(code_line(where, f"targets.{name}.teacher", target.teacher))
