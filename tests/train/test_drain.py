"""A node is drained, as a cloud does it before it takes a spot machine, and then killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.restarts import read_starts
from tests.factories import make_tokenizer
from tests.pipelines.builds import named_files
from tests.train.gang import train_together
from tests.train.small_run import disturbed_run


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_drained_node_is_left_and_nothing_changes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.drained", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    build, train = found["build"], found["train"]
    assert build["shards"] > 4
    assert build["on_lost"] == 1, "none is begun on a node that goes away"
    assert build["on_added"] >= 1, "the task that was stuck there is done elsewhere"
    assert named_files(tmp_path / "dataset") == named_files(tmp_path / "undisturbed")
    run = tmp_path / "run"
    saved = [int(path.name[5:]) for path in sorted((run / "checkpoints").iterdir())]
    first, again = read_starts(run)
    assert (first.reason, first.workers) == ("command", 2)
    assert (again.reason, again.workers) == ("restart", 2)
    assert saved == [again.step, train["steps"]], "by the notice alone, and at the end"
    assert again.step > 2, "the node was drained then"
    assert sum("a node is to be taken away" in line for line in train["said"]) == 1
    config = disturbed_run(tmp_path, "together")
    assert train_together(config) == [0, 0]
    rows, expected = read_metrics(run), read_metrics(Path(config.output))
    assert [row.step for row in rows] == [*range(train["steps"])]
    assert [(row.batch, row.loss) for row in rows] == [(row.batch, row.loss) for row in expected]
