"""How often a build asks a store, counted by a proxy in front of a real S3 server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output, RemotePath
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import Task
from lapilli.data.shards.manifest import Manifest
from lapilli.data.sources.root_address import with_root_address
from tests.factories import build_config, make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve, use_endpoint

TOKEN_CALLS = 1  # to open one of the token shards that hold the first 1,000 records


class Counted:
    """A store whose calls are told apart: the driver's, and those made while a task runs."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen
        self.of_tasks: list[str] = []

    def runner(self, tasks: list[Task], output: Output, workers: int) -> Iterator[ShardFacts]:
        """Run the tasks in this process, and put their calls aside."""
        for task in tasks:
            before = len(self.seen)
            facts = [*run_here([task], output, workers)]
            self.of_tasks += self.seen[before:]
            del self.seen[before:]
            yield from facts

    def take(self) -> tuple[list[str], list[str]]:
        """The driver's calls and the tasks' since the last time."""
        found = [*self.seen], [*self.of_tasks]
        self.seen.clear()
        self.of_tasks.clear()
        return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Counted, BuildConfig]]:
    """A bucket with images, and what builds a dataset into it."""
    folder = tmp_path_factory.mktemp("store")
    mixture = make_mixture(folder / "bucket" / "photos", images=30, text_only=4)
    tokenizer = make_tokenizer(folder / "tokenizer")
    config = build_config(mixture, folder / "local", tokenizer, records_per_shard=4)
    (folder / "bucket" / "out").mkdir()
    with serve(folder / "bucket", remembers="1h") as port:
        counted = Counted(seen := [])
        with failing_proxy(port, lambda _: False, seen=seen) as (proxy, _), use_endpoint(proxy):
            yield counted, config


def built(counted: Counted, config: BuildConfig, **changes: Any) -> Manifest:
    return build(plan_build(replace(config, **changes)), runner=counted.runner).manifest


def test_the_driver_asks_for_no_shard_that_was_made(store: tuple[Counted, BuildConfig]) -> None:
    """What it wants of a shard comes with the task's result; of new shards none is asked for."""
    counted, config = store
    calls: list[tuple[int, int]] = []
    tokens = 0
    for name, most in (("few", 64), ("many", 4)):
        output = f"s3://out/{name}"
        manifest = built(counted, config, output=output, records_per_shard=most,
                         shard_bytes=most * 32 * 32 * 3)  # fmt: skip
        mine, tasks = counted.take()
        calls.append((len(manifest.shards()), len(mine)))
        shards = [shard.path for shard in manifest.shards()]
        of_shards = [call for call in mine if any(path in call for path in shards)]
        # The first token shard is looked into, to compare the copy of the tokenizer.
        assert {call.split(" ")[1].split("/")[3] for call in of_shards} == {"tokens"}
        assert not [call for call in of_shards if ".json" in call]
        tokens = len(manifest.tokens)
        puts = [call for call in tasks if call.startswith("PUT")]
        assert len(puts) == 2 * len(shards)
    (few, first), (many, second) = calls
    assert many > few + 10

    assert second - first <= TOKEN_CALLS * tokens, calls


def test_a_run_with_nothing_to_do_looks_at_no_shard(store: tuple[Counted, BuildConfig]) -> None:
    counted, config = store
    changes = {"output": "s3://out/again", "records_per_shard": 4}
    first = built(counted, config, **changes)
    counted.take()
    report = build(plan_build(replace(config, **changes)), runner=counted.runner)
    mine, tasks = counted.take()
    assert (report.manifest, report.shards_built, tasks) == (first, 0, [])
    assert report.shards_reused == len(first.shards())
    assert not [call for call in mine if any(s.path in call for s in first.shards())]


def test_a_run_with_nothing_to_do_lists_each_place_once(
    store: tuple[Counted, BuildConfig],
) -> None:
    """However many shards there are, it makes the same few calls."""
    counted, config = store
    config = with_root_address(replace(config, root="s3://photos", output="s3://out/listed"))
    first = built(counted, config)
    assert len(first.shards()) >= 19
    counted.take()
    assert build(plan_build(config), runner=counted.runner).shards_built == 0
    mine, _ = counted.take()
    listed = [call for call in mine if "list-type=2" in call]
    folders = ("", "images", "images/0", "images/1", "images/2")
    assert len({*listed}) == len(listed) == len(folders) + 1
    others = [call.rpartition(" ")[0] for call in mine if call not in listed]
    of_output = Counter(call for call in others if not call.endswith("/photos/mixture.json"))
    read = ("manifest.json", "inputs.arrow", "plan.json", "config.json")
    assert of_output == {
        **{f"GET /out/listed/{name}": 1 for name in read},
        "GET /out/listed/.lock": 3, "PUT /out/listed/.lock": 1, "POST /out?delete": 1,
    }  # fmt: skip
    assert len(others) <= of_output.total() + 5  # the annotations


def test_a_shard_that_is_gone_is_made_again(store: tuple[Counted, BuildConfig]) -> None:
    counted, config = store
    first = built(counted, config, output="s3://out/gone")
    (RemotePath("s3://out/gone") / first.shards()[-1].path).unlink()
    report = build(plan_build(replace(config, output="s3://out/gone")), runner=counted.runner)
    assert (report.shards_built, report.manifest) == (1, first)


def test_an_image_is_read_once_a_view(store: tuple[Counted, BuildConfig], tmp_path: Path) -> None:
    counted, config = store
    root = tmp_path / "root"
    root.mkdir()
    elements = json.loads((Path(config.root) / "mixture.json").read_text(encoding="utf-8"))
    (root / "mixture.json").write_text(json.dumps(elements), encoding="utf-8")
    folder = config.sources[0].images
    source = replace(config.sources[0], images=f"s3://photos/{folder}")
    remote = replace(config, root=str(root), sources=[source], output=str(tmp_path / "out"))
    plan = plan_build(remote)
    counted.take()
    build(plan, runner=counted.runner)
    _, tasks = counted.take()
    calls = Counter(call.rpartition(" ")[0] for call in tasks)  # but for the caller
    assert len(plan.image_ids) >= 24
    assert calls == Counter(
        {f"GET /{image.removeprefix('s3://')}": len(plan.views) for image in plan.image_ids}
    )
