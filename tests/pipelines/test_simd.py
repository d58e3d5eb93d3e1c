"""What `make simd` checks before it builds; the build itself needs a compiler and minutes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines import simd


def test_a_compiler_that_finds_nothing_lacks_every_header(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    assert simd.missing_headers(str(compiler)) == list(simd.HEADERS.values())


def test_avx2_is_asked_for_only_where_it_is() -> None:
    assert simd.build_environment("cc", {"avx2"}, {"A": "b"}) == {"A": "b", "CC": "cc -mavx2"}
    assert simd.build_environment("cc", {"sse2"}, {})["CC"] == "cc"


def test_without_a_compiler_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_nothing(name: str) -> None:
        del name

    monkeypatch.setattr(shutil, "which", find_nothing)
    assert simd.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "apt-get install gcc" in error
