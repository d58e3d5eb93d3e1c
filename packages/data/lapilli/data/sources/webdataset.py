"""WebDataset tars: the members of one stem are a sample, images with a `json` or a `txt`.

Members are grouped as the webdataset library groups them. Image bytes are not read here: an image
is the key `SHARD.tar/MEMBER`, read later at the member's place in the tar. A `json` is a
conversation (LLaVA's or role and content) or has a `caption`; a `txt` is a caption, which answers
one of the recipe's `prompts`.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from lapilli.data.access import is_denied
from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.mounts import EXTENSIONS
from lapilli.data.record import Reason, Turn, Verdict, excerpt
from lapilli.data.sources import rows
from lapilli.data.sources.captions import caption_turns, draw_prompt
from lapilli.data.sources.files import annotation_files, file_error, what_it_is_instead
from lapilli.data.sources.turns import Turns

__all__ = ["normalise", "read"]

LONGEST = 1 << 28  # bytes of one text member
ENDINGS = tuple(EXTENSIONS)
META = re.compile(r"__[^/]*__($|/)")  # members that describe the tar, as webdataset skips them


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """An element a sample: `{id, shard, images, prompt, json?, txt?}`.

    Raises:
        DataError: A tar is missing, damaged, outside the folder of `images`, or holds a name twice.
    """
    for path in annotation_files(config, root):
        folder = root / config.images
        if not path.is_relative_to(folder):
            raise DataError(
                f"annotations: {path} lies outside the folder {folder}; a WebDataset source's "
                "images are in its tars: set `images` to a folder above them"
            )
        shard = path.relative_to(folder).as_posix()
        for sample in _samples(path):
            yield _element(sample, shard, config)


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar: by suffix the bytes of a text, the name of an image."""
    from webdataset.tariterators import group_by_keys  # imports torch

    instead = what_it_is_instead(path)
    count = 0
    try:
        with tarfile.open(path) as tar:
            for sample in group_by_keys(_members(tar, str(path))):
                yield sample
                count += 1
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if is_denied(error):
            raise file_error(path, error) from None
        raise DataError(
            f"annotations: {path} is no whole tar after {count} samples "
            f"({excerpt(str(error.args[0] if error.args else error))}); "
            + (instead or "download or write it again")
        ) from None


def _members(tar: tarfile.TarFile, url: str) -> Iterator[dict[str, Any]]:
    """The members that make samples, in webdataset's form; their headers only, but for texts."""
    while (member := tar.next()) is not None:
        name = PurePosixPath(member.name).as_posix()
        if member.isreg() and META.match(name) is None:
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in EXTENSIONS:
                yield {"fname": name, "data": name, "__url__": url}
            elif suffix in (".json", ".txt") and (file := tar.extractfile(member)) is not None:
                yield {"fname": name, "data": file.read(LONGEST), "__url__": url}
        # A tar of a million members must not be held as a list.
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]


def _element(sample: Mapping[str, Any], shard: str, config: SourceConfig) -> dict[str, Any]:
    name = str(sample["__key__"])
    images = sorted(
        ((suffix, member) for suffix, member in sample.items() if f".{suffix}".endswith(ENDINGS)),
        key=lambda item: _order(item[0]),
    )
    element: dict[str, Any] = {
        "id": name,
        "shard": shard,
        "images": [member for _, member in images],
        "prompt": draw_prompt(config, f"{shard}/{name}"),
    }
    if "txt" in sample:
        element["txt"] = cast("bytes", sample["txt"]).decode("utf-8", "surrogateescape").strip()
    if "json" in sample:
        element["json"] = _parsed(sample["json"])
        if isinstance(element["json"], dict):
            element["id"] = element["json"].get("id", name)
    return element


def _parsed(data: bytes) -> Any:
    """A json member's value, or its text where it is none."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _order(suffix: str) -> tuple[int, str]:
    """`jpg` before `0.jpg` before `10.jpg`."""
    number = suffix.partition(".")[0]
    return (int(number) if number.isdecimal() else -1, suffix)


def normalise(element: Any) -> Turns | Verdict:
    """One sample to its turns and image keys, or the verdict that it cannot be one."""
    sample = cast("dict[str, Any]", element)
    members: list[str] = sample["images"]
    found = sample.get("json")
    if rows.is_conversation(found):
        normalised = _conversation(cast("dict[str, Any]", found), members)
    else:
        caption = sample.get("txt")
        if caption is None and isinstance(found, dict):
            caption = cast("dict[str, Any]", found).get("caption")
        if not isinstance(caption, str) or not members:
            detail = "expected an image and a txt, or a json with a conversation or a caption"
            return Verdict(Reason.SCHEMA, detail)
        normalised = caption_turns(sample["prompt"], caption, len(members)), members
    if isinstance(normalised, Verdict):
        return normalised
    turns, chosen = normalised
    return turns, tuple(f"{sample['shard']}/{member}" for member in chosen)


def _conversation(
    fields: dict[str, Any], members: list[str]
) -> tuple[tuple[Turn, ...], list[str]] | Verdict:
    """A conversation, with the sample's own images in the place of the names it has for them.

    A name that is a member's is that image; otherwise the images stand in their order.
    """
    normalised = rows.normalise(fields)
    if isinstance(normalised, Verdict):
        return normalised
    turns, named = normalised
    return turns, list(named) if named and set(named) <= set(members) else members
