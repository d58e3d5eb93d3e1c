"""Keys to places: repairs, archives that stand in for folders, and nothing outside of the root."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lapilli.data.access import blame, is_denied
from lapilli.data.errors import DataError
from lapilli.data.mounts.archives import BadArchive
from lapilli.data.mounts.folders import Boundary, Folder, open_folder
from lapilli.data.mounts.places import ARCHIVES, Located, is_remote
from lapilli.data.mounts.published import PublishedArchive, published
from lapilli.data.record import Reason, Verdict, excerpt

__all__ = ["Mount"]

NOT_A_LETTER = re.compile(r"[^a-z0-9]")


@dataclass(frozen=True, slots=True)
class _Reached:
    """A folder that a key's path led to, and the repair that it took."""

    folder: Folder
    repair: str


@dataclass
class Mount:
    """The images of a source: a folder below the dataset's root, or one elsewhere.

    `locate` mends what published mixtures get wrong: another extension on disk than in the file,
    another case, a folder spelt otherwise. A path goes on inside an archive that it names
    (`shards/0.tar/1.jpg`), and where a folder is missing but its archive is there
    (`coco/train2017` and `coco/train2017.zip`) the archive is read in its place.

    Attributes:
        root: The dataset's root, which no image may lie outside of.
        prefix: Folder below the root that keys start at; an absolute folder or an address
            (`s3://bucket/images`) for images elsewhere.
        aliases: Parts of a key that are spelt otherwise on disk.
        extra_roots: Further folders that links below the root may lead to.
        repairs: Keys mended so far, by kind.
        lost: Folders that were not there, nor their archives, as one line each that says how to
            get them; counted by keys asked for.
    """

    root: Path
    prefix: str = "."
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    extra_roots: tuple[str, ...] = ()
    repairs: Counter[str] = field(default_factory=Counter[str])
    lost: Counter[str] = field(default_factory=Counter[str])
    _places: dict[str, Located | Verdict] = field(default_factory=dict[str, "Located | Verdict"])
    _folders: dict[str, _Reached | Verdict] = field(default_factory=dict[str, "_Reached | Verdict"])

    def __post_init__(self) -> None:
        """Open the folder that paths start at."""
        self.root = self.root.resolve()
        elsewhere = is_remote(self.prefix) or PurePosixPath(self.prefix).is_absolute()
        start = self.prefix if elsewhere else ""
        # An absolute `images` is the user's word: what lies below it is inside.
        extra = (self.prefix, *self.extra_roots) if elsewhere else self.extra_roots
        folders = tuple(Path(name).resolve() for name in extra if not is_remote(name))
        self._start = _Reached(open_folder(start, Boundary(self.root, folders)), "")
        self._shown_root = self.prefix if elsewhere else str(self.root)
        below = "." if elsewhere else PurePosixPath(self.prefix).as_posix()
        self._below = "" if below == "." else below

    def require(self) -> None:
        """Stop early where all images would be missing.

        Raises:
            DataError: Neither the folder of the images nor its archive is there.
        """
        try:
            reached = self._reach(self._below)
            if isinstance(reached, _Reached):
                _ = reached.folder.listing
                return
            why = reached.detail
        except (OSError, BadArchive) as error:
            if is_denied(error):
                raise DataError(f"images: {blame(error) or excerpt(str(error))}") from None
            why = excerpt(str(error))
        place = f"{self._shown_root}/{self._below}".rstrip("/")
        raise DataError(
            f"images: folder {place} does not exist ({why}); expected the images of this source; "
            "check --root and the recipe's `images`"
        )

    def locate(self, key: str) -> Located | Verdict:
        """Find the image that a key names, or say why it cannot be used."""
        place = self._places.get(key)
        if place is None:  # LLaVA's 665K records name 350K images
            place = self._places[key] = self._look_up(key)
        if isinstance(place, Located) and place.repair:
            self.repairs[place.repair] += 1
        return place

    def _look_up(self, key: str) -> Located | Verdict:
        path = f"{self._below}/{key}" if self._below else key
        if "\0" in key or key.startswith("/") or ".." in path.split("/"):
            return Verdict(Reason.IMAGE_OUTSIDE_ROOT, f"'{excerpt(key)}' leads outside the root")
        try:
            return self._find(key, *_split(path))
        except BadArchive as error:
            return Verdict(error.reason, f"'{excerpt(key)}': {error}")
        except (OSError, ValueError) as error:  # ValueError: a name the system cannot spell
            why = error.strerror if isinstance(error, OSError) else "no file can have this name"
            reason = Reason.IMAGE_UNREADABLE if is_denied(error) else Reason.IMAGE_MISSING
            return Verdict(reason, f"'{excerpt(key)}': {why or excerpt(str(error))}")

    def _find(self, key: str, folder: str, name: str) -> Located | Verdict:
        """The file, tried from the least repair to the most."""
        exact = self._reach(folder)
        aliased = "/".join(self.aliases.get(part, part) for part in folder.split("/"))
        alias_name = self.aliases.get(name, name)
        other = exact if aliased == folder else self._reach(aliased)
        if isinstance(exact, _Reached) and name in exact.folder.listing.files:
            return exact.folder.locate(name, exact.repair)
        if isinstance(other, _Reached):
            spelt_otherwise = aliased != folder or alias_name != name
            repair = "alias" if spelt_otherwise else other.repair
            if alias_name in other.folder.listing.files:
                return other.folder.locate(alias_name, repair)
            return _sibling(other, alias_name, repair) or Verdict(
                Reason.IMAGE_MISSING, f"no file '{excerpt(key)}' below '{self.prefix}'"
            )
        self.lost[other.detail] += 1
        return other

    def _reach(self, path: str) -> _Reached | Verdict:
        """The folder at a path from the start, each found once."""
        if not path:
            return self._start
        if path not in self._folders:
            above, _, name = path.rpartition("/")
            reached = self._reach(above)
            if isinstance(reached, _Reached):
                found = self._step(reached, name) or self._stand_in(reached.folder, path)
            else:
                found = self._stand_in(None, path)
                # The folder above is what is missing, unless this one has an archive to get.
                if isinstance(found, Verdict) and self._published(path) is None:
                    found = reached
            self._folders[path] = found
        return self._folders[path]

    def _step(self, above: _Reached, name: str) -> _Reached | None:
        """One part of a path further: a folder, an archive, or a folder spelt otherwise."""
        listing = above.folder.listing
        if name in listing.folders or (name in listing.files and name.endswith(ARCHIVES)):
            return _Reached(above.folder.child(name), above.repair)
        for repair, same in (("case", str.lower), ("alias", _letters)):
            names = [other for other in listing.folders if same(other) == same(name)]
            if len(names) == 1:
                return _Reached(above.folder.child(names[0]), repair)
        return None

    def _stand_in(self, above: Folder | None, path: str) -> _Reached | Verdict:
        """The archive of a folder that is not there: beside it, or in the root."""
        archive = self._published(path)
        name = path.rpartition("/")[2]
        names = [archive.name] if archive is not None else []
        names += [f"{name}.zip", f"{name}.tar"]
        places = [(above, names)] if above is not None else []
        # In the root `images.zip` may be anybody's: three data sets call theirs so.
        places.append((self._start.folder, [n for n in names if not n.startswith("images.")]))
        for folder, candidates in places:
            for candidate in candidates:
                if candidate in folder.listing.files:
                    return _Reached(folder.child(candidate).folder_called(name), "")
        hint = ""
        if archive is not None:
            size = f" ({archive.gigabytes:g} GB)" if archive.gigabytes else ""
            command = archive.command(self._shown(path))
            hint = f", nor its archive {archive.name}{size}; get it: {command}"
        return Verdict(Reason.IMAGE_MISSING, f"no folder '{excerpt(path)}'{hint}")

    def _published(self, path: str) -> PublishedArchive | None:
        return published(path if "/" in path else f"{self.root.name}/{path}")

    def _shown(self, path: str) -> str:
        """The folder above `path`, as a command may name it."""
        return f"{self._shown_root}/{path.rpartition('/')[0]}".rstrip("/")


def _split(path: str) -> tuple[str, str]:
    """A path's folder and name, without empty parts and dots."""
    if "//" in path or "./" in path or path.endswith(("/", "/.")) or path == ".":
        path = PurePosixPath(path).as_posix()
    folder, _, name = path.rpartition("/")
    return folder, name


def _letters(name: str) -> str:
    """A name as one who spells it otherwise means it: `text_vqa` is `textvqa`."""
    return NOT_A_LETTER.sub("", name.lower())


def _sibling(reached: _Reached, name: str, repair: str) -> Located | Verdict | None:
    """A file that differs in case or extension only, if there is just one."""
    listing = reached.folder.listing
    if not name or name in listing.folders:
        return None
    for kind, names in (("case", listing.by_name(name)), ("extension", listing.by_stem(name))):
        if names:
            return reached.folder.locate(names[0], repair or kind) if len(names) == 1 else None
    return None
