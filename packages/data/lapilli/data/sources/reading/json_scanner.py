"""Scan JSON values one at a time from a file of any size."""

from __future__ import annotations

import json
import re
from typing import Any, TextIO

from lapilli.data.sources.reading.bounds import (
    TOO_MANY,
    Unreadable,
    holds_too_much,
    too_large,
    why_unreadable,
)

__all__ = ["Scanner"]

WINDOW = 1 << 20  # characters read at once
SKIPPED = 4  # times the bound, the characters of a value that is passed over
CUT = 16  # characters from the window's end at which an error may come from the cut
SHOWN = 200
SPACE = re.compile(r"[ \t\n\r]*")
MARK = re.compile(r'"|[\[{]+|[\]}]|,')
QUOTE = re.compile(r'["\\]')


class Scanner:
    """Reads JSON values from a file through a window that grows to the largest of them."""

    def __init__(self, file: TextIO, most: int) -> None:
        """For values of up to `most` bytes."""
        self._file, self._most = file, most
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def _grow(self) -> bool:
        """Drop what has been read and read on; twice as much for a value that did not fit."""
        more = self._file.read(max(WINDOW, len(self._text) - self._at))
        if not more:
            return False
        self._text = self._text[self._at :] + more
        self._at = 0
        return True

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            found = SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def expect(self, characters: str) -> str:
        """Step over the next character, which must be one of `characters`."""
        found = self.peek()
        if not found or found not in characters:
            wanted = " or ".join(characters)
            raise ValueError(f"expected {wanted}, found {found or 'the end of the file'}")
        self._at += 1
        return found

    def value(self) -> Any:
        """The next value, or `Unreadable`. One near the window's end may go on: `1` of `1e+9`.

        Raises:
            ValueError: No valid JSON, or none in UTF-8.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_over = len(self._text) - self._at > self._most
                if is_over and self._is_cut(error):
                    return self._pass_over(too_large(f"more than {self._most} bytes", self._most))
                if is_over or not self._grow():
                    raise
                if holds_too_much(self._text):
                    return self._pass_over(TOO_MANY)
                continue
            except (ValueError, RecursionError) as error:
                why = why_unreadable(error)
                if why is None:
                    raise
                return self._pass_over(why)
            if len(self._text) - end > 2 or not self._grow():
                size = end - self._at
                if size * 4 > self._most and (size := self._bytes(end)) > self._most:
                    return self._pass_over(too_large(f"{size} bytes", self._most))
                self._at = end
                return value

    def _bytes(self, end: int) -> int:
        return len(self._text[self._at : end].encode("utf-8", "surrogatepass"))

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may be whole JSON that goes on behind the window."""
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - CUT

    def _pass_over(self, why: str) -> Unreadable:
        """Step over the next value, whatever is in it, without holding it.

        Raises:
            ValueError: It does not end within `SKIPPED` times the bound, or not at all.
        """
        found = Unreadable(why, self._text[self._at : self._at + SHOWN])
        depth, is_text, passed = 0, False, 0
        while True:
            match = (QUOTE if is_text else MARK).search(self._text, self._at)
            if match is None:
                passed += len(self._text) - self._at
                self._at = len(self._text)
                if passed > SKIPPED * self._most or not self._grow():
                    raise ValueError(f"{why}, and its end is not found")
                continue
            self._at = match.end()
            mark = match[0]
            if mark == "\\":
                if self._at == len(self._text) and not self._grow():
                    raise ValueError("cut off in a text")
                self._at += 1
                continue
            if mark == '"':
                is_text = not is_text
            elif mark[0] in "[{":
                depth += len(mark)
            elif depth == 0:  # outside of the value
                self._at -= 1
                return found
            elif mark != ",":
                depth -= 1
            if depth == 0 and not is_text:
                return found
