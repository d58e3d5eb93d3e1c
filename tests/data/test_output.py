"""A dataset written to an object store: the bytes of a local one, also where the store fails."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.atomic import write_json
from lapilli.data.io.remote_path import Output, RemotePath, open_output
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import Task
from lapilli.data.shards.manifest import read_manifest
from tests.factories import CLIP_MEAN, build_config, make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve, use_endpoint

ROOT = Path(__file__).parents[2]


class Store(LocalFileSystem):
    """A store whose call number i fails where `fails(i)`; its objects are files of this machine."""

    cachable = False

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__(auto_mkdir=True)
        self.fails, self.calls, self.failed = fails, 0, 0

    def _count(self) -> None:
        self.calls += 1
        if self.fails(self.calls):
            self.failed += 1
            raise OSError("503 Slow Down\nplease")

    def _open(self, path: str, mode: str = "rb", *more: Any, **options: Any) -> Any:
        self._count()
        return super()._open(path, mode, *more, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._count()
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        self._count()
        fails, self.fails = self.fails, lambda _: False  # it asks for each file's facts itself
        try:
            return super().ls(path, detail=detail, **options)
        finally:
            self.fails = fails

    def rm_file(self, path: str) -> None:
        self._count()
        super().rm_file(path)


@pytest.fixture
def use_store(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Store]:
    """Let addresses lead to a store that fails as asked, without the waits between attempts."""

    def use(fails: Callable[[int], bool] = lambda _: False) -> Store:
        store = Store(fails)
        monkeypatch.setattr("lapilli.data.io.remote_path.open_storage", lambda scheme: store)
        monkeypatch.setattr("lapilli.data.io.remote_path.FIRST_WAIT", 0.001)
        return store

    return use


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


def test_a_store_holds_what_a_folder_holds(
    use_store: Callable[..., Store], local: BuildConfig, tmp_path: Path
) -> None:
    use_store()
    report = build_at(local, f"file://{tmp_path}/whole")
    assert data_files(tmp_path / "whole") == data_files(Path(local.output))
    assert report.manifest == read_manifest(Path(local.output))
    again = build_at(local, f"file://{tmp_path}/whole")
    assert (again.shards_built, again.shards_reused) == (0, report.shards_built)


def test_a_build_into_a_store_goes_on_and_mends(
    use_store: Callable[..., Store], local: BuildConfig, tmp_path: Path
) -> None:
    use_store()

    def stopped(tasks: list[Task], output: Output, workers: int) -> Any:
        yield from run_here(tasks[:3], output, workers)
        raise KeyboardInterrupt

    plan = plan_build(replace(local, output=f"file://{tmp_path}/stopped"))
    with pytest.raises(KeyboardInterrupt):
        build(plan, runner=stopped)
    with pytest.raises(DataError, match="an unfinished build: run the same preprocess again"):
        read_manifest(open_output(f"file://{tmp_path}/stopped"))
    assert build(plan, runner=run_here).shards_reused == 3
    victim = next((tmp_path / "stopped" / "images").rglob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert build(plan, runner=run_here).shards_built == 1
    assert data_files(tmp_path / "stopped") == data_files(Path(local.output))


def test_a_dataset_in_a_store_is_amended(
    use_store: Callable[..., Store], local: BuildConfig, tmp_path: Path
) -> None:
    """From the source bytes in the store: as into a folder, file by file."""
    use_store()
    views = {**local.views, "new": ImageSpec(12, CLIP_MEAN)}
    exclude = ["made_up/image-3"]
    changed: dict[str, Any] = {"keep_original": True, "views": views, "exclude": exclude}
    build_at(local, f"file://{tmp_path}/amended", keep_original=True)
    with pytest.raises(DataError, match=r"views; .*pass --incremental"):
        build_at(
            local, f"file://{tmp_path}/amended", keep_original=True, views=views, exclude=exclude
        )
    changed = {"keep_original": True, "views": views, "exclude": exclude, "incremental": True}
    build_at(local, f"file://{tmp_path}/amended", **changed)
    folder = Path(local.output).with_name("amended")
    build_at(local, str(folder), keep_original=True)
    build_at(local, str(folder), **changed)
    assert data_files(tmp_path / "amended") == data_files(folder)


@pytest.mark.parametrize("every", [10, 3])
def test_a_store_that_fails_every_tenth_call(
    use_store: Callable[..., Store], local: BuildConfig, tmp_path: Path, every: int
) -> None:
    store = use_store(lambda number: number % every == every - 1)
    build_at(local, f"file://{tmp_path}/flaky")
    assert store.failed > 5
    assert data_files(tmp_path / "flaky") == data_files(Path(local.output))


def test_a_store_that_always_fails_ends_in_one_line(
    use_store: Callable[..., Store], local: BuildConfig, tmp_path: Path
) -> None:
    store = use_store(lambda _: True)
    with pytest.raises(DataError, match=r"dead.* cannot be .* after 6 attempts") as caught:
        build_at(local, f"file://{tmp_path}/dead")
    assert "\n" not in str(caught.value)
    assert store.calls < 20


def test_a_store_that_begins_to_fail_half_way(
    use_store: Callable[..., Store], local: BuildConfig, tmp_path: Path
) -> None:
    total = use_store()
    build_at(local, f"file://{tmp_path}/all")
    for share in (0.3, 0.6, 0.8):
        store = use_store(lambda number, limit=share * total.calls: number > limit)
        with pytest.raises(DataError, match=r"after 6 attempts .*run the same command again"):
            build_at(local, f"file://{tmp_path}/half{share}")
        assert store.failed
        use_store()
        build_at(local, f"file://{tmp_path}/half{share}")
        assert data_files(tmp_path / f"half{share}") == data_files(Path(local.output))


def test_objects_on_a_real_server(tmp_path: Path) -> None:
    """rclone takes seconds for a larger object where the machine is busy; these are small."""
    (tmp_path / "s3" / "made").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"small")
    with (
        serve(tmp_path / "s3") as port,
        failing_proxy(port, lambda number: number % 3 == 1) as (proxy, failed),
        use_endpoint(proxy),
    ):
        path = RemotePath("s3://made/data") / "a/b.txt"
        assert path.size is None
        path.put(tmp_path / "file")
        end = time.monotonic() + 20  # rclone remembers for a while that there was no such folder
        while path.size is None and time.monotonic() < end:
            time.sleep(0.2)
        assert (path.size, path.read_text()) == (5, "small")
        assert [str(p) for p in RemotePath("s3://made/data").files()] == [str(path)]
        path.unlink()
        assert path.size is None
    assert failed


@pytest.mark.faults
def test_a_build_by_rays_workers_into_a_bucket_is_the_local_one(tmp_path: Path) -> None:
    (tmp_path / "s3" / "made").mkdir(parents=True)
    mixture = make_mixture(tmp_path / "raw", images=20, text_only=5)
    make_tokenizer(tmp_path / "tokenizer")
    local = build_config(mixture, tmp_path / "local", tmp_path / "tokenizer")
    made = build(plan_build(local), runner=run_here)
    write_json(tmp_path / "recipe.json", asdict(replace(local, output="s3://made/data")))
    command = [sys.executable, "-m", "pipelines.preprocess", f"--config={tmp_path / 'recipe.json'}"]
    with (  # a process of its own: Ray's workers inherit where the store is
        serve(tmp_path / "s3", remembers="1h") as server,
        failing_proxy(server, lambda _: False) as (port, _),
        use_endpoint(port),
    ):
        first, second = (
            subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True
            )
            for _ in range(2)
        )
        opened = open_dataset(
            "s3://made/data", view="pad32", image_tokens=4, cache=tmp_path / "cache"
        )
        assert len(opened) == 25
        assert opened.sample(0).pixels.shape[1:] == (32, 32, 3)
    assert f"{made.shards_built} shards built, 0 reused" in first.stdout
    assert f"0 shards built, {made.shards_built} reused" in second.stdout
    assert opened.manifest.fingerprint == made.manifest.fingerprint


def test_at_an_address_of_this_machine_folders_are_made_and_files_are_none(tmp_path: Path) -> None:
    """`file://` has folders, other stores have none."""
    (tmp_path / "a").write_text("1")
    RemotePath(f"file://{tmp_path}/new/deep/b").put(tmp_path / "a")
    assert (tmp_path / "new" / "deep" / "b").read_text() == "1"
    below = RemotePath(f"file://{tmp_path}/a/below/b")
    with pytest.raises(DataError, match=f"file://{tmp_path}/a/below/b: cannot be written"):
        below.put(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        below.read_bytes()
    assert list(below.files()) == []
    assert (below.size, below.exists()) == (None, False)
