"""What a worker brings to the driver's folder: folders for nodes, and calls without Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapilli.train.checkpoint.store import bring_records, store_records
from lapilli.train.run_folder.generations import Generation, read_generations, write_generations
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.metrics_file import MetricsFile, StepMetrics, read_metrics
from lapilli.train.run_folder.relay import Mailbox, Relay
from lapilli.train.run_folder.restarts import read_starts, record_start
from lapilli.train.run_folder.sample_losses import SampleLoss, read_worst, write_worst


def calls(driver: Path) -> Callable[..., Any]:
    """The driver's end, without Ray."""
    mailbox = Mailbox(str(driver))
    return lambda name, *given: getattr(mailbox, name)(*given)


def life(node: Path, driver: Path, start: int, end: int) -> None:
    """A first worker takes steps on a node; it is lost before anything goes to a store."""
    node.mkdir(exist_ok=True)
    with Relay(node, calls(driver), is_first=True):
        record_start(node, start, 2)
        metrics = MetricsFile(node, start)
        for step in range(start, end):
            metrics.write(
                StepMetrics(step=step, loss=1.0, samples=1, trained_tokens=1, seconds=2.0,
                            wait_seconds=0.0)
            )  # fmt: skip
        metrics.close()
        asked = Generation("a/1", "why", "so", "no", step=end - 1, index=0)
        write_generations(node, [*read_generations(node), asked])
        write_worst(node, [*read_worst(node), SampleLoss(end - 1, end, "a/1", True, 3.0, 1)])


def test_a_first_worker_on_another_node_goes_on_with_the_drivers_records(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "facts.json").write_text("{}")
    then = time.time() - 100
    os.utime(driver / "facts.json", (then, then))  # when the command was started
    life(tmp_path / "one", driver, 0, 12)
    then = time.time() - 60
    os.utime(driver / "metrics.jsonl", (then, then))  # as long as it took to find the loss
    life(tmp_path / "two", driver, 10, 14)
    life(tmp_path / "one", driver, 13, 20)  # its own records are of the life before the last
    for folder in (driver, tmp_path / "one"):
        assert [row.step for row in read_metrics(folder)] == list(range(20))
        assert [one.step for one in read_generations(folder)] == [11, 13, 19]
        assert [one.step for one in read_worst(folder)] == [11, 13, 19]
        first, second, third = read_starts(folder)
        assert (first.step, first.reason) == (0, "command")
        assert (second.step, second.reason, second.repeated) == (10, "restart", 2)
        assert 60 <= second.seconds < 90
        assert 100 <= first.seconds < 130
        assert (third.step, third.repeated) == (13, 1)


def test_of_a_store_and_a_folder_the_later_life_is_kept(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    driver, other = tmp_path / "driver", tmp_path / "other"
    for folder in (driver, other):
        folder.mkdir()
        (folder / "facts.json").write_text("{}")
        (folder / "config.json").write_text("{}")
    life(tmp_path / "one", driver, 0, 4)
    note(driver, "first")
    store_records(driver, store)
    bring_records(other, store)  # another machine goes on
    assert (other / "notes.txt").read_text() == "first\n"
    life(tmp_path / "two", other, 4, 8)
    note(other, "second")
    bring_records(other, store)  # killed before it stored anything, started again
    assert [start.step for start in read_starts(other)] == [0, 4]
    assert (other / "notes.txt").read_text() == "first\nsecond\n"
    store_records(other, store)
    store_records(driver, store)  # of an earlier life: what is there stays
    bring_records(driver, store)
    for folder in (driver, tmp_path / "store"):
        assert [start.step for start in read_starts(folder)] == [0, 4]
        assert [row.step for row in read_metrics(folder)] == list(range(8))


def test_what_changes_is_brought_and_nothing_of_an_earlier_life(tmp_path: Path) -> None:
    worker, driver = tmp_path / "worker", tmp_path / "driver"
    for folder in (worker, driver):
        folder.mkdir()
    note(worker, "of an earlier life")
    (worker / "metrics.jsonl").write_text("old\n")
    (worker / "worst.jsonl").write_text("old\n")
    (driver / "metrics.jsonl").write_text("of another worker\n")
    call = calls(driver)
    with Relay(worker, call) as relay:
        assert relay.is_needed()
        note(worker, "new")
    assert (driver / "notes.txt").read_text() == "new\n"
    assert (driver / "metrics.jsonl").read_text() == "of another worker\n"
    assert not (driver / "worst.jsonl").exists()
    with Relay(worker, call):
        with (worker / "metrics.jsonl").open("a") as file:
            file.write("appended\n")
        (worker / ".hidden").write_text("")
        (worker / "config.json").write_text("{}")
    assert (driver / "metrics.jsonl").read_text() == "old\nappended\n"
    assert sorted(path.name for path in driver.iterdir()) == ["metrics.jsonl", "notes.txt"]
    assert not Relay(driver, call).is_needed()
