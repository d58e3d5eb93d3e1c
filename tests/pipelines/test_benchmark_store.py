"""The store that builds are measured with: each call is counted, and comes as late as is asked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lapilli.data.io.filesystems import open_storage
from pipelines.benchmarks.store_build.delayed_store import KEY, SECRET, delayed_store
from pipelines.benchmarks.store_build.measured import StoreTopicConfig, make_inputs, store_build
from pipelines.cli.command import UsageError


def test_calls_and_bytes_are_counted_and_delayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with delayed_store(tmp_path, 0.2) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        open_storage.cache_clear()
        files = open_storage("s3")
        with files.open("bucket/a", "wb") as file:
            file.write(b"x" * 1000)
        assert store.take() == {"PUT": 1, "read": 0, "written": 1000}
        started = time.monotonic()
        assert files.cat_file("bucket/a") == b"x" * 1000
        assert time.monotonic() - started >= 0.2
        assert store.take() == {"GET": 1, "read": 1000, "written": 0}
        assert [one["name"] for one in files.ls("bucket", detail=True)] == ["bucket/a"]
        files.rm_file("bucket/a")
        counts = store.take()
        assert {name: n for name, n in counts.items() if name.isupper()} == {"GET": 1, "POST": 1}
    open_storage.cache_clear()


def test_a_delay_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="delays"):
        StoreTopicConfig(delays=(-1.0,))


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_two_nodes_build_from_the_store(tmp_path: Path) -> None:
    made = store_build(make_inputs(tmp_path, 24, 32, 6 * 32 * 32 * 3), 0.0, nodes=2)
    assert (made.images, made.heads) == (24, 3)
    assert made.shards >= 5
    assert 24 <= made.gets <= 24 + 20 + 2 * made.shards
