"""Decide whether a file name is another spelling of a key's name. Pure.

Two names are the same if their stems have the same letters and the same numbers, in order, after
NFC and Unicode case folding. Separators may differ, except that a separator between two numbers
stays one: `2024-1-11` is never `2024-11-1`. Letters and digits of every script count, and so do
combining marks and symbols such as emoji. Only a known image extension may differ.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from urllib.parse import unquote

from lapilli.data.mounts.places import EXTENSIONS

__all__ = ["code_pages", "composed", "decoded", "loose_form", "name_form", "split_name"]

GAP = "\0"  # a separator between two numbers, in a form; no file name holds it
ASCII_GAP = re.compile(r"(?<=[0-9])[^0-9a-z]+(?=[0-9])")
ASCII_SEPARATOR = re.compile(r"[^0-9a-z\0]+")
# What an archive's member names were written in, where the reader took them for cp437.
CODE_PAGES = ("utf-8", "gbk")
UNQUOTED = 3  # how often a key may have been percent-encoded


def split_name(name: str) -> tuple[str, str]:
    """Stem and extension, which is a known one of images or "": `12.5` is a stem."""
    dot = name.rfind(".")
    if dot > 0 and name[dot:].lower() in EXTENSIONS:
        return name[:dot], name[dot:]
    return name, ""


def composed(name: str) -> str:
    """The name in NFC: equal results read as the same text."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def name_form(stem: str) -> str:
    """Letters and numbers of a stem, case folded; equal for two spellings of one name.

    A stem of separators alone is equal to itself only.
    """
    if stem.isascii():
        folded = stem.lower()
        form = ASCII_SEPARATOR.sub("", ASCII_GAP.sub(GAP, folded))
    else:
        folded = composed(composed(stem).casefold())
        form = _form(folded)
    return form or f"{GAP}{folded}"


def _form(folded: str) -> str:
    kept: list[str] = []
    gap = False
    for character in folded:
        if _is_separator(character):
            gap = True
            continue
        # `isnumeric` knows the numerals of every script, those of Chinese too.
        if gap and kept and character.isnumeric() and kept[-1].isnumeric():
            kept.append(GAP)
        kept.append(character)
        gap = False
    return "".join(kept)


@lru_cache(maxsize=4096)
def _is_separator(character: str) -> bool:
    """Punctuation and spaces of every script, and ASCII's symbols: `+`, `=`, `~` and the like."""
    if character.isascii():
        return not character.isalnum()
    return unicodedata.category(character)[0] in "PZ"


def loose_form(form: str) -> str:
    """A coarser key that equal forms share, and names that only look alike share too."""
    loose = form.replace(GAP, "")
    if loose.isascii():
        return loose
    visible = (c for c in loose if unicodedata.category(c) not in ("Cf", "Mn"))
    return unicodedata.normalize("NFKC", "".join(visible)).casefold()


def decoded(key: str) -> dict[str, str]:
    r"""What an encoded key may stand for, by text, with the kind of encoding; without the key.

    `%xx` (once or more often), `\\` for `/`, white space around the key.
    """
    found: dict[str, str] = {}
    text = key
    for _ in range(UNQUOTED):
        text = _unquoted(text)
        found.setdefault(text, "percent")
    for candidate in (key, *found):
        found.setdefault(candidate.replace("\\", "/"), "backslash")
    for candidate in (key, *found):
        found.setdefault(candidate.strip(), "white_space")
    found.pop(key, None)
    return found


def _unquoted(text: str) -> str:
    try:
        return unquote(text, errors="strict") if "%" in text else text
    except UnicodeDecodeError:
        return text


def code_pages(path: str) -> Iterator[str]:
    """Other readings of a path where one side took a code page for another; none in ASCII."""
    if path.isascii():
        return
    for page in CODE_PAGES:
        with suppress(UnicodeError):
            yield path.encode("cp437").decode(page)
        for form in ("NFC", "NFD"):
            with suppress(UnicodeError):
                mistaken = unicodedata.normalize(form, path).encode(page).decode("cp437")
                if not mistaken.isascii():
                    yield mistaken
