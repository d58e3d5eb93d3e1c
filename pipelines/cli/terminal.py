"""Write to terminals, files and pipes safely.

Control characters are escaped, characters that the encoding lacks are replaced, and a closed pipe
ends the command quietly.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from lapilli.data.io.printable import spell_out

__all__ = [
    "CLOSED_PIPE",
    "SafeConsole",
    "SafeStream",
    "console",
    "flush_output",
    "print_table",
    "safe_output",
]

LEAST_TEXT = 10  # cells of a column of words
CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell reports a program that the signal ended


class SafeConsole(Console):
    """A rich console whose texts cannot steer a terminal; its own colours and cursor moves stay."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Text of a title or a cell, escaped before widths are measured."""
        return super().render_str(spell_out(text), **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments of anything that is printed."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else spell_out(text), style, control)


class SafeStream(io.TextIOWrapper):
    """Standard output or error for everything but rich, which goes past it with its own escapes.

    It also serves libraries, logging, warnings and tracebacks. A carriage return that begins a
    piece stays: progress bars of libraries go back with it.
    """

    def __init__(self, under: io.TextIOWrapper) -> None:
        super().__init__(
            under.buffer, encoding=under.encoding, errors="backslashreplace", write_through=True
        )
        self.rich_proxied_file = _Past(self)  # rich writes to a file's attribute of this name
        self._is_closed = False

    def write(self, text: str, /) -> int:
        """Write a piece, escaped."""
        begin = "\r" if text.startswith("\r") else ""
        self.write_as_is(begin + spell_out(text[len(begin) :]))
        return len(text)

    def write_as_is(self, text: str) -> None:
        """Write a piece that may steer the terminal."""
        with self._named():
            super().write(text)
            if "\n" in text:
                super().flush()

    def flush(self) -> None:
        """Flush; raises as `write` does."""
        with self._named():
            super().flush()

    @contextmanager
    def _named(self) -> Generator[None]:
        if self._is_closed:  # noticed before, perhaps by the thread of a progress bar
            raise SystemExit(CLOSED_PIPE)
        try:
            yield
        except BrokenPipeError:
            self._is_closed = True
            _discard(self)
            raise SystemExit(CLOSED_PIPE) from None
        except OSError as error:
            _discard(self)
            error.filename = "standard output" if self is sys.stdout else "standard error"
            raise


class _Past:
    """The file that rich writes to: the stream, without escaping twice."""

    def __init__(self, stream: SafeStream) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write_as_is(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: io.TextIOWrapper) -> None:
    """Send what is still buffered nowhere, so that the interpreter's last flush does not fail."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def safe_output() -> Generator[None]:
    """Let standard output and error be `SafeStream`s meanwhile, for handlers of logging too.

    Raises:
        SystemExit: The reader of a pipe has gone; with `CLOSED_PIPE`.
        OSError: What was printed last cannot be written; names the stream.
    """
    before = sys.stdout, sys.stderr
    made = [_wrapped(stream) for stream in before]
    sys.stdout, sys.stderr = made
    _move_handlers(dict(zip(before, made, strict=True)))
    try:
        yield
        flush_output()
    finally:
        _move_handlers(dict(zip(made, before, strict=True)))
        sys.stdout, sys.stderr = before
        for stream in made:
            if isinstance(stream, SafeStream):
                with suppress(OSError, ValueError, SystemExit):
                    stream.detach()


def flush_output() -> None:
    """Write what is still buffered; raises as `safe_output` does."""
    for stream in (sys.stdout, sys.stderr):
        if stream:  # None in a process that was started without one
            stream.flush()


def _wrapped(stream: TextIO | Any) -> TextIO | Any:
    """A stream made safe; None, where the command was started without one, stays None."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, SafeStream):
        return stream
    with suppress(OSError, ValueError):
        stream.flush()
    return SafeStream(stream)


def _move_handlers(moved: dict[Any, Any]) -> None:
    for handler in _handlers():
        if handler.stream is not None and handler.stream in moved:
            handler.setStream(moved[handler.stream])


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler):
                    yield handler


def print_table(table: Table) -> None:
    """Print a table whose numbers are never cut or wrapped; its lines are longer where they must.

    Columns aligned to the right hold numbers. Others are wrapped, down to their `min_width`.
    """
    least = sum(map(_least_width, table.columns)) + 3 * len(table.columns)
    if least > console.width:
        table.width = least
    console.print(table, crop=False, soft_wrap=least > console.width)


def _least_width(column: Column) -> int:
    if column.justify != "right":
        return column.min_width or LEAST_TEXT
    column.no_wrap = True
    return max(cell_len(str(cell)) for cell in (column.header, *column.cells))


console = SafeConsole(highlight=False)
