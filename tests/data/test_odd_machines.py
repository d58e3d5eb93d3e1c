"""Builds on odd machines: a strict umask, a clock that goes back, an output that is a link."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapilli.data import open_dataset
from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.dataset.verify import verify_dataset
from lapilli.data.planning.plan import plan_build
from tests.factories import Mixture, build_config, build_dataset, make_mixture, make_tokenizer


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return make_mixture(tmp_path_factory.mktemp("odd") / "root")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("odd") / "tokenizer")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, mixture: Mixture, tokenizer: Path) -> Path:
    output = tmp_path_factory.mktemp("usual") / "out"
    build_dataset(mixture, output, tokenizer)
    return output


def shards(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.arrow"))
    }


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("strict_umask")
def test_under_umask_077_files_are_their_owners_alone(
    tmp_path: Path, mixture: Mixture, tokenizer: Path, usual: Path
) -> None:
    output = tmp_path / "out"
    build_dataset(mixture, output, tokenizer)
    assert shards(output) == shards(usual)
    assert {path.stat().st_mode & 0o077 for path in (output, *output.rglob("*"))} == {0}
    assert verify_dataset(output).damaged == []


def test_a_clock_that_goes_back_changes_nothing(
    tmp_path: Path, mixture: Mixture, tokenizer: Path, usual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is an hour before the last; files are written in the future."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600 * next(hours))
    output = tmp_path / "out"
    build_dataset(mixture, output, tokenizer)
    assert shards(output) == shards(usual)
    for path in output.rglob("*"):
        os.utime(path, (4e9, 4e9))
    build_dataset(mixture, output, tokenizer)  # finished: no shard is made again
    made = [*output.glob("images/*/*.arrow"), *output.glob("tokens/*/*.arrow")]
    assert {path.stat().st_mtime for path in made} == {4e9}
    assert shards(output) == shards(usual)
    assert len(open_dataset(output, view="pad32", image_tokens=4))


@pytest.mark.parametrize("is_relative", [False, True])
def test_an_output_that_is_a_link_is_written_where_it_leads(
    tmp_path: Path, mixture: Mixture, tokenizer: Path, usual: Path, is_relative: bool
) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to("disk" if is_relative else tmp_path / "disk")
    build_dataset(mixture, link, tokenizer)
    assert link.is_symlink()
    assert shards(tmp_path / "disk") == shards(usual)
    again = build(plan_build(build_config(mixture, link, tokenizer)), runner=run_here)
    assert again.manifest.counts["read"] > 0
    assert verify_dataset(link).damaged == []
