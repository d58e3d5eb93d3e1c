"""WebDataset tars: members with one key form a sample of images and a `json` or `txt`.

Members are counted first and then grouped, so that each is used or named as not used. Image bytes
are not read here: an image is the key `SHARD.tar/MEMBER`, read later at the member's place in the
tar. A `json` is a conversation (LLaVA's, role and content, or pairs) or has a `caption`; a `txt` is
a caption, which answers one of the recipe's `prompts`.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.access import is_denied
from lapilli.data.io.file_kinds import file_kind
from lapilli.data.mounts import EXTENSIONS
from lapilli.data.mounts.tar_headers import bounded
from lapilli.data.record import Reason, Verdict, excerpt
from lapilli.data.sources import rows
from lapilli.data.sources.captions import caption_turns, draw_prompt
from lapilli.data.sources.fields import NOTHING, Inspection, inspect_fields
from lapilli.data.sources.reading.bounds import TOO_MANY, holds_too_much, too_large
from lapilli.data.sources.reading.files import (
    annotation_files,
    file_error,
    is_compressed,
    what_it_is_instead,
)
from lapilli.data.sources.reading.tar_members import (
    TEXTS,
    TarMember,
    TarSample,
    group,
    read_members,
)
from lapilli.data.sources.tally import Members
from lapilli.data.sources.turns import Turns

__all__ = ["inspect", "normalise", "read"]

IMAGES = frozenset(extension.removeprefix(".") for extension in EXTENSIONS)
NUMBERED = re.compile(r"([0-9]+)\.([^.]+)")
NAMED = 8  # suffixes named in a verdict


def read(config: SourceConfig, root: Path) -> Generator[Any, None, Members]:
    """An element a sample: `{id, shard, images, prompt, json?, txt?, unused?, defect?}`.

    Returns:
        The members of all tars, used and not.

    Raises:
        DataError: A tar is missing, damaged, or outside the folder of `images`.
    """
    counted = Members()
    chosen = [suffix.lower().lstrip(".") for suffix in config.image_suffixes]
    endings = IMAGES | {suffix.rpartition(".")[2] for suffix in chosen}
    for path in annotation_files(config, root):
        folder = root / config.images
        if not path.is_relative_to(folder):
            raise DataError(
                f"annotations: {path} lies outside the folder {folder}; a WebDataset source's "
                "images are in its tars: set `images` to a folder above them"
            )
        shard = path.relative_to(folder).as_posix()
        found: list[TarMember] = []
        instead = what_it_is_instead(path, "archive")
        try:
            with path.open("rb") as file, tarfile.open(fileobj=bounded(file), mode="r:") as tar:
                read_members(tar, found)
                samples, loose = group(found, endings)
                for label, _ in loose:
                    counted.unused[label] += 1
                for sample in samples:
                    yield _Reading(file, sample, config, chosen, counted).element(shard)
        except (
            tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError
        ) as error:  # fmt: skip
            if is_denied(error):
                raise file_error(path, error) from None
            if is_compressed(path):
                instead = "it is compressed, so that no member has a place: unpack it"
            raise DataError(
                f"annotations: {path} is no whole tar after {len(found)} members "
                f"({excerpt(str(error.args[0] if error.args else error))}); "
                + (instead or "download or write it again")
            ) from None
    return counted


class _Reading:
    """One sample on its way to an element: which of its members are read, and its errors."""

    def __init__(
        self,
        file: BinaryIO,
        sample: TarSample,
        config: SourceConfig,
        chosen: Sequence[str],
        counted: Members,
    ) -> None:
        self._file, self._sample, self._config, self._chosen = file, sample, config, chosen
        self._counted = counted
        self._used: set[str] = set()
        self._defects: list[str] = []

    def element(self, shard: str) -> dict[str, Any]:
        """The element; its members are counted."""
        sample, key = self._sample, self._sample.key
        element: dict[str, Any] = {
            "id": key,
            "shard": shard,
            "images": [],
            "prompt": draw_prompt(self._config, f"{shard}/{key}"),
        }
        found = self._text("json")
        if found is not None:
            element["json"] = value = self._parsed(found)
            if isinstance(value, dict):
                element["id"] = cast("dict[str, Any]", value).get("id", key)
        conversation = element["json"] if rows.is_conversation(element.get("json")) else None
        if conversation is None and (found := self._text("txt")) is not None:
            element["txt"] = found.strip()
        element["images"] = self._images(conversation)
        if sample.repeated:
            names = ", ".join(f"'{excerpt(member.name)}'" for member in sample.repeated[:NAMED])
            self._defects.append(f"the sample has {names} twice, in one letter case or another")
        if unused := [suffix for suffix in sample.members if suffix not in self._used]:
            element["unused"] = unused
        if self._defects:
            element["defect"] = "; ".join(self._defects)
        self._count()
        return element

    def _text(self, suffix: str) -> str | None:
        """A member's text, or None without the member."""
        member = self._sample.members.get(suffix)
        if member is None:
            return None
        self._used.add(suffix)
        if not member.target:
            self._defects.append(_leads_nowhere(member))
            return ""
        most = self._config.max_record_bytes
        if member.size > most:
            size = f"{member.size} bytes in '{excerpt(member.name)}'"
            self._defects.append(too_large(size, most))
            return ""
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            kind = file_kind(data) or "this is no UTF-8 text: write it as UTF-8"
            self._defects.append(f"'{excerpt(member.name)}': {kind}")
            return ""

    def _parsed(self, text: str) -> Any:
        """The value of the json member, or its text if it is not JSON."""
        name = excerpt(self._sample.members["json"].name)
        if holds_too_much(text):
            self._defects.append(f"'{name}': {TOO_MANY}")
        elif not self._defects:
            try:
                return json.loads(text)
            except (ValueError, RecursionError) as error:
                self._defects.append(f"'{name}' is no valid JSON ({excerpt(str(error))})")
        return text

    def _images(self, conversation: Any) -> list[str]:
        """The names of the members that are the sample's images."""
        members = self._sample.members
        suffixes = self._named(conversation)
        if suffixes is None:
            chosen = _listed(members, self._chosen) if self._chosen else _usual(members)
            suffixes = [] if isinstance(chosen, str) else chosen
            if isinstance(chosen, str):
                self._defects.append(chosen)
        self._used.update(suffixes)
        self._defects += [_leads_nowhere(members[s]) for s in suffixes if not members[s].target]
        return [members[suffix].target for suffix in suffixes]

    def _named(self, conversation: Any) -> list[str] | None:
        """The suffixes of the members that a conversation names, if all it names are members."""
        if conversation is None:
            return None
        found = rows.normalise(rows.with_roles(conversation, self._config.roles))
        if isinstance(found, Verdict) or not found[1]:
            return None
        own = {member.name: suffix for suffix, member in self._sample.members.items()}
        suffixes = [own.get(name) for name in found[1]]
        return None if None in suffixes else cast("list[str]", suffixes)

    def _count(self) -> None:
        sample, counted = self._sample, self._counted
        for suffix in sample.members:
            counted.count(_label(suffix), suffix in self._used, not _is_known(suffix))
        for _ in sample.repeated:
            counted.count("(repeated)", used=False, unknown=False)


def _leads_nowhere(member: TarMember) -> str:
    return f"'{excerpt(member.name)}' is a link to no one file of the tar, or sparse; pack it again"


def _usual(members: Mapping[str, TarMember]) -> list[str] | str:
    """Without a setting the one image, or the numbered ones; or why that is not clear."""
    images = [suffix for suffix in members if _end(suffix) in IMAGES]
    plain = [suffix for suffix in images if "." not in suffix]
    numbered = sorted(
        (int(match[1]), suffix) for suffix in images if (match := NUMBERED.fullmatch(suffix))
    )
    numbers = {number for number, _ in numbered}
    if len(plain) > 1 or (plain and numbered) or len(numbers) < len(numbered):
        shown = ", ".join(sorted([*plain, *(suffix for _, suffix in numbered)])[:NAMED])
        return f"each of {shown} may be the image; say which in the source's `image_suffixes`"
    return plain or [suffix for _, suffix in numbered]


def _listed(members: Mapping[str, TarMember], chosen: Sequence[str]) -> list[str]:
    """The images of a setting in its order; a suffix includes its numbered ones too."""
    found: dict[str, None] = {}
    for wanted in chosen:
        ours = [(-1, wanted)] if wanted in members else []
        for suffix in members:
            number, _, rest = suffix.partition(".")
            if rest == wanted and number.isdecimal():
                ours.append((int(number), suffix))
        found |= dict.fromkeys(suffix for _, suffix in sorted(ours))
    return [*found]


def _end(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _is_known(suffix: str) -> bool:
    return suffix in TEXTS or _end(suffix) in IMAGES


def _label(suffix: str) -> str:
    """What a suffix is counted as: numbered images as one."""
    match = NUMBERED.fullmatch(suffix)
    return f"N.{match[2]}" if match else excerpt(suffix, 60) or "(no suffix)"


def inspect(element: Any) -> Inspection:
    """What the fields of the json come to that `normalise` does not read."""
    sample = cast("dict[str, Any]", element)
    found = sample.get("json")
    if rows.is_conversation(found):
        return rows.inspect({**found, "images": sample["images"]})
    if not isinstance(found, dict):
        return NOTHING
    understood = {"id"} if "txt" in sample else {"id", "caption"}
    return inspect_fields(cast("dict[str, Any]", found), frozenset(understood), lambda: True)


def normalise(element: Any) -> Turns | Verdict:
    """One sample to its turns and image keys, or the verdict that it cannot be one."""
    sample = cast("dict[str, Any]", element)
    if isinstance(defect := sample.get("defect"), str):
        return Verdict(Reason.SCHEMA, excerpt(defect, 400))
    images: list[str] = sample["images"]
    found = sample.get("json")
    keys = tuple(f"{sample['shard']}/{member}" for member in images)
    if rows.is_conversation(found):
        normalised = rows.normalise(found)
        if not isinstance(normalised, Verdict) and not normalised[1]:
            normalised = rows.normalise({**found, "images": list(keys)})  # as in a table
        return normalised if isinstance(normalised, Verdict) else (normalised[0], keys)
    caption = sample.get("txt")
    if caption is None and isinstance(found, dict):
        caption = cast("dict[str, Any]", found).get("caption")
    if not isinstance(caption, str) or not images:
        detail = "expected an image and a txt, or a json with a conversation or a caption"
        if unused := cast("list[str]", sample.get("unused", [])):
            detail += f"; not read: {', '.join(unused[:NAMED])} (`image_suffixes` says which are)"
        return Verdict(Reason.SCHEMA, excerpt(detail, 400))
    return caption_turns(sample["prompt"], caption, len(images)), keys
