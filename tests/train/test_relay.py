"""What a worker brings to the driver's folder: two folders, and calls without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.relay import Mailbox, Relay


def test_what_changes_is_brought_and_nothing_of_an_earlier_life(tmp_path: Path) -> None:
    worker, driver = tmp_path / "worker", tmp_path / "driver"
    for folder in (worker, driver):
        folder.mkdir()
    note(worker, "of an earlier life")
    (worker / "metrics.jsonl").write_text("old\n")
    (worker / "worst.jsonl").write_text("old\n")
    (driver / "metrics.jsonl").write_text("of another worker\n")
    mailbox = Mailbox(str(driver))

    def call(name: str, *given: Any) -> Any:
        return getattr(mailbox, name)(*given)

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
