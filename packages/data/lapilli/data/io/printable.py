"""Text for people: sizes in bytes, no terminal control characters, no absolute paths."""

from __future__ import annotations

import re

__all__ = ["bytes_text", "one_line", "relative_names", "spell_out"]

# C0 and C1 but for tab and newline; marks, overrides and isolates of writing direction; the
# separators that some terminals break a line at; halves of surrogate pairs, which no encoding has.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

# An absolute path of two names or more inside a text; not a part of an address or a relative path.
_ABSOLUTE = re.compile(
    r"""(?<![\w.:/~*-])/(?:[^\s/'"`<>|,;()\[\]{}]+/)+([^\s/'"`<>|,;()\[\]{}]*)"""
)


def relative_names(text: str) -> str:
    """Shorten each absolute path to its last name, so that reports do not reveal folders."""
    if text.startswith("/") and "\n" not in text and ": " not in text:  # a path as a whole
        return text.rstrip("/").rpartition("/")[2] or text
    return _ABSOLUTE.sub(lambda found: found[1] or found[0].rstrip("/").rpartition("/")[2], text)


def spell_out(text: str) -> str:
    r"""Spell each character that could steer a terminal as Python does: `\x1b`, `\r`, `\u202e`.

    Texts come from strangers; an escape sequence in one could hide or forge output.
    Newlines and tabs stay.
    """
    return _STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    r"""`spell_out` for what must stay one line: a newline is spelt `\n`, a tab `\t`."""
    return spell_out(text).replace("\n", "\\n").replace("\t", "\\t")


def bytes_text(size: float) -> str:
    """`17.2 kB`, `189.3 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
