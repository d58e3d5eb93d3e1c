"""Count a WebDataset tar's members, then group them into samples.

A sample's key is its members' name up to the first dot, as the webdataset library has it, unless
that makes one sample of many: of `img.host_0.png`, `img.host_0.txt`, `img.host_1.png`, ... each
stem with a text and an image is a sample. Members of a sample need not be adjacent.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from lapilli.data.mounts.tar_headers import followed, headers, link_target

__all__ = ["TEXTS", "TarMember", "TarSample", "group", "key_and_suffix", "read_members"]

TEXTS = ("json", "txt")
META = re.compile(r"__[^/]*__($|/)")  # members that describe the tar, as webdataset skips them
LONGEST_NAME = 4096  # characters; no file system takes more


class TarMember(NamedTuple):
    """A member of a tar.

    Attributes:
        name: Its name, without `./`.
        kind: `file`, `folder` or `other` (a device, a pipe); links are what they lead to.
        offset: Where the bytes begin in the tar.
        size: How many there are.
        target: Name of the member that has the bytes, its own but for a link; "" for a link that
            leads nowhere.
    """

    name: str
    kind: str
    offset: int
    size: int
    target: str


@dataclass
class TarSample:
    """The members of one key by suffix, in lower case.

    Attributes:
        key: What the members' names begin with.
        members: By suffix; of a suffix met twice the first.
        repeated: Names of members whose suffix the sample has already.
    """

    key: str
    members: dict[str, TarMember] = field(default_factory=dict[str, TarMember])
    repeated: list[TarMember] = field(default_factory=list[TarMember])

    def add(self, suffix: str, member: TarMember) -> None:
        """Add a member."""
        if suffix in self.members:
            self.repeated.append(member)
        else:
            self.members[suffix] = member


def read_members(tar: tarfile.TarFile, found: list[TarMember]) -> None:
    """Add all members in their order to `found`, links followed at the end.

    Raises:
        tarfile.TarError: The tar is damaged; `found` has the members before that.
    """
    links: dict[str, str] = {}
    for info in headers(tar):
        name = PurePosixPath(info.name).as_posix()
        if info.islnk() or info.issym():
            links[name] = link_target(info)
            found.append(TarMember(name=name, kind="link", offset=0, size=0, target=""))
        else:
            kind = "file" if info.isreg() else "folder" if info.isdir() else "other"
            # A sparse file's bytes do not lie in one stretch: as a link that leads nowhere.
            target = "" if info.issparse() or info.size < 0 else name
            found.append(
                TarMember(
                    name=name,
                    kind=kind,
                    offset=info.offset_data,
                    size=max(0, info.size),
                    target=target,
                )
            )
    if links:
        files = {member.name: member for member in found if member.kind == "file"}
        links = {name: target for name, target in links.items() if name not in files}
        times = Counter(member.name for member in found if member.kind == "file")
        for place, member in enumerate(found):
            if member.kind == "link":
                found[place] = _followed(member, links, files, times)


def _followed(
    member: TarMember, links: dict[str, str], files: dict[str, TarMember], times: Counter[str]
) -> TarMember:
    """A link as the file it leads to; one that leads nowhere, or to one of two, has no target."""
    name = followed(member.name, links) or ""
    target = files.get(name)
    if target is None or times[name] > 1:
        return member._replace(kind="file")
    return target._replace(name=member.name)


def group(
    members: Iterable[TarMember], images: Collection[str]
) -> tuple[list[TarSample], list[tuple[str, TarMember]]]:
    """The samples in the order of their first members, and the members that are in none.

    Args:
        members: All members of a tar.
        images: Endings of images, without a dot.

    Returns:
        Samples; and of each other member why it is in none, for a count: `(folder)`, ...
    """
    loose: list[tuple[str, TarMember]] = []
    bases: dict[str, list[tuple[int, str, TarMember]]] = {}
    for place, member in enumerate(members):
        parted = key_and_suffix(member.name) if len(member.name) <= LONGEST_NAME else None
        if member.kind != "file":
            loose.append((f"({member.kind})", member))
        elif META.match(member.name):
            loose.append(("(meta)", member))
        elif parted is None:
            loose.append(("(no suffix)", member))
        else:
            bases.setdefault(parted[0], []).append((place, parted[1], member))
    samples: dict[str, tuple[int, TarSample]] = {}
    for base, found in bases.items():
        own = _own_keys([suffix for _, suffix, _ in found], images)
        for place, suffix, member in found:
            inner, rest = _parted(suffix, own)
            key = f"{base}.{inner}" if inner else base
            _, sample = samples.setdefault(key, (place, TarSample(key)))
            sample.add(rest.lower(), member)
    return [sample for _, sample in sorted(samples.values(), key=lambda item: item[0])], loose


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """A member's name parted at the first dot of its last part, as webdataset's `base_plus_ext`.

    Of a last part that begins with a dot the key is the folder, unless that has a dot itself.
    """
    slash = name.rfind("/")
    dot = name.find(".", slash + 1)
    if dot < 0 or (dot == slash + 1 and not _is_plain_folder(name[: max(0, slash + 1)])):
        return None
    return name[:dot], name[dot + 1 :]


def _is_plain_folder(path: str) -> bool:
    return bool(path) and "." not in path[path.rfind("/", 0, len(path) - 1) + 1 :]


def _own_keys(suffixes: Sequence[str], images: Collection[str]) -> set[str]:
    """Of the suffixes of one base, those beginnings that are keys of samples of their own."""
    if all("." not in suffix for suffix in suffixes):
        return set()
    stems: dict[str, set[str]] = {}
    exact: set[str] = set()
    pictured: set[str] = set()
    for suffix in suffixes:
        stem, _, end = suffix.rpartition(".")
        end = end.lower()
        if not stem:
            exact.add(end)
            continue
        stems.setdefault(stem, set()).add(end)
        if end in images:
            pictured.add(stem)
            above, _, number = stem.rpartition(".")
            if above and number.isdecimal():
                pictured.add(above)
    has_text = not exact.isdisjoint(TEXTS)
    own = {
        stem
        for stem, ends in stems.items()
        if stem in pictured
        and not ends.isdisjoint(TEXTS)
        and not (has_text and stem.rpartition(".")[2].isdecimal())
    }
    others = any(
        suffix.rpartition(".")[2].lower() in images and not _parted(suffix, own)[0]
        for suffix in suffixes
    )
    if not exact and not others:
        own |= {stem for stem, ends in stems.items() if "json" in ends}
    return own


def _parted(suffix: str, own: set[str]) -> tuple[str, str]:
    """A suffix as the longest beginning that is a key of its own, or "", and what is left."""
    inner = suffix.rpartition(".")[0] if own else ""
    while inner and inner not in own:
        inner = inner.rpartition(".")[0]
    return inner, suffix[len(inner) + 1 :] if inner else suffix
