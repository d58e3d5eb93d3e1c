"""From an image key of an annotation file to the place its bytes are at.

A key is data from strangers: it never leads outside its root, symlinks included.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lapilli.data.errors import DataError
from lapilli.data.record import Reason, Verdict, excerpt, is_unicode

__all__ = ["FolderMount", "Located"]

# Another extension is a repair only if the file found claims to be an image: a caption or a
# feature file of the same stem is not the image.
EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)


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


@dataclass(frozen=True)
class _Listing:
    """Files of one folder, by lower-case name and by lower-case stem of those called images."""

    by_name: dict[str, list[str]]
    by_stem: dict[str, list[str]]


@dataclass
class FolderMount:
    """Images in a folder below the dataset's root.

    `locate` mends what published mixtures get wrong: another extension on disk than in the file,
    another case, a folder spelt otherwise.

    Attributes:
        root: The dataset's root, which no image may lie outside of.
        prefix: Folder below the root that keys start at.
        aliases: Parts of a key that are spelt otherwise on disk.
        repairs: Keys mended so far, by kind.
    """

    root: Path
    prefix: str = "."
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    repairs: Counter[str] = field(default_factory=Counter[str])
    _places: dict[str, Located | Verdict] = field(default_factory=dict[str, "Located | Verdict"])
    _listings: dict[Path, _Listing] = field(default_factory=dict[Path, _Listing])
    _real_folders: dict[Path, Path] = field(default_factory=dict[Path, Path])

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
        if key not in self._places:  # LLaVA's 665K records name 350K images
            self._places[key] = self._look_up(key)
        place = self._places[key]
        if isinstance(place, Located) and place.repair:
            self.repairs[place.repair] += 1
        return place

    def _look_up(self, key: str) -> Located | Verdict:
        if "\0" in key or PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            return Verdict(Reason.IMAGE_OUTSIDE_ROOT, f"'{excerpt(key)}' leads outside the root")
        try:
            return self._inspect(key)
        except (OSError, ValueError) as error:  # ValueError: a name the system cannot spell
            why = error.strerror if isinstance(error, OSError) else "no file can have this name"
            return Verdict(Reason.IMAGE_MISSING, f"'{excerpt(key)}': {why}")

    def _inspect(self, key: str) -> Located | Verdict:
        found = self._find(PurePosixPath(self.prefix) / key)
        if found is None:
            return Verdict(Reason.IMAGE_MISSING, f"no file '{excerpt(key)}' below '{self.prefix}'")
        path, repair = found
        real = self._real(path)
        if not real.is_relative_to(self.root):
            return Verdict(Reason.IMAGE_OUTSIDE_ROOT, f"'{excerpt(key)}' is a link out of the root")
        image_id = real.relative_to(self.root).as_posix()
        if not is_unicode(image_id):
            return Verdict(Reason.IMAGE_MISSING, f"the file name of '{excerpt(key)}' is no UTF-8")
        if not os.access(real, os.R_OK):
            return Verdict(Reason.IMAGE_MISSING, f"'{excerpt(key)}': no permission to read it")
        stat = real.stat()
        return Located(image_id, stat.st_size, stat.st_mtime_ns, repair)

    def _real(self, path: Path) -> Path:
        """`path.resolve()`, each folder once: 60 us less for each of a source's images."""
        if path.is_symlink():
            return path.resolve()
        if path.parent not in self._real_folders:
            self._real_folders[path.parent] = path.parent.resolve()
        return self._real_folders[path.parent] / path.name

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
        for repair, names in (
            ("case", listing.by_name.get(path.name.lower(), [])),
            ("extension", listing.by_stem.get(path.stem.lower(), [])),
        ):
            if names:
                return (path.parent / names[0], repair) if len(names) == 1 else None
        return None

    def _listing(self, folder: Path) -> _Listing:
        """What lies in a folder; read once, since a source misses in bulk."""
        if folder not in self._listings:
            by_name: dict[str, list[str]] = {}
            by_stem: dict[str, list[str]] = {}
            for name in _file_names(folder):
                by_name.setdefault(name.lower(), []).append(name)
                if Path(name).suffix.lower() in EXTENSIONS:
                    by_stem.setdefault(Path(name).stem.lower(), []).append(name)
            self._listings[folder] = _Listing(by_name, by_stem)
        return self._listings[folder]


def _file_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return [item.name for item in found if item.is_file()]
    except OSError:
        return []
