"""One file from a server that cuts, redirects, refuses, or sends something else."""

from __future__ import annotations

import email.utils
import io
import threading
import zipfile
from pathlib import Path

import pytest

import pipelines.downloads.transfer as transfer
from lapilli.data.errors import DataError
from pipelines.downloads.transfer import Stopped, Unreachable, fetch, part_of, retry_seconds
from tests.downloads.web import Page, digest, serve


def archive(seed: int = 0) -> bytes:
    """A zip of some 60 KB that no compression makes small."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("train2017/1.jpg", bytes((n * (n + seed)) % 251 for n in range(60_000)))
    return made.getvalue()


ZIP = archive()
JSON = b'[{"id": "1"}]'
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF", 0.01)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_cut_connection_goes_on_where_it_ended(tmp_path: Path) -> None:
    with serve(a=Page(ZIP, cuts=[10_000, 20_000], etag='"one"')) as web:
        assert fetch(web.address("/a"), tmp_path / "a.zip", "archive") == len(ZIP)
        assert web.sent["/a"] == len(ZIP)  # no byte twice
        ranges = [headers.get("Range") for _, headers in web.asked]
        assert ranges == [None, "bytes=10000-", "bytes=30000-"]
        assert web.asked[1][1]["If-Range"] == '"one"'
    assert (tmp_path / "a.zip").read_bytes() == ZIP
    assert left(tmp_path) == ["a.zip"]


def test_a_later_call_goes_on_with_the_part(tmp_path: Path) -> None:
    target = tmp_path / "a.zip"
    with serve(a=Page(ZIP, cuts=[30_000, 0], etag='"one"')) as web:
        with pytest.raises(Unreachable, match="2 times in a row"):
            fetch(web.address("/a"), target, "archive", attempts=2)
        assert left(tmp_path) == [".a.zip.part", ".a.zip.part.json"]
        assert part_of(target).stat().st_size == 30_000
        fetch(web.address("/a"), target, "archive")
        assert web.sent["/a"] == len(ZIP)
    assert target.read_bytes() == ZIP


@pytest.mark.parametrize("etag", ['"two"', 'W/"weak"', ""])
def test_a_file_that_has_changed_meanwhile_begins_anew(tmp_path: Path, etag: str) -> None:
    target, other = tmp_path / "a.zip", archive(seed=5)
    with serve(a=Page(ZIP, cuts=[30_000, 0], etag='"one"')) as web:
        with pytest.raises(Unreachable):
            fetch(web.address("/a"), target, "archive", attempts=2)
        web.pages["/a"] = Page(other, etag=etag)
        fetch(web.address("/a"), target, "archive")
    assert target.read_bytes() == other


@pytest.mark.parametrize(
    "page", [Page(ZIP, cuts=[9], etag='"a"', ranges=False), Page(ZIP, cuts=[9])]
)
def test_a_server_without_ranges_or_validators_begins_anew(tmp_path: Path, page: Page) -> None:
    with serve(a=page) as web:
        fetch(web.address("/a"), tmp_path / "a.zip", "archive")
    assert (tmp_path / "a.zip").read_bytes() == ZIP


def test_a_part_that_is_all_of_it_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "a.zip"
    with serve(a=Page(ZIP, cuts=[30_000, 0], etag='"one"')) as web:
        with pytest.raises(Unreachable):
            fetch(web.address("/a"), target, "archive", attempts=2)
        part_of(target).write_bytes(ZIP)
        fetch(web.address("/a"), target, "archive")
    assert target.read_bytes() == ZIP


def test_redirects_are_followed_and_say_the_hash(tmp_path: Path) -> None:
    with serve(b=Page(ZIP, cuts=[20_000], etag='"one"'), a=Page()) as web:
        web.pages["/a"] = Page(redirect=web.address("/b"), linked=digest(ZIP))
        fetch(web.address("/a"), tmp_path / "a.zip", "archive")
        assert web.sent["/b"] == len(ZIP)
        web.pages["/a"].linked = digest(b"other")
        with pytest.raises(Unreachable, match=f"SHA-256 is {digest(ZIP)}, expected"):
            fetch(web.address("/a"), tmp_path / "b.zip", "archive")
        web.pages["/a"] = Page(redirect="file:///etc/passwd")
        with pytest.raises(
            Unreachable, match=r"redirect that is not followed .*file:///etc/passwd"
        ):
            fetch(web.address("/a"), tmp_path / "c.zip", "archive")
        web.pages["/a"] = Page(redirect=web.address("/a"))
        with pytest.raises(Unreachable):
            fetch(web.address("/a"), tmp_path / "c.zip", "archive")
    assert left(tmp_path) == ["a.zip"]


class Patient(threading.Event):
    """Waits no time, and remembers for how long it was to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout or 0.0)
        return self.is_set()


@pytest.mark.parametrize("code", [429, 503, 500])
def test_a_busy_server_is_waited_for_as_long_as_it_asks(tmp_path: Path, code: int) -> None:
    patient = Patient()
    with serve(a=Page(ZIP, refusals=[(code, "7"), (code, "")])) as web:
        fetch(web.address("/a"), tmp_path / "a.zip", "archive", stop=patient)
    assert patient.waited == [7.0, 2 * transfer.BACKOFF]
    assert (tmp_path / "a.zip").read_bytes() == ZIP


def test_a_server_that_asks_for_hours_is_one_line(tmp_path: Path) -> None:
    with (
        serve(a=Page(ZIP, refusals=[(503, "86400")])) as web,
        pytest.raises(Unreachable, match=r"asks to wait 86400 s \(HTTP 503\)"),
    ):
        fetch(web.address("/a"), tmp_path / "a.zip", "archive")


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_seconds("120", 0.0) == 120.0
    assert retry_seconds(email.utils.formatdate(1_000_060, usegmt=True), 1_000_000.0) == 60.0
    assert retry_seconds(email.utils.formatdate(10, usegmt=True), 1_000_000.0) == 0.0
    assert retry_seconds("soon", 0.0) is None
    assert retry_seconds(None, 0.0) is None


@pytest.mark.parametrize(
    ("page", "kind", "words"),
    [
        (Page(HTML, kind="text/html"), "archive", "a web page|HTML"),
        (Page(HTML), "annotations", "a web page|HTML"),
        (Page(HTML), "image", "a web page|HTML"),
        (Page(b"version https://git-lfs.github.com/spec/v1\n"), "archive", "Git LFS pointer"),
        (Page(ZIP[:-30]), "archive", "no whole zip archive"),
        (Page(JSON[:-2] + b" " * 90), "annotations", "beginning of a JSON file"),
        (Page(b""), "annotations", "empty file"),
        (Page(refusals=[(404, "")]), "archive", r"not there \(HTTP 404\)"),
        (Page(refusals=[(401, "")]), "archive", r"not allowed .* \(HTTP 401\); get it by hand"),
        (Page(refusals=[(503, "0")] * 9), "archive", "busy .* 6 times in a row"),
    ],
)
def test_what_is_not_the_file_is_named_and_not_kept(
    tmp_path: Path, page: Page, kind: transfer.Expected, words: str
) -> None:
    with serve(a=page) as web, pytest.raises(Unreachable, match=words) as said:
        fetch(web.address("/a"), tmp_path / "a", kind)
    assert "\n" not in str(said.value)
    assert left(tmp_path) == []


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with serve() as web:
        address = web.address("/a")
    with pytest.raises(Unreachable, match=r"no answer .*refused"):
        fetch(address, tmp_path / "a.zip", "archive", attempts=2)


def test_a_stop_keeps_the_part(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with serve(a=Page(ZIP, etag='"one"')) as web, pytest.raises(Stopped):
        fetch(web.address("/a"), tmp_path / "a.zip", "archive", stop=stop)
    assert left(tmp_path) == [".a.zip.part", ".a.zip.part.json"]


def test_a_full_disk_is_one_line(tiny_disk: Path) -> None:
    large = b"PK\3\4" + bytes(30 << 20)
    with serve(a=Page(large, etag='"one"')) as web, pytest.raises(DataError, match=r"full|space"):
        fetch(web.address("/a"), tiny_disk / "a.zip", "archive")
    assert not (tiny_disk / "a.zip").exists()
