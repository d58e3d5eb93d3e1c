"""A dataset written to an object store: the bytes of a local one, also where the store fails."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.build import build
from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.images import ImageSpec
from lapilli.data.manifest import read_manifest
from lapilli.data.output import Output, RemotePath, open_output
from lapilli.data.plan import Task, plan_build
from lapilli.data.runners import run_here
from tests.data.s3_server import failing_proxy, serve, use_endpoint
from tests.factories import CLIP_MEAN, build_config, make_mixture, make_tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of an S3 server and the folder behind its bucket `s3://made`."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "made").mkdir()
    with serve(folder) as port:
        yield port, folder / "made"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    """A dataset in a folder, to compare with."""
    folder = tmp_path_factory.mktemp("local")
    mixture = make_mixture(folder / "root", images=8)
    config = build_config(mixture, folder / "out", make_tokenizer(folder / "tokenizer"))
    build(plan_build(config), runner=run_here)
    return config


def data_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the settings, which name the output."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("config.json",)
    }


def build_at(config: BuildConfig, address: str, **changes: Any) -> Any:
    return build(plan_build(replace(config, output=address, **changes)), runner=run_here)


def test_a_store_holds_what_a_folder_holds(server: tuple[int, Path], local: BuildConfig) -> None:
    port, bucket = server
    with use_endpoint(port):
        report = build_at(local, "s3://made/whole")
        assert data_files(bucket / "whole") == data_files(Path(local.output))
        assert report.manifest == read_manifest(Path(local.output))
        again = build_at(local, "s3://made/whole")
        assert (again.shards_built, again.shards_reused) == (0, report.shards_built)


def test_a_build_into_a_store_goes_on_and_mends(
    server: tuple[int, Path], local: BuildConfig
) -> None:
    port, bucket = server

    def stopped(tasks: list[Task], output: Output, workers: int) -> Any:
        yield from run_here(tasks[:3], output, workers)
        raise KeyboardInterrupt

    with use_endpoint(port):
        plan = plan_build(replace(local, output="s3://made/stopped"))
        with pytest.raises(KeyboardInterrupt):
            build(plan, runner=stopped)
        with pytest.raises(DataError, match="an unfinished build: run the same preprocess again"):
            read_manifest(open_output("s3://made/stopped"))
        assert build(plan, runner=run_here).shards_reused == 3
        victim = next((bucket / "stopped" / "images").rglob("*.arrow"))
        victim.write_bytes(victim.read_bytes()[:-1])
        assert build(plan, runner=run_here).shards_built == 1
    assert data_files(bucket / "stopped") == data_files(Path(local.output))


def test_a_dataset_in_a_store_is_amended(server: tuple[int, Path], local: BuildConfig) -> None:
    """From the source bytes in the store: as into a folder, file by file."""
    port, bucket = server
    views = {**local.views, "new": ImageSpec(12, CLIP_MEAN)}
    exclude = ["made_up/image-3"]
    with use_endpoint(port):
        build_at(local, "s3://made/amended", keep_original=True)
        with pytest.raises(DataError, match=r"views; .*pass --amend"):
            build_at(local, "s3://made/amended", keep_original=True, views=views, exclude=exclude)
        changed = {"keep_original": True, "views": views, "exclude": exclude, "amend": True}
        build_at(local, "s3://made/amended", **changed)
    folder = Path(local.output).with_name("amended")
    build_at(local, str(folder), keep_original=True)
    build_at(local, str(folder), **changed)
    assert data_files(bucket / "amended") == data_files(folder)


def test_a_store_that_fails_every_tenth_call(server: tuple[int, Path], local: BuildConfig) -> None:
    port, bucket = server
    with (
        failing_proxy(port, lambda number: number % 10 == 9) as (proxy, failed),
        use_endpoint(proxy),
    ):
        build_at(local, "s3://made/flaky")
    assert len(failed) > 3
    assert data_files(bucket / "flaky") == data_files(Path(local.output))


def test_a_store_that_always_fails_ends_in_one_line(
    server: tuple[int, Path], local: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapilli.data.output.FIRST_WAIT", 0.01)
    started = time.monotonic()
    with (
        failing_proxy(server[0], lambda _: True) as (proxy, _),
        use_endpoint(proxy),
        pytest.raises(DataError, match=r"s3://made/dead.* cannot be .* after 6 attempts") as caught,
    ):
        build_at(local, "s3://made/dead")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 120


def test_a_store_that_begins_to_fail_half_way(
    server: tuple[int, Path], local: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapilli.data.output.FIRST_WAIT", 0.01)
    port, bucket = server
    with (
        failing_proxy(port, lambda number: number > 25) as (proxy, _),
        use_endpoint(proxy),
        pytest.raises(DataError, match=r"after 6 attempts .*run the same command again"),
    ):
        build_at(local, "s3://made/half")
    assert not (bucket / "half" / "manifest.json").exists()
    with use_endpoint(port):
        assert build_at(local, "s3://made/half").shards_reused > 0
    assert data_files(bucket / "half") == data_files(Path(local.output))


def test_only_the_columns_asked_for_are_read(server: tuple[int, Path]) -> None:
    from lapilli.data.shards import IMAGE_SCHEMA, open_table, write_shard

    port, _ = server
    rows: dict[str, list[Any]] = {field.name: [None] * 4 for field in IMAGE_SCHEMA}
    rows |= {"status": ["ok"] * 4, "pixels": [bytes(2**20)] * 4}
    with use_endpoint(port):
        facts = write_shard(RemotePath("s3://made/columns"), "0.arrow", rows, IMAGE_SCHEMA)
        table = open_table(RemotePath("s3://made/columns"), facts, ["status"])
    assert table.to_pydict() == {"status": ["ok"] * 4}
