"""What a node's probe finds, and the line for a node that cannot work with the driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lapilli.data.cluster import places as module
from lapilli.data.cluster.places import check_places, fault_of, places_of, shared_token
from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.cluster.probe import (
    JobPlaces,
    Seen,
    node_versions,
    probe_node,
    same_version,
    store_seconds,
)
from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import RemotePath


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as a mixture's: an annotation file, images two levels down."""
    (tmp_path / "data" / "images" / "part").mkdir(parents=True)
    (tmp_path / "data" / "images" / "part" / "1.jpg").write_bytes(b"12345")
    (tmp_path / "data" / "made.json").write_bytes(b"[]")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images: (images / "part" / "1.jpg").unlink(), "1.jpg is not there, as it is for"),
        (lambda images: (images / "part" / "1.jpg").write_bytes(b"1"), "has 1 bytes there, 5 here"),
        (lambda images: images.rename(images.with_name("other")), "images is not there"),
        (lambda images: None, ""),
    ],
)
def test_a_node_that_sees_other_files_is_named(
    data: Path, change: Callable[[Path], object], said: str
) -> None:
    """What the driver saw is compared with what is there later, as on another machine."""
    read = {
        "sources.annotations": [str(data / "made.json")],
        "sources.images": str(data / "images"),
    }
    places = places_of({**read, "tokenizer": "lmsys/vicuna-7b-v1.5"}, {"output": "/local"})
    assert places.paths.keys() == read.keys()
    assert not places.written
    change(data / "images")
    fault = fault_of(probe_node(places), node_versions())
    assert said in fault
    if said:
        assert "sources.images: " in fault
        assert fault.endswith("or put the data in a store (s3://)")
    else:
        assert fault == ""


def test_a_folder_of_the_drivers_own_is_told_by_its_token(data: Path) -> None:
    with shared_token(str(data / "runs" / "new")) as token:
        assert token is not None
        assert Path(token.path).parent == data
        places = JobPlaces({"output": (token,)})
        assert fault_of(probe_node(places), node_versions()) == ""
        Path(token.path).unlink()  # another machine's folder of this name
        assert "output: " in fault_of(probe_node(places), node_versions())
    assert sorted(path.name for path in data.iterdir()) == ["images", "made.json"]


def test_other_versions_are_named() -> None:
    report, here = probe_node(JobPlaces()), node_versions()
    assert {"lapilli.data", "lapilli.train", "pyarrow", "ray"} <= here.keys()
    other = replace(report, versions={**here, "pyarrow": "1.0"})
    assert f"pyarrow 1.0 there, {here['pyarrow']} here; install the same" in fault_of(other, here)
    other = replace(report, versions={**here, "lapilli.data": "0123456789ab"})
    assert "lapilli.data 0123456789ab there" in fault_of(other, here)
    assert same_version("2.13.0+cpu", "2.13.0+cu130")
    assert same_version("not installed", "2.13.0")
    assert not same_version("2.13.0", "2.13.1")


def test_a_node_without_lapilli_is_one_line() -> None:
    error = RuntimeError("ray::probe_node()\nModuleNotFoundError: No module named 'lapilli'")
    assert module._why(error).startswith("module lapilli is missing there; install lapilli")  # pyright: ignore[reportPrivateUsage]


def test_stores_are_tried_before_the_work_and_left_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    check_places(places_of({}, {"output": f"file://{tmp_path}/store"}), PoolConfig())
    assert not list((tmp_path / "store").iterdir())
    places = places_of({}, {"checkpoint.upload": "file:///proc/none"})
    with pytest.raises(DataError, match=r"^checkpoint.upload: file:///proc/none/.probe-\w+: "):
        check_places(places, PoolConfig())


def test_one_machine_pays_nothing_noticeable(data: Path) -> None:
    start = time.process_time()
    check_places(places_of({"root": str(data)}, {"output": str(data)}), PoolConfig(), str(data))
    assert time.process_time() - start < 0.3
    assert Seen(str(data), -1) in places_of({"root": str(data)}, {}).paths["root"]


def test_a_store_that_loses_what_it_took_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemotePath, "put", lambda path, source: None)
    with pytest.raises(DataError, match="an object that was just stored is not there"):
        store_seconds(f"file://{tmp_path}/store", writes=True)
