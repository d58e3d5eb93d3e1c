"""What an image key is that names no file below the folder of the images. Pure."""

from __future__ import annotations

import re

from lapilli.data.record import Reason, Verdict, excerpt

__all__ = ["is_inside", "plain_path", "unusable"]

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/?/?")
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
SHOWN = 60  # characters of a data: URL


def is_inside(key: str) -> bool:
    """Whether a key is a path that cannot lead out of the folder it starts at."""
    if "\0" in key or key.startswith("/"):
        return False
    return ".." not in key or ".." not in key.split("/")


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
    if key.startswith("data:"):
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
