"""What reaches a terminal, a pipe or a file: nothing that steers, hides or fails on the way."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lapilli.data.errors import DataError
from lapilli.data.io.printable import one_line, spell_out
from pipelines.cli import command
from pipelines.cli.command import run, say, say_text, say_title, stream_text
from pipelines.cli.terminal import SafeConsole, safe_output

EVIL = "\x1b]0;PWNED\x07\x1b[2Ja\x9bb\u202ec\x85d\u2028e\udc80f"
SPELT = r"\x1b]0;PWNED\x07\x1b[2Ja\x9bb\u202ec\x85d\u2028e\udc80f"


@contextmanager
def streams(encoding: str = "utf-8") -> Generator[Callable[[], str]]:
    """Standard output and error with this encoding; gives what both were written, in that order."""
    kept = io.BytesIO(), io.BytesIO()
    before = sys.stdout, sys.stderr
    made = [io.TextIOWrapper(one, encoding=encoding) for one in kept]
    sys.stdout, sys.stderr = made
    try:
        yield lambda: b"".join(one.getvalue() for one in kept).decode(encoding)
    finally:
        sys.stdout, sys.stderr = before


def printed(work: Callable[[], object], encoding: str = "utf-8") -> str:
    """What a command that does this prints."""

    def main() -> int:
        work()
        return 0

    with streams(encoding) as written:
        with pytest.raises(SystemExit):
            run(main)
        return written()


def table(cell: object) -> Table:
    found = Table(title=EVIL, caption=EVIL)
    found.add_column(EVIL)
    found.add_row(cell)  # pyright: ignore[reportArgumentType]
    return found


def progress() -> None:
    with Progress(TextColumn("{task.description}"), console=command.console) as bar:
        bar.add_task(EVIL)


def fail() -> None:
    raise DataError(EVIL)


WAYS: dict[str, Callable[[], object]] = {
    "line": lambda: say(EVIL),
    "text": lambda: say_text(EVIL),
    "title": lambda: say_title(EVIL),
    "streamed answer": lambda: [stream_text(letter) for letter in EVIL],
    "table": lambda: command.console.print(table(EVIL)),
    "text in a table": lambda: command.console.print(table(Text(EVIL))),
    "progress bar": progress,
    "error": fail,
    "warning": lambda: sys.stderr.write(warnings.formatwarning(EVIL, UserWarning, "a.py", 1)),
    "print of a library": lambda: print(EVIL),
    "path": lambda: say(str(Path(os.fsdecode(EVIL.encode("utf-8", "surrogateescape"))))),
}


@pytest.mark.parametrize("way", WAYS)
def test_control_characters_are_spelt_out(way: str) -> None:
    text = printed(WAYS[way])
    assert [c for c in text if not c.isprintable() and c != "\n"] == []
    # rich folds a table, cuts a bar and takes the bell out of a text of its own
    said = text.replace("\n", "").replace(" ", "").replace(r"\x07", "")
    assert "PWNED" in said
    if "table" not in way and "bar" not in way:
        assert r"\x1b]0;PWNED\x1b[2Ja" in said


def test_a_handler_of_logging_that_was_made_before_is_safe_too() -> None:
    logger = logging.getLogger("lib")
    logger.propagate = False  # pytest's own record of it could not be sent between processes
    with streams() as written:
        handler = logging.StreamHandler()  # as of a library that was imported before
        logger.addHandler(handler)
        try:
            with safe_output():
                logger.warning(EVIL)
        finally:
            logger.removeHandler(handler)
        assert written() == f"{SPELT}\n"


def test_a_traceback_is_spelt_out(capsys: pytest.CaptureFixture[str]) -> None:
    def bug() -> int:
        raise ZeroDivisionError(EVIL)

    before = sys.excepthook
    try:
        with pytest.raises(ZeroDivisionError) as raised:
            run(bug)
        sys.excepthook(raised.type, raised.value, raised.tb)
    finally:
        sys.excepthook = before
    error = capsys.readouterr().err
    assert f"ZeroDivisionError: {SPELT}" in error
    assert "Traceback (most recent call last)" in error


@given(st.text())
def test_what_is_spelt_out_steers_nothing_and_says_the_same(text: str) -> None:
    spelt = spell_out(text)
    assert spell_out(spelt) == spelt
    assert not {c for c in spelt if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n", "\t"}
    spelt.encode()
    if "\\" not in text:  # then it can be read back
        back = spelt.encode("raw_unicode_escape").decode("unicode_escape", "surrogatepass")
        assert back == text
    assert "\n" not in one_line(text)
    assert "\t" not in one_line(text)


def test_colours_of_our_own_stay() -> None:
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard").print("[red]a[/red]\x1b")
    assert file.getvalue() == "\x1b[31ma\x1b[0m\\x1b\n"
    plain = io.StringIO()
    Console(file=plain, force_terminal=True, color_system="standard").print("[red]a[/red]")
    assert "\x1b[31m" in plain.getvalue()


def test_newlines_in_a_name_make_no_line_of_their_own() -> None:
    assert printed(lambda: say("\nid a\nerror: forged")) == "\nid a\\nerror: forged\n"
    assert printed(lambda: say_text("one\ntwo")) == "one\ntwo\n"


def test_what_an_encoding_lacks_is_replaced() -> None:
    assert printed(lambda: say("caf\u00e9 \u4e2d"), "ascii") == "caf\\xe9 \\u4e2d\n"
    assert printed(lambda: print("\u4e2d"), "latin-1") == "\\u4e2d\n"
    box = printed(lambda: command.console.print(table("\u4e2d")), "ascii")
    assert "\\u4e2d" in box


def test_the_streams_are_as_before_afterwards() -> None:
    with streams() as written:
        before = sys.stdout
        with safe_output():
            print("a", end="")
            assert sys.stdout is not before
        assert sys.stdout is before
        print("b")
        sys.stdout.flush()
        assert written() == "ab\n"


LINES = """from pipelines.cli.command import run, say
def main():
    for _ in range(9999): say('a' * 80)
    return 0
run(main)
"""


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LINES], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"a" * 80 + b"\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + signal.SIGPIPE


def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", LINES], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 2
    said = f"error: standard output: {os.strerror(errno.ENOSPC)}; free space and run"
    assert done.stderr.decode().startswith(said)
    assert done.stderr.count(b"\n") == 1


def test_a_command_without_an_output_runs() -> None:
    command = f'{sys.executable} -c "{LINES}" >&-'
    assert subprocess.run(command, shell=True, capture_output=True, check=True).stderr == b""
