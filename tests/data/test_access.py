"""Not there, not readable, no room: each is told as what it is, and none taken for another."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.building.repair import repair_dataset
from lapilli.data.building.runners import run_here
from lapilli.data.config import SourceConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.dataset.verify import verify_dataset
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage
from lapilli.data.io.access import blame, exists, is_file, is_folder, naming, subpaths, system_error
from lapilli.data.io.atomic import write_atomic
from lapilli.data.mounts import Mount, read_image
from lapilli.data.mounts.places import Located
from lapilli.data.record import Reason, Verdict
from lapilli.data.shards.files import finished_facts, open_table
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.shards.schemas import SELECTION_SCHEMA
from lapilli.data.sources.reading.files import annotation_files
from lapilli.data.text.encode import load_tokenizer
from tests.factories import build_config, build_dataset, image_bytes, make_mixture, make_tokenizer

Nobody = Callable[[], AbstractContextManager[None]]
REFUSED = [errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Let every look at paths with this name, and every opening of one, fail with an error."""

    def prepare(name: str, number: int) -> None:
        stat, opened = Path.stat, Path.open

        def refuse(path: Path) -> None:
            if path.name == name:
                raise OSError(number, os.strerror(number), str(path))

        def failing_stat(self: Path, **more: Any) -> os.stat_result:
            refuse(self)
            return stat(self, **more)

        def failing_open(self: Path, *given: Any, **more: Any) -> Any:
            refuse(self)
            return opened(self, *given, **more)

        monkeypatch.setattr(Path, "stat", failing_stat)
        monkeypatch.setattr(Path, "open", failing_open)

    return prepare


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("access")
    tokenizer = make_tokenizer(folder / "tokenizer")
    build_dataset(make_mixture(folder / "raw", images=4, text_only=2), folder / "ds", tokenizer)
    before = bytes_of(folder / "ds")
    yield folder / "ds"
    assert bytes_of(folder / "ds") == before


@pytest.mark.parametrize("number", REFUSED)
def test_a_path_that_cannot_be_looked_at_is_neither_there_nor_missing(
    tmp_path: Path, failing: Callable[[str, int], None], number: int
) -> None:
    (tmp_path / "kept").write_text("")
    failing("kept", number)
    for ask in (exists, is_file, is_folder):
        with pytest.raises(DataError, match=f"kept: cannot be read .{os.strerror(number)}"):
            ask(tmp_path / "kept")
    assert not exists(tmp_path / "other")
    assert not exists(tmp_path / "kept" / "below" / "a file")
    assert not exists(Path("a name with a \0 in it"))


def test_a_link_in_a_circle_and_a_name_too_long_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    assert not exists(tmp_path / "link")
    assert not exists(tmp_path / ("n" * 300))
    assert subpaths(tmp_path / "none") == []
    assert [path.name for path in subpaths(tmp_path, "li")] == ["link"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "read-only disk; choose another folder"),
        (errno.EACCES, "ask its owner for permission"),
        (errno.ENOSPC, "free space and run the same command again"),
        (errno.EDQUOT, "free space and run the same command again"),
        (errno.EIO, "check the disk or its server"),
    ],
)
def test_an_error_of_the_machine_names_path_cause_and_remedy(number: int, remedy: str) -> None:
    line = blame(OSError(number, os.strerror(number), "/data/x"))
    assert line is not None
    assert line.startswith(f"/data/x: {os.strerror(number)}; ")
    assert remedy in line
    assert blame(OSError(number, os.strerror(number)), "/out") == line.replace("/data/x", "/out")


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "none", "x"), OSError("no number"), IsADirectoryError()],
)
def test_a_fault_of_the_program_is_no_error_of_the_machine(error: OSError) -> None:
    assert blame(error) is None


def test_what_rust_says_of_the_system_is_understood(tmp_path: Path) -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    found = system_error(Exception(text))
    assert found is not None
    assert found.errno == errno.ENOSPC
    assert system_error(Exception("28")) is None
    with pytest.raises(OSError, match="No space left") as caught, naming(tmp_path):
        raise Exception(text)
    assert caught.value.filename == str(tmp_path)


# ---- a dataset ---------------------------------------------------------------------------------


def kept_back(dataset: Path) -> list[Path]:
    """A file of each kind that a dataset has."""
    manifest = read_manifest(dataset)
    shards = [manifest.selection, *manifest.tokens, *next(iter(manifest.views.values())).shards]
    return [dataset / "manifest.json", *(dataset / shard.path for shard in shards)]


def test_a_dataset_that_may_not_be_read_is_not_opened_and_not_made_again(
    open_folder: Path, as_nobody: Nobody, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a real user without rights: root reads everything."""
    scratch = open_folder / "scratch"
    scratch.mkdir()
    scratch.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    tokenizer = make_tokenizer(open_folder / "tokenizer")
    mixture = make_mixture(open_folder / "raw", images=4, text_only=2)
    build_dataset(mixture, open_folder / "ds", tokenizer)
    config = build_config(mixture, open_folder / "ds", tokenizer)
    view = next(iter(read_manifest(open_folder / "ds").views))

    def look() -> None:
        open_dataset(open_folder / "ds", view=view, image_tokens=1).sample(0)
        verify_dataset(open_folder / "ds")  # what is not needed for a sample

    before = bytes_of(open_folder / "ds")
    for folder in (open_folder / "ds", *(open_folder / "ds").rglob("*/")):
        folder.chmod(0o777)
    for file in kept_back(open_folder / "ds"):
        file.chmod(0)
        said = f"{file.name}: cannot be read .Permission denied"
        with as_nobody():
            with pytest.raises(DataError, match=said):
                look()
            if file.name != "selection.arrow":  # which every build writes anew
                with pytest.raises(DataError, match=said):
                    repair_dataset(open_folder / "ds", config, runner=run_here)
        file.chmod(0o644)
    assert bytes_of(open_folder / "ds") == before


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_shard_that_a_disk_keeps_back_is_neither_missing_nor_damaged(
    dataset: Path, failing: Callable[[str, int], None], number: int
) -> None:
    shard = read_manifest(dataset).selection
    failing(Path(shard.path).name, number)
    said = f"{shard.path}: cannot be read .{os.strerror(number)}"
    for look in (
        lambda: finished_facts(dataset, shard.path),
        lambda: open_table(dataset, shard, SELECTION_SCHEMA),
        lambda: verify_dataset(dataset),
    ):
        with pytest.raises(DataError, match=said):
            look()


# ---- images, annotations, tokenizers -----------------------------------------------------------


def test_an_image_that_may_not_be_read_has_a_verdict_that_names_the_cause(
    open_folder: Path, as_nobody: Nobody
) -> None:
    root = open_folder / "raw"
    for name in ("closed/1.png", "file.png", "archive.tar", "fine.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes("png"))
    (root / "closed").chmod(0)
    (root / "file.png").chmod(0)
    (root / "archive.tar").chmod(0)
    with as_nobody():
        mount = Mount(root)
        assert isinstance(mount.locate("fine.png"), Located)
        for key, why in (
            ("closed/1.png", "Permission denied"),
            ("file.png", "no permission to read it"),
            ("archive.tar/1.png", "no permission to read it"),
        ):
            verdict = mount.locate(key)
            assert isinstance(verdict, Verdict), key
            assert (verdict.reason, why in verdict.detail) == (Reason.IMAGE_UNREADABLE, True)
        with pytest.raises(DataError, match=r"images: .*closed: Permission denied"):
            Mount(root, "closed").require()


def test_an_image_that_becomes_unreadable_is_not_called_missing(
    tmp_path: Path, failing: Callable[[str, int], None]
) -> None:
    (tmp_path / "1.png").write_bytes(image_bytes("png"))
    place = Mount(tmp_path).locate("1.png")
    assert isinstance(place, Located)
    failing("1.png", errno.EIO)
    with pytest.raises(BadImage) as caught:
        read_image(tmp_path, place)
    assert caught.value.reason == Reason.IMAGE_UNREADABLE
    assert "Input/output error" in caught.value.detail


def test_a_build_stops_for_images_that_become_unreadable_and_quarantines_none(
    tmp_path: Path, failing: Callable[[str, int], None]
) -> None:
    mixture = make_mixture(tmp_path / "raw", images=4, text_only=2)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    image = min((tmp_path / "raw" / "images").rglob("*.*"))
    failing(image.name, errno.EIO)
    with pytest.raises(DataError, match=r"could not be read while the build ran.*Input/output"):
        build_dataset(mixture, tmp_path / "ds", tokenizer)
    assert not (tmp_path / "ds" / "manifest.json").exists()


@pytest.mark.parametrize("pattern", ["closed/*.json", "*/deep/*.json", "**/*.json"])
def test_a_glob_into_a_folder_that_may_not_be_listed_is_an_error(
    open_folder: Path, as_nobody: Nobody, pattern: str
) -> None:
    for name in ("open/deep/a.json", "closed/deep/b.json", "closed/c.json"):
        (open_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (open_folder / name).write_text("[]")
    source = SourceConfig("s", pattern, "images")
    assert annotation_files(source, open_folder)
    (open_folder / "closed").chmod(0)
    with as_nobody(), pytest.raises(DataError, match=r"closed.*Permission denied"):
        annotation_files(source, open_folder)
    (open_folder / "closed").chmod(0o755)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_may_not_be_read_is_named(
    open_folder: Path, as_nobody: Nobody, name: str
) -> None:
    tokenizer = make_tokenizer(open_folder / "tokenizer")
    load_tokenizer(tokenizer)
    (tokenizer / name).chmod(0)
    said = f"{name}: cannot be read .Permission denied"
    with as_nobody(), pytest.raises(DataError, match=said):
        load_tokenizer(tokenizer)


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_the_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def keep(self: Path, *, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", keep)
    with pytest.raises(DataError, match=r"out: cannot be written .*No space left.*; free space"):
        write_atomic(tmp_path / "out", fail)
