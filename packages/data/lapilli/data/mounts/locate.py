"""Resolve image keys to locations: repairs, archives in place of folders, never outside the root.

A key that is not there as it is called is decoded, and must then be there exactly; else it may be
another spelling of one file's name (`names`), or lie exactly so beside the annotation file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from lapilli.data.errors import DataError
from lapilli.data.io.access import blame, is_denied
from lapilli.data.io.addresses import split_root
from lapilli.data.io.filesystems import is_remote
from lapilli.data.mounts.archives import BadArchive
from lapilli.data.mounts.folders import Boundary, Folder, RemoteFolder, open_folder
from lapilli.data.mounts.keys import (
    is_inside,
    plain_path,
    split_path,
    tidy_path,
    too_long,
    unusable,
)
from lapilli.data.mounts.names import code_pages, composed, decoded
from lapilli.data.mounts.places import ARCHIVES, Located
from lapilli.data.mounts.published import PublishedArchive, published
from lapilli.data.mounts.repairs import EXACT, Repair, contradictions, folded, kind_of, worse
from lapilli.data.record import Reason, Verdict, excerpt

__all__ = ["Mount"]

MOST_DROPPED = 12  # leading folders of a missing key that are left out to look for it
LONG_KEY = 500  # characters, from which on it is looked at whether a key is a path at all


@dataclass(frozen=True, slots=True)
class _Reached:
    """A folder that a key's path led to, and the repair that it took."""

    folder: Folder
    repair: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A file that a key may mean; `means` is the path that the key then refers to."""

    folder: Folder
    name: str
    repair: str
    means: str

    @property
    def path(self) -> str:
        return self.folder.path_of(self.name)


@dataclass
class Mount:
    """The images of a source: a folder below the dataset's root, or one elsewhere.

    `locate` repairs common errors of mixtures: encoded keys, another extension or case on disk, a
    folder with another spelling. A path goes on inside an archive that it names
    (`shards/0.tar/1.jpg`), and where a folder is missing but its archive is there (`coco/train2017`
    and `coco/train2017.zip`) the archive is read in its place.

    Attributes:
        root: The dataset's root, which no image may lie outside of.
        prefix: Folder below the root that keys start at; an absolute folder or an address
            (`s3://bucket/images`) for images elsewhere; `s3://bucket/root/./images` for a
            folder below a root that is an address.
        aliases: Parts of a key that are spelt otherwise on disk.
        extra_roots: Further folders that links below the root may lead to.
        beside: Folder below the root that all annotation files lie in, where a missing image is
            looked for; None for none.
        remembers: Whether the place of each key is kept. Else only those of repaired and refused
            keys are, and `settle` is told the others.
        lost: Folders that were not there, nor their archives, as one line each that says how to
            get them; counted by keys.
    """

    root: Path
    prefix: str = "."
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    extra_roots: tuple[str, ...] = ()
    beside: str | None = None
    remembers: bool = True
    lost: Counter[str] = field(default_factory=Counter[str])
    _places: dict[str, Located | Verdict] = field(default_factory=dict[str, "Located | Verdict"])
    _folders: dict[str, _Reached | Verdict] = field(default_factory=dict[str, "_Reached | Verdict"])
    _repaired: dict[str, Repair] = field(default_factory=dict[str, Repair])

    def __post_init__(self) -> None:
        """Open the folder that paths start at."""
        if (parts := split_root(self.prefix)) is not None:
            self._start_at_address(*parts)
            return
        given = self.root.absolute()
        self.root = self.root.resolve()
        elsewhere = is_remote(self.prefix) or PurePosixPath(self.prefix).is_absolute()
        start = self.prefix if elsewhere else ""
        # An absolute `images` is the user's word: what lies below it is inside.
        extra = (self.prefix, *self.extra_roots) if elsewhere else self.extra_roots
        self._is_elsewhere, self._name = elsewhere, self.root.name
        self._shown_prefix = self.prefix
        folders = tuple(Path(name).resolve() for name in extra if not is_remote(name))
        self._start = _Reached(open_folder(start, Boundary(self.root, folders)), "")
        self._shown_root = self.prefix if elsewhere else str(self.root)
        below = "." if elsewhere else PurePosixPath(self.prefix).as_posix()
        self._below = "" if below == "." else below
        starts = (
            {self.prefix, _resolved(self.prefix)} if elsewhere else {str(given), str(self.root)}
        )
        self._starts = tuple(f"{name.rstrip('/')}/" for name in sorted(starts))

    def again(self, *, remembers: bool) -> Mount:
        """The same images, of which no key has been looked up; folders are not listed again."""
        made = Mount(
            root=self.root,
            prefix=self.prefix,
            aliases=self.aliases,
            extra_roots=self.extra_roots,
            beside=self.beside,
            remembers=remembers,
        )
        made._start = self._start
        made._folders = {p: r for p, r in self._folders.items() if isinstance(r, _Reached)}
        return made

    def _start_at_address(self, root: str, below: str) -> None:
        """Let paths start at a root in a store."""
        self._is_elsewhere, self._below, self._shown_root = False, below, root
        self._start = _Reached(RemoteFolder(root, ""), "")
        self._starts = (f"{root}/",)
        self._name, self._shown_prefix = root.rpartition("/")[2], below or "."

    @property
    def below(self) -> str:
        """What a path has before its key; "" for nothing."""
        return self._below

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
            place = self._look_up(key)
            if self.remembers or isinstance(place, Verdict) or place.repair:
                self._places[key] = place
        if isinstance(place, Located) and place.repair:
            self._repaired[key].times += 1
        return place

    def forget_listings(self) -> None:
        """Give the memory of folders' names back; one that is asked for again is listed again."""
        self._folders.clear()
        vars(self._start.folder).pop("listing", None)

    def settle(self, keys: Iterable[str] = ()) -> dict[str, Verdict]:
        """Revoke the repairs that contradict each other, once every key was located.

        Args:
            keys: Every key that was located, in that order, where the mount does not remember them.

        Returns:
            By key the verdict `ambiguous_image`, which `locate` has from now on.
        """
        if not self._repaired:
            return {}
        found = contradictions(self._repaired, self._exact_keys(keys))
        self._places.update(found)
        for key in found:
            del self._repaired[key]
        return found

    def identity(self, key: str) -> str:
        """The identity of an image that is there just as its key says, without a link."""
        return f"{self.prefix.rstrip('/')}/{key}" if self._is_elsewhere else self._path(key)

    def is_refused(self, key: str) -> bool:
        """Whether `locate` has said why this key cannot be used."""
        return isinstance(self._places.get(key), Verdict)

    @property
    def repairs(self) -> Counter[str]:
        """Number of repaired keys so far, by kind."""
        counts: Counter[str] = Counter()
        for repair in self._repaired.values():
            counts[repair.kind] += repair.times
        return counts

    def repaired(self) -> Iterator[tuple[str, str, str, int]]:
        """Key, identity of the image, kind and times of every repair, in the order of the keys."""
        for key, repair in self._repaired.items():
            place = self._places[key]
            if isinstance(place, Located):
                yield key, place.image_id, repair.kind, repair.times

    def _exact_keys(self, keys: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """Key, file and folded path of keys without a repair, for the files of repaired ones."""
        files = {repair.file for repair in self._repaired.values()}
        for key in self._places if self.remembers else keys:
            place = self._places.get(key)
            if isinstance(place, Verdict) or (place is not None and place.repair):
                continue
            folder, name = split_path(self._path(key))
            reached = self._reach(folder)
            if isinstance(reached, _Reached) and (file := reached.folder.path_of(name)) in files:
                yield key, file, folded(tidy_path(self._path(key)))

    def _path(self, key: str) -> str:
        return f"{self._below}/{key}" if self._below else key

    def _look_up(self, key: str) -> Located | Verdict:
        try:
            return self._find(key)
        except BadArchive as error:
            return Verdict(error.reason, f"'{excerpt(key)}': {error}")
        except (OSError, ValueError) as error:  # ValueError: a name the system cannot spell
            why = error.strerror if isinstance(error, OSError) else "no file can have this name"
            reason = Reason.IMAGE_UNREADABLE if is_denied(error) else Reason.IMAGE_MISSING
            return Verdict(reason, f"'{excerpt(key)}': {why or excerpt(str(error))}")

    def _find(self, key: str) -> Located | Verdict:
        """The file, tried from the least repair to the most."""
        if len(key) > LONG_KEY and (verdict := too_long(key)) is not None:
            return verdict
        if is_inside(key):
            folder, name = split_path(self._path(key))
            reached = self._reach(folder)
            if (
                isinstance(reached, _Reached)
                and name in reached.folder.listing.files
                and reached.repair in EXACT
            ):
                path = self._path(key)
                return self._take(key, _Candidate(reached.folder, name, reached.repair, path))
        texts = decoded(key)
        found = self._decoded(key, texts)
        if found:
            return self._one_of(key, found)
        below = (plain_path(text).removeprefix("/") for text in (key, *texts)
                 if plain_path(text).startswith(self._starts))  # fmt: skip
        is_below = any(map(is_inside, below))
        verdict = next((v for text in (key, *texts) if (v := unusable(text)) is not None), None)
        if verdict is not None and not is_below:
            return Verdict(verdict.reason, verdict.detail + self._elsewhere(key))
        if is_below or {"percent", "backslash"} & set(texts.values()):
            return self._missing(key, "")  # an encoded name must exist exactly
        return self._spelt_otherwise(key)

    def _take(self, key: str, found: _Candidate) -> Located | Verdict:
        """A candidate's place; a repair is noted."""
        repair = found.repair or found.folder.repair_of(found.name)
        place = found.folder.locate(found.name, repair)
        if repair and isinstance(place, Located):
            self._repaired[key] = Repair(found.path, folded(tidy_path(found.means)), repair)
        return place

    def _one_of(self, key: str, found: list[_Candidate]) -> Located | Verdict:
        """The candidate that is the only one, or a verdict that names two."""
        first = found[0]
        other = next((c.path for c in found if c.path != first.path), None)
        if other is None:
            return self._take(key, first)
        return _ambiguous(key, first.path, other)

    def _decoded(self, key: str, texts: dict[str, str]) -> list[_Candidate]:
        """The files that a key names exactly when it is decoded, to one of `texts`."""
        found: list[_Candidate] = []
        for text, kind in ({key: "absolute"} | texts).items():
            plain = plain_path(text)
            start = next((s for s in self._starts if plain.startswith(s)), None)
            if start is not None:
                found += self._exactly(plain.removeprefix(start), kind)
            elif text != key:
                found += self._exactly(self._path(text), kind)
        for text in (key, *texts):
            for path in code_pages(self._path(text)):
                found += self._exactly(path, "code_page")
        return found

    def _exactly(self, path: str, kind: str) -> list[_Candidate]:
        """The file at a path from the start, in its own or another normal form."""
        if not is_inside(path):
            return []
        folder, name = split_path(path)
        reached = self._reach(folder)
        if not isinstance(reached, _Reached) or reached.repair not in EXACT:
            return []
        listing = reached.folder.listing
        names = [name] if name in listing.files else listing.same_files(name)
        names = [other for other in names if composed(other) == composed(name)]
        return [_Candidate(reached.folder, n, kind, path) for n in names]

    def _spelt_otherwise(self, key: str) -> Located | Verdict:
        """The one file whose name `key` is another spelling of."""
        path = tidy_path(self._path(key))
        means = "/".join(self.aliases.get(part, part) for part in path.split("/"))
        folder, _, name = means.rpartition("/")
        reached = self._reach(folder)
        if isinstance(reached, Verdict) and reached.reason == Reason.AMBIGUOUS_IMAGE:
            return Verdict(reached.reason, f"'{excerpt(key)}': {reached.detail}")
        found: list[_Candidate] = []
        if isinstance(reached, _Reached):
            alias = "alias" if means != path else ""
            found = [
                _Candidate(
                    reached.folder, n, worse(worse(kind_of(name, n), reached.repair), alias), means
                )
                for n in _same_names(reached.folder, name)
            ]
        found += self._beside(key)
        if found:
            return self._one_of(key, found)
        if isinstance(reached, Verdict):
            self.lost[reached.detail] += 1
            return Verdict(reached.reason, reached.detail + self._elsewhere(key))
        return self._missing(key, _near(reached.folder, name))

    def _beside(self, key: str) -> list[_Candidate]:
        """The file that a key names exactly in the folder of the annotation file."""
        if self.beside is None or self.beside == self._below:
            return []
        path = f"{self.beside}/{key}" if self.beside else key
        return self._from_root._exactly(path, "annotation_folder")

    @cached_property
    def _from_root(self) -> Mount:
        """The root itself, where the images lie elsewhere."""
        return Mount(root=self.root, extra_roots=self.extra_roots) if self._is_elsewhere else self

    def _missing(self, key: str, near: str) -> Verdict:
        detail = f"no file '{excerpt(key)}' below '{self._shown_prefix}'"
        return Verdict(Reason.IMAGE_MISSING, f"{detail}{near}{self._elsewhere(key)}")

    def _elsewhere(self, key: str) -> str:
        """Where a file of a missing key's name lies, with what to set; "" if it is not found."""
        if self._below and self._exactly(key, "root"):
            return "; there is one below the root: set `images: .`"
        text = key.replace("\\", "/")
        for cut in [at for at, letter in enumerate(text) if letter == "/"][:MOST_DROPPED]:
            tail = text[cut + 1 :]
            if tail.strip("/") and self._exactly(self._path(tail), "tail"):
                there, prefix = excerpt(tail), excerpt(key[: cut + 1])
                return f"; '{there}' is there: set `path_prefix: '{prefix}'`"
        return ""

    def _reach(self, path: str) -> _Reached | Verdict:
        """The folder at a path from the start, each found once."""
        if not path:
            return self._start
        if path not in self._folders:
            above, _, name = path.rpartition("/")
            reached = self._reach(above)
            if isinstance(reached, _Reached):
                found = self._step(reached, name) or self._stand_in(reached, path)
            else:
                found = self._stand_in(None, path)
                # The folder above is what is missing, unless this one has an archive to get.
                is_told = reached.reason != Reason.IMAGE_MISSING or self._published(path) is None
                if isinstance(found, Verdict) and is_told:
                    found = reached
            self._folders[path] = found
        return self._folders[path]

    def _step(self, above: _Reached, name: str) -> _Reached | Verdict | None:
        """One part of a path further: a folder, an archive, or a folder spelt otherwise."""
        listing = above.folder.listing
        if name in listing.folders or (name in listing.files and name.endswith(ARCHIVES)):
            return _Reached(above.folder.child(name), above.repair)
        names = _preferred(name, listing.same_folders(name))
        if len(names) > 1:
            return _ambiguous(name, *names[:2])
        if not names:
            return None
        repair = worse(kind_of(name, names[0]), above.repair)
        return _Reached(above.folder.child(names[0]), repair)

    def _stand_in(self, above: _Reached | None, path: str) -> _Reached | Verdict:
        """The archive of a folder that is not there: beside it, or in the root."""
        archive = self._published(path)
        name = path.rpartition("/")[2]
        names = [archive.name] if archive is not None else []
        names += [f"{name}.zip", f"{name}.tar"]
        if above is not None and (found := self._packed_here(above, path, names)) is not None:
            return found
        root = self._start.folder
        for candidate in names:
            if "/" not in path or candidate not in root.listing.files:
                continue
            found = root.child(candidate)
            own = self._own(found, path)
            # In the root `images.zip` may be anybody's: three data sets call theirs so.
            is_published = archive is not None and candidate == archive.name
            if own is None and is_published and not candidate.startswith("images."):
                own = found.folder_called(name)
            if own is not None:
                return _Reached(own, "archive")
        hint = ""
        if archive is not None:
            size = f" ({archive.gigabytes:g} GB)" if archive.gigabytes else ""
            command = archive.command(self._shown(path))
            hint = f", nor its archive {archive.name}{size}; get it: {command}"
        return Verdict(Reason.IMAGE_MISSING, f"no folder '{excerpt(path)}'{hint}")

    def _packed_here(self, above: _Reached, path: str, names: list[str]) -> _Reached | None:
        """The archive beside a folder that is not there: the published one, or one of its name."""
        name, archive = path.rpartition("/")[2], self._published(path)
        candidate = next((one for one in names if one in above.folder.listing.files), None)
        if candidate is None:
            return None
        found = above.folder.child(candidate)
        if archive is not None and candidate == archive.name:
            return _Reached(found.folder_called(name), above.repair)
        # Packed with the folder, or with the folders above it too, or without it.
        own = found.folder_at(name) or self._own(found, path) or found
        return _Reached(own, worse("archive", above.repair))

    def _own(self, archive: Folder, path: str) -> Folder | None:
        """The folder of an archive that has a key's own path."""
        return archive.folder_at(path) or archive.folder_at(path.removeprefix(f"{self._below}/"))

    def _published(self, path: str) -> PublishedArchive | None:
        """The archive of a folder, by its published name where aliases have another."""
        names = {disk: name for name, disk in self.aliases.items()}
        original = "/".join(names.get(part, part) for part in path.split("/"))
        found = published(path if "/" in path else f"{self._name}/{path}")
        return found or (published(original) if original != path else None)

    def _shown(self, path: str) -> str:
        """The folder above `path`, as a command may name it."""
        return f"{self._shown_root}/{path.rpartition('/')[0]}".rstrip("/")


def _resolved(prefix: str) -> str:
    return prefix if is_remote(prefix) else str(Path(prefix).resolve())


def _same_names(folder: Folder, name: str) -> list[str]:
    """The files of a folder that a name may mean: it as it is, in another normal form, or else."""
    listing = folder.listing
    if name in listing.files:
        return [name]
    if not name or name in listing.folders:
        return []
    return _preferred(name, listing.same_files(name))


def _preferred(name: str, names: list[str]) -> list[str]:
    """Of other spellings those in another normal form, which are the same text; else all."""
    return [other for other in names if composed(other) == composed(name)] or names


def _ambiguous(key: str, one: str, other: str) -> Verdict:
    return Verdict(
        Reason.AMBIGUOUS_IMAGE,
        f"'{excerpt(key)}' may be '{excerpt(one)}' or '{excerpt(other)}'; use its exact name",
    )


def _near(folder: Folder, name: str) -> str:
    """That a file only looks like the one asked for; "" if none does."""
    others = folder.listing.near(name) if name else []
    if not others:
        return ""
    return (
        f"; '{excerpt(others[0])}' is near, but has other characters ({others[0]!a}, not {name!a})"
    )
