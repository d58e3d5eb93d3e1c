"""Take image keys apart as paths, and explain why one cannot name a file below the root. Pure."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from lapilli.data.record import Reason, Verdict, excerpt

__all__ = [
    "is_base64",
    "is_inside",
    "plain_path",
    "split_path",
    "tidy_path",
    "too_long",
    "unusable",
]

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/?/?")
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
SHOWN = 60  # characters of an image that is written into the key
# What a JPEG, PNG, GIF and WebP begin with in base64; `/9j/4` may be a path too.
BASE64 = re.compile(r"(?:/9j/[4527]|iVBORw0KGgo|R0lGODlh|R0lGODdh|UklGR)[A-Za-z0-9+/\s]*={0,2}\s*")
LONGEST_KEY, DEEPEST_KEY = 4096, 100  # characters, and folders of a long key
SHORTEST = 24  # characters of an image in base64


def is_inside(key: str) -> bool:
    """Whether a key is a path that cannot lead out of the folder it starts at."""
    if "\0" in key or key.startswith("/"):
        return False
    return ".." not in key or ".." not in key.split("/")


def is_base64(text: str) -> bool:
    """Whether a text is the beginning of an image, or all of it, in base64."""
    return len(text) >= SHORTEST and BASE64.fullmatch(text[:4096]) is not None


def plain_path(key: str) -> str:
    """The key without `file://`."""
    return key.removeprefix("file://")


def unusable(key: str) -> Verdict | None:
    """The verdict on a key that is empty, on the web, inside the record or on another machine."""
    if not key.strip():
        return Verdict(
            Reason.IMAGE_MISSING,
            "the image key is empty, which means no image; name the file, or take the image's "
            "marker out of the text",
        )
    shown = excerpt(key)
    if is_base64(key):
        detail = f"'{excerpt(key, SHOWN)}' is the image itself (base64); write it to a file and "
        return Verdict(Reason.SCHEMA, f"{detail}name that")
    if key[:5].lower() == "data:":
        detail = f"'{excerpt(key, SHOWN)}' is the image itself (data: URL); write it to a file and "
        return Verdict(Reason.SCHEMA, f"{detail}name that")
    if WINDOWS.match(key):
        return Verdict(
            Reason.IMAGE_OUTSIDE_ROOT,
            f"'{shown}' is an absolute path of Windows; expected a path below the root: set "
            "`path_prefix` to the folder that it begins with",
        )
    if key.lower().startswith(("http://", "https://", "ftp://")):
        return Verdict(
            Reason.IMAGE_MISSING, f"'{shown}' is on the web; download it and name the file"
        )
    if "://" in key and SCHEME.match(key) and not key.lower().startswith("file:"):
        return Verdict(
            Reason.IMAGE_MISSING,
            f"'{shown}' is an address; expected a path below `images`: set `images` to the folder "
            "at that address, or copy the file and name it",
        )
    if "\0" in key or ".." in re.split(r"[/\\]", key):
        return Verdict(Reason.IMAGE_OUTSIDE_ROOT, f"'{shown}' leads outside the root")
    if plain_path(key).startswith("/"):
        return Verdict(
            Reason.IMAGE_OUTSIDE_ROOT,
            f"'{shown}' is an absolute path outside the root; expected one below it: set "
            "`path_prefix` to the folder that it begins with",
        )
    return None


def split_path(path: str) -> tuple[str, str]:
    """A path's folder and name, without empty parts and dots."""
    if "//" in path or "./" in path or path.endswith(("/", "/.")) or path == ".":
        path = PurePosixPath(path).as_posix()
    folder, _, name = path.rpartition("/")
    return folder, name


def tidy_path(path: str) -> str:
    """A path without empty parts and dots."""
    folder, name = split_path(path)
    return f"{folder}/{name}" if folder else name


def too_long(key: str) -> Verdict | None:
    """The verdict on what cannot be a path at all, such as an image written into the key."""
    if key[:5].lower() == "data:" or is_base64(key):
        return unusable(key)
    if len(key) <= LONGEST_KEY and key.count("/") <= DEEPEST_KEY:
        return None
    detail = f"'{excerpt(key)}': a key of {len(key)} characters; expected the path of a file"
    return Verdict(Reason.IMAGE_MISSING, detail)
