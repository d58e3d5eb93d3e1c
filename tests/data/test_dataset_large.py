"""A dataset of LLaVA-1.5's size: what a process that opens it adds to its memory and its files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from lapilli.data.dataset.dataset import Dataset, open_dataset
from pipelines.benchmarks.material.large import RECORDS, write_large

SHARDS = 200
MOST_BYTES = 300 * 10**6


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("large") / "dataset"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LAPILLI_CACHE", str(path.with_name("cache")))
        yield write_large(path, size=32, shards=SHARDS, per_shard=4, stubs=4000)


def opened(path: Path) -> Dataset:
    return open_dataset(path, view="wide", image_tokens=576, max_length=4096)


def test_opening_and_reading_adds_little_memory_and_no_open_file(large: Path) -> None:
    here = psutil.Process()
    before, files = here.memory_info(), here.num_fds()
    dataset = opened(large)
    assert len(dataset) + dataset.too_long == RECORDS
    assert dataset.too_long > 0
    seen = {dataset.sample(int(i)).sample_id for i in range(0, len(dataset), 97)}
    assert len(seen) == len(range(0, len(dataset), 97))
    after = here.memory_info()
    shared = after.shared - before.shared  # pages of the maps, which belong to the page cache
    assert after.rss - before.rss - shared < MOST_BYTES
    assert here.num_fds() == files


def test_a_dataset_is_sent_to_a_process_without_its_maps(large: Path) -> None:
    dataset = opened(large)
    unread = len(pickle.dumps(dataset))
    for index in range(0, len(dataset), 1000):
        dataset.sample(index)
    sent = pickle.dumps(dataset)
    assert len(sent) == unread < 40 * RECORDS
    found: Dataset = pickle.loads(sent)
    np.testing.assert_array_equal(found.sample(7).input_ids, dataset.sample(7).input_ids)


# Of a process of its own, after its imports; what a file stands behind is everybody's.
RANK = """
import json, pandas, sys  # pyarrow loads pandas when it first gives an array to numpy
from pathlib import Path
import pyarrow.compute
from lapilli.data.dataset.dataset import open_dataset

def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

before = private()
dataset = open_dataset(
    sys.argv[1], view="wide", image_tokens=576, max_length=2048, truncate=sys.argv[2] == "cut"
)
seen = [int(of.sum()) for of in (dataset.lengths, dataset.num_trained, dataset.num_images)]
seen += [int(dataset.rows[-1]), dataset.too_long, dataset.num_cut]
seen.append(sum(int(of.sum()) for of in dataset.places[:2]))
print(json.dumps([private() - before, len(dataset), seen]))
"""


@pytest.mark.parametrize("way", ["left out", "cut"])
def test_a_node_keeps_the_columns_once_and_a_rank_none_of_them(large: Path, way: str) -> None:
    def rank() -> tuple[int, int, list[int]]:
        command = [sys.executable, "-c", RANK, str(large), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return tuple(json.loads(done.stdout))

    _, samples, expected = rank()
    private, again, seen = rank()
    assert (samples, expected) == (again, seen)
    assert private < 8 * samples  # what a single column of int64 takes
