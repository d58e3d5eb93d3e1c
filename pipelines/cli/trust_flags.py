"""Flags that allow what a folder's own files request."""

from __future__ import annotations

from dataclasses import dataclass

from lapilli.data.trust import Trust, is_own_code
from pipelines.cli.command import UsageError

__all__ = ["TrustFlags", "trusted_names"]


@dataclass(frozen=True, kw_only=True)
class TrustFlags:
    """What a run's or dataset's own files may execute; nothing by default.

    Attributes:
        trust_remote_code: Run the code that comes with the weights that a run names.
        allow_pickle: Read weights that a run names and that are not in safetensors.
        allow_code: Names `package.module:name`, separated by commas, of towers, projectors and
            readers that a run or a dataset may import.
    """

    trust_remote_code: bool = False
    allow_pickle: bool = False
    allow_code: str = ""

    @property
    def trust(self) -> Trust:
        """The flags as the libraries take them.

        Raises:
            UsageError: A name that is spelt otherwise.
        """
        names = trusted_names(self.allow_code)
        return Trust(remote_code=self.trust_remote_code, pickle=self.allow_pickle, code=names)


def trusted_names(text: str) -> frozenset[str]:
    """The names of `--allow_code`.

    Raises:
        UsageError: One that is not spelt `package.module:name`.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if not is_own_code(name)]
    if wrong:
        raise UsageError(f"allow_code: {wrong[0]!r}; expected package.module:name, with a colon")
    return frozenset(names)
