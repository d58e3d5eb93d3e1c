"""What a run on a cluster takes, by calculation: known values, directions, counts of a build."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.planning.plan import plan_build
from pipelines.benchmarks import harness
from pipelines.benchmarks.__main__ import main
from pipelines.benchmarks.scaling.inputs import (
    DriverInputs,
    NodeInputs,
    ScalingConfig,
    SharedDiskInputs,
    StoreInputs,
    measured_per_core,
)
from pipelines.benchmarks.scaling.measured import (
    LocalBuild,
    MeasuredConfig,
    StoreCosts,
    calibrated,
)
from pipelines.benchmarks.scaling.model import (
    PLACES,
    Prediction,
    Work,
    calls,
    driver_memory,
    predict,
    temporary_disk,
)
from pipelines.benchmarks.sides.cluster_builds import BuildJob, make_inputs
from pipelines.benchmarks.sides.slow_store import slow_store
from pipelines.cli.command import UsageError
from tests.object_store import use_endpoint

# Round figures for a hand: 10 images a shard, 20 ms of the processor an image and its record.
NODE = NodeInputs(
    cores=1, per_core=100, tokens_per_core=100, gap_seconds=0, disk_mb=0.5, disk_read_mb=1,
    network_gbit=8e-3, shard_images=10, image_bytes=1000,
)  # fmt: skip
STORE = StoreInputs(
    latency_ms=100, requests=50, prefixes=2, image_calls=2, in_flight=4, begin_calls=3,
    part_mb=0.005, store_calls=1, upload_mb=0.1, plan_calls=4, page_keys=20, listings=3,
    pages_at_once=2, build_calls=6, client_ms=1, client_ms_per_mb=1000, fixed_seconds=0.5,
)  # fmt: skip
SHARED = SharedDiskInputs(
    mb=0.002, operations=20, latency_ms=100, plan_operations=2, image_operations=3, in_flight=5
)
DRIVER = DriverInputs(rows=10, task_rows=0, tasks=1, start_seconds=5, finish_shard_ms=100)
BY_HAND = ScalingConfig(
    node=NODE, store=STORE, shared_disk=SHARED, driver=DRIVER, source_kb=0.25, save=False
)


def predicted(place: Any, **changes: Any) -> Prediction:
    """Of 9 shards, a record an image, on two nodes of a core: tasks of 2, 1, 1, ... shards."""
    work = Work(nodes=2, images=90, records=90, place=place)
    return predict(replace(BY_HAND, **changes), work)


def test_on_disks_of_their_own() -> None:
    found = predicted("disk")
    assert found.driver == pytest.approx(
        {"start": 5, "planning": 9, "listing": 0, "finishing": 0.9}
    )
    # 0.2 s a shard, 5 shards on one of the cores; 8 tasks; 2 ms written and 0.25 ms read an image
    assert found.parts == pytest.approx({"processors": 1.0, "tasks": 8, "disks": 90 * 2.25e-3 / 2})
    assert found.seconds == pytest.approx(5 + 9 + 0.9 + 8)
    assert found.limit == "planning"


def test_in_a_store() -> None:
    found = predicted("store")
    # 4 calls, then 3 listings of 5 pages, two pages at a time
    assert found.driver["listing"] == pytest.approx(0.1 * (4 + 15 / 2))
    assert found.driver["finishing"] == pytest.approx(0.9 + 0.1 * 6 + 0.5)
    # An image: 20 ms, 2 of its calls and 1 of what is stored, behind 2 calls of 4 under way, 50 ms.
    # A shard: 5 calls before the first image and 10 images, then 3 calls and 0.1 s of an upload,
    # beside the next one where a task has two.
    alone, pair = (0.5 + 0.5) + 0.4, 2 * (0.5 + 0.5) + 0.4
    assert found.parts["latency"] == pytest.approx(pair + 3 * alone)
    assert found.parts["requests"] == pytest.approx(90 * 2 / (50 * 2))
    assert found.parts["network"] == pytest.approx(90 * 1250 / 2e6)
    work = Work(nodes=2, images=90, records=90, place="store")
    assert calls(BY_HAND, work) == 4 + 15 + 6 + 90 * 2 + 9 * (3 + 3)
    quick = replace(BY_HAND, store=replace(STORE, latency_ms=0.1, client_ms=0, client_ms_per_mb=0))
    parts = predict(quick, work).parts
    assert "processors" in parts
    assert parts["processors"] == pytest.approx(5 * (0.2 + 5e-4) + 4 * (0.1 + 3e-4))


def test_on_a_machine_that_is_the_store_too() -> None:
    node = replace(NODE, machine_cores=2)
    store = replace(STORE, server_ms=3, server_ms_per_mb=2000)
    # 23 ms of the worker an image, 2 x 3 and 2 of the store
    assert predicted("store", node=node, store=store).parts["machine"] == pytest.approx(
        90 * (0.023 + 0.008) / 2
    )
    assert "machine" not in predicted("store", store=store).parts


def test_on_a_disk_that_all_share() -> None:
    found = predicted("shared disk")
    assert found.driver["listing"] == pytest.approx(90 * 2 * 0.1)
    assert found.parts["bandwidth"] == pytest.approx(90 * 1250 / 2000)
    assert found.parts["operations"] == pytest.approx(90 * 3 / 20)
    # 3 operations of 100 ms, 5 images at a time: 60 ms an image, not 20
    assert found.parts["latency"] == pytest.approx(2 * 0.9 + 0.3 + 3 * 1.2)


def test_planning_by_tasks_shrinks_with_cores() -> None:
    driver = replace(DRIVER, rows=100, task_rows=5)
    assert predicted("disk", driver=driver).driver["planning"] == pytest.approx(0.9 + 90 / (5 * 2))


def test_what_the_driver_holds() -> None:
    driver = replace(
        DRIVER, base_mb=1, record_bytes=100, facts_bytes=20, text_bytes=50, place_bytes=5
    )
    config = replace(BY_HAND, driver=driver)
    assert driver_memory(config, 1000, in_store=False) == 1e6 + 100_000
    assert driver_memory(config, 1000, in_store=True) == 1e6 + 120_000
    assert temporary_disk(config, 1000) == (50_000, 55_000)


# What the driver starts is not in it: smaller tasks for more cores are more tasks.
AT_ONCE = ScalingConfig(
    node=NodeInputs(per_core=300, network_gbit=1_000),
    store=StoreInputs(requests=1e9),
    driver=DriverInputs(task_rows=5_000, tasks=1e9),
)
WORKS = [*product((20_000, 558_128, 5_000_000), PLACES)]


@pytest.mark.parametrize(("images", "place"), WORKS)
def test_more_nodes_are_never_slower(images: int, place: Any) -> None:
    """But for what the tasks' sizes round: the last of them may end a shard later."""
    a_shard = AT_ONCE.node.shard_images * (1 / 300 + 1 / 2_600) + 1.0
    seconds = [
        predict(AT_ONCE, Work(nodes=n, images=images, records=images, place=place)).seconds
        for n in (1, 2, 4, 8, 16, 32, 100)
    ]
    assert all(later <= earlier + a_shard for earlier, later in pairwise(seconds)), seconds
    assert seconds[-1] < seconds[0]


@pytest.mark.parametrize(
    ("group", "name", "values"),
    [
        ("store", "latency_ms", (0, 1, 20, 100, 300)),
        ("store", "image_calls", (1, 2, 3)),
        ("store", "begin_calls", (0, 5, 50)),
        ("store", "build_calls", (0, 73, 5_000)),
        ("shared_disk", "latency_ms", (0, 0.5, 5)),
        ("shared_disk", "image_operations", (1, 3, 9)),
        ("driver", "finish_shard_ms", (0, 1, 100)),
    ],
)
def test_more_to_wait_for_is_never_faster(group: str, name: str, values: tuple[float, ...]) -> None:
    place: Any = "store" if group != "shared_disk" else "shared disk"
    work = Work(nodes=4, images=558_128, records=558_128, place=place)
    seconds = [
        predict(
            replace(AT_ONCE, **{group: replace(getattr(AT_ONCE, group), **{name: value})}), work
        ).seconds
        for value in values
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


@pytest.mark.parametrize(
    ("group", "name", "values"),
    [
        ("node", "per_core", (10, 300, 3_000)),
        ("node", "network_gbit", (0.1, 1, 100)),
        ("store", "in_flight", (1, 16, 64)),
        ("store", "pages_at_once", (1, 8, 64)),
        ("store", "requests", (1_000, 5_500, 20_000)),
        ("shared_disk", "mb", (100, 1_000, 9_000)),
        ("shared_disk", "operations", (100, 2_000, 9_000)),
        ("driver", "rows", (1_000, 10_000)),
    ],
)
def test_more_of_anything_is_never_slower(group: str, name: str, values: tuple[float, ...]) -> None:
    place: Any = "shared disk" if group == "shared_disk" else "store"
    work = Work(nodes=4, images=558_128, records=558_128, place=place)
    seconds = [
        predict(
            replace(AT_ONCE, **{group: replace(getattr(AT_ONCE, group), **{name: value})}), work
        ).seconds
        for value in values
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]


# ---- what is counted, and what a measurement takes from it ---------------------------------------


def test_a_build_asks_a_store_as_often_as_the_inputs_say(tmp_path: Path) -> None:
    """Counted at a real server: calls of planning, of workers for images, of all that is left."""
    served, tokenizer = tmp_path / "served", tmp_path / "tokenizer"
    make_inputs(served / "raw", tokenizer, images=30, distinct=2)
    (served / "out").mkdir()
    job = BuildJob(
        root="s3://raw", output="s3://out/built", tokenizer=str(tokenizer), nodes=1, size=24,
        per_shard=10,
    )  # fmt: skip
    with slow_store(served, 0) as store, use_endpoint(store.port):
        plan = plan_build(job.config)
        planning = store.calls()
        build(plan, runner=run_here)
        lines = store.log.read_text(encoding="utf-8").splitlines()
    given = StoreInputs()
    of_images = [line for line in lines[planning:] if "/raw/photos/" in line]
    assert len(of_images) == 30 * given.image_calls
    assert planning == pytest.approx(given.plan_calls + given.listings, abs=2)
    # This runner has no task file, whose two calls a shard are Ray's workers'.
    shards = [line for line in lines if re.search(r"/(images|tokens)/\w+/\d+-\w+\.arrow", line)]
    puts = [line for line in shards if line.startswith("PUT")]
    assert len(puts) == 2 * 4
    driver = len(lines) - planning - len(of_images) - len(puts)
    assert driver == pytest.approx(given.build_calls, rel=0.2)


def test_a_call_waits_for_the_delay_once(tmp_path: Path) -> None:
    """Whatever the body's size: that of an upload comes in many pieces."""
    import time

    from lapilli.data.io.remote_path import RemotePath

    (tmp_path / "bucket").mkdir()
    with slow_store(tmp_path, 150) as store, use_endpoint(store.port):
        place, data = RemotePath("s3://bucket/one"), os.urandom(4 << 20)
        started = time.perf_counter()
        place.write_bytes(data)
        assert time.perf_counter() - started > 0.15 * store.calls()
        assert store.calls() == 1
        assert place.read_bytes() == data
        assert store.processor_seconds() > 0


def test_the_inputs_of_this_machine_are_those_of_the_local_build() -> None:
    config = MeasuredConfig(images=40, per_shard=10, size=10, nodes=(1,), delays=(0,))
    local = LocalBuild(plan_seconds=1, first_seconds=6, shards_seconds=9, finish_seconds=3)
    costs = StoreCosts(
        image_calls=2, call_seconds=0.004, client_seconds=0, client_seconds_per_mb=0,
        server_seconds=0, server_seconds_per_mb=0, upload_mb=1e9,
    )  # fmt: skip
    found = calibrated(config, local, costs, source_kb=1)
    # three shards of four in 3 s, so 4 s of work and 5 before it
    assert found.node.per_core == pytest.approx(10)
    assert found.driver.start_seconds == pytest.approx(5)
    work = Work(nodes=1, images=40, records=40, place="disk")
    assert predict(found, work).driver["finishing"] == pytest.approx(3)
    assert predict(found, work).seconds == pytest.approx(13)
    with pytest.raises(UsageError, match=r"images: 40; .*too short for a rate; give --images more"):
        calibrated(config, replace(local, shards_seconds=6), costs, source_kb=1)


# ---- the topic -----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rows go in these tests."""
    folder, add_row = tmp_path / "results", harness.add_row
    folder.mkdir()
    monkeypatch.setattr(
        harness, "add_row", lambda topic, row, where=folder: add_row(topic, row, where)
    )
    return folder


def test_each_case_and_what_the_driver_holds_have_a_row(results: Path) -> None:
    newest = {"side": "lapilli, Ray Data", "images_per_second": 500, "workers": 4}
    harness.add_row("build", newest | {"images_per_second": 1, "workers": 1})
    harness.add_row("build", newest)
    assert measured_per_core(results / "build.csv") == 125
    assert main(["scaling", "--node.per_core=125", "--plot", str(results / "a.png")]) == 0
    with (results / "scaling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27
    assert {row["case"] for row in rows} == {
        f"{mixture} {nodes}x64" for mixture in ("558K", "665K", "100M") for nodes in (1, 16, 100)
    }
    with (results / "scaling_driver.csv").open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["665K", "100M", "1B"]
    assert (results / "a.png").stat().st_size > 10_000


def test_the_columns_of_the_kept_rows_are_those_of_new_ones(results: Path) -> None:
    assert main(["scaling", "--node.per_core=125"]) == 0
    for name in ("scaling", "scaling_driver"):
        kept, new = (
            next(csv.reader((folder / f"{name}.csv").open(newline="")))
            for folder in (harness.RESULTS, results)
        )
        assert kept == new


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scaling", "--node.cores=0"], "node.cores: 0; expected a number, more than 0"),
        (["scaling", "--store.latency_ms=-1"], "store.latency_ms: -1.0; expected a number, 0 or"),
        (["scaling", "--store.latency_ms=.nan"], "store.latency_ms: nan; expected a number, 0 or"),
        (["scaling", "--shared_disk.mb=.inf"], "shared_disk.mb: inf; expected a number, more"),
        (["scaling", "--source_kb=0"], "source_kb: 0.0; expected a number, more than 0"),
        (["scaling_measured", "--images=10"], "images: 10 in shards of 190; expected three"),
        (["scaling_measured", "--rounds=0"], "rounds: 0; expected 1 or more"),
        (["scaling_measured", "--nodes=[0]"], "nodes: [0]; expected 1 to "),
        (["scaling_measured", "--nodes=[999]"], "nodes: [999]; expected 1 to "),
        (["scaling_measured", "--delays=[-1]"], "delays: [-1.0]; expected ms, 0 or more"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        main(arguments)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
