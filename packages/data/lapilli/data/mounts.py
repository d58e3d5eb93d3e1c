"""From an image key of an annotation file to the place its bytes are at.

A key is data from strangers: it never leads outside its root, symlinks included.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lapilli.data.errors import DataError
from lapilli.data.record import Reason, Verdict

__all__ = ["FolderMount", "Located"]


@dataclass(frozen=True)
class Located:
    """An image found: its identity (container and member) and the file to read.

    Attributes:
        image_id: Path below the root with links followed, so two spellings of one file agree.
        size: Bytes.
        mtime_ns: When the file was last written; a change between two runs is noticed.
        repair: What was mended to find it (`extension`, `case`, `alias`), or "".
    """

    image_id: str
    size: int
    mtime_ns: int
    repair: str = ""


@dataclass
class FolderMount:
    """Images in a folder below the dataset's root.

    `locate` mends what published mixtures get wrong: another extension on disk than in the file,
    another case, a folder spelt otherwise.
    """

    root: Path
    prefix: str = "."
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    repairs: Counter[str] = field(default_factory=Counter[str])
    _listings: dict[Path, dict[str, str]] = field(default_factory=dict[Path, dict[str, str]])

    def __post_init__(self) -> None:
        """Resolve the root once; every key is checked against it."""
        self.root = self.root.resolve()
        if not (self.root / self.prefix).is_dir():
            raise DataError(
                f"images: folder {self.root / self.prefix} does not exist; "
                "expected the images of this source; check --root and the recipe's `images`"
            )

    def locate(self, key: str) -> Located | Verdict:
        """Find the file a key names, or say why it cannot be used."""
        if "\0" in key or PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            return Verdict(Reason.IMAGE_OUTSIDE_ROOT, f"key {key!r} leads outside the root")
        found = self._find(PurePosixPath(self.prefix) / key)
        if found is None:
            return Verdict(Reason.IMAGE_MISSING, f"no file {key!r} below {self.prefix!r}")
        path, repair = found
        real = path.resolve()
        if not real.is_relative_to(self.root):
            return Verdict(Reason.IMAGE_OUTSIDE_ROOT, f"{key!r} is a link to outside the root")
        if repair:
            self.repairs[repair] += 1
        stat = real.stat()
        image_id = real.relative_to(self.root).as_posix()
        return Located(image_id, stat.st_size, stat.st_mtime_ns, repair)

    def _find(self, member: PurePosixPath) -> tuple[Path, str] | None:
        """The member's file and the repair that found it, tried from the least to the most."""
        path = self.root / member
        if path.is_file():
            return path, ""
        aliased = self.root.joinpath(*(self.aliases.get(part, part) for part in member.parts))
        if aliased != path and aliased.is_file():
            return aliased, "alias"
        return self._find_sibling(aliased)

    def _find_sibling(self, path: Path) -> tuple[Path, str] | None:
        """A file beside `path` that differs in case or extension only, if there is just one."""
        if path.is_dir():
            return None
        listing = self._listing(path.parent)
        if path.name.lower() in listing:
            return path.parent / listing[path.name.lower()], "case"
        stem = path.stem.lower()
        matches = [name for name in listing.values() if Path(name).stem.lower() == stem]
        return (path.parent / matches[0], "extension") if len(matches) == 1 else None

    def _listing(self, folder: Path) -> dict[str, str]:
        """Files of a folder by lower-case name; read once, since a source misses in bulk."""
        if folder not in self._listings:
            try:
                with os.scandir(folder) as found:
                    names = sorted(item.name for item in found if item.is_file())
            except (FileNotFoundError, NotADirectoryError):
                names = []
            self._listings[folder] = {name.lower(): name for name in names}
        return self._listings[folder]
