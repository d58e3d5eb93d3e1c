"""A dataset of LLaVA-1.5's size: what a process that opens it adds to its memory and its files."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import psutil
import pytest

from lapilli.data.dataset.dataset import Dataset, open_dataset
from pipelines.benchmarks.material.large import RECORDS, write_large

SHARDS = 200
MOST_BYTES = 300 * 10**6


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "dataset"
    return write_large(path, size=32, shards=SHARDS, per_shard=4, stubs=4000)


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
