"""Tasks through a file: each is the driver's own, or it is not unpickled."""

from __future__ import annotations

from pathlib import Path

import pytest

from lapilli.data.building.task_file import TASKS, read_task, write_tasks
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import Task
from tests.factories import build_config, make_mixture, make_tokenizer


def test_tasks_come_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=6, text_only=2)
    make_tokenizer(tmp_path / "tokenizer")
    plan = plan_build(build_config(mixture, tmp_path / "out", tmp_path / "tokenizer"))
    tasks: list[Task] = [*plan.token_tasks(), *plan.image_tasks()]
    places = write_tasks(tasks, tmp_path)
    assert [read_task(tmp_path, place) for place in places] == tasks
    file = tmp_path / places[0]["file"]
    assert places[0]["file"].startswith(TASKS)
    data = bytearray(file.read_bytes())
    data[places[1]["start"] + 5] ^= 1
    file.write_bytes(data)
    assert read_task(tmp_path, places[0]) == tasks[0]
    with pytest.raises(DataError, match=r"tasks-\w+.pickle: changed since this build wrote it"):
        read_task(tmp_path, places[1])
