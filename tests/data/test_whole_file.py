"""Whole files of somebody else: of bounded size, and never waited for."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from lapilli.data.errors import DataError
from lapilli.data.io.whole_file import read_whole
from lapilli.data.text import tokenizer_folder
from lapilli.data.text.tokenizer_folder import check_files, unpacked
from lapilli.model.errors import ModelError
from lapilli.model.parts.pretrained import check_readable
from lapilli.model.parts.weight_files import read_object, read_safetensors


@pytest.mark.timeout(10)
def test_a_pipe_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to("/dev/zero")
    for read, error in ((read_whole, DataError), (read_object, ModelError)):
        for name in ("model.safetensors", "config.json"):
            with pytest.raises(error, match=rf"{name}: a pipe, socket or device; expected a file"):
                read(tmp_path / name)
    for refused in (
        lambda: check_readable(tmp_path),
        lambda: read_safetensors(tmp_path / "model.safetensors"),
    ):
        with pytest.raises(ModelError, match="a pipe, socket or device"):
            refused()


def test_a_file_with_a_hole_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.touch()
    os.truncate(path, 1 << 40)
    for read in (read_whole, read_object, check_files):
        with pytest.raises(
            (DataError, ModelError), match=rf"{1 << 40} bytes; at most \d+ are read"
        ):
            read(tmp_path if read is check_files else path)


def test_as_much_as_the_bound_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert read_whole(tmp_path / "x", 3) == b"abc"
    with pytest.raises(DataError, match="3 bytes; at most 2"):
        read_whole(tmp_path / "x", 2)
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "y")
    with pytest.raises(IsADirectoryError):
        read_whole(tmp_path)


def test_a_packed_tokenizer_unpacks_to_no_more_than_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_folder, "MOST_VOCABULARY", 1 << 20)
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(DataError, match="unpacks to more than 1048576 bytes"), unpacked(tmp_path):
        pass
