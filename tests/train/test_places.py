"""Which workers see the same folder of a run: processes on gloo, with folders in common or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from lapilli.train.checkpoint.places import Places, find_places
from tests.train.ready_processes import spawn


def look(rank: int, folder: str, places: list[str]) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=len(places))
    found = find_places(Path(folder) / places[rank])
    told = json.dumps([found.leader, found.leaders, found.is_leader, found.is_shared])
    (Path(folder) / f"rank-{rank}.json").write_text(told)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("places", "leaders"), [(["a", "a", "a"], [0, 0, 0]), (["a", "b", "a"], [0, 1, 0])]
)
def test_the_lowest_rank_of_each_folder_leads_there(
    tmp_path: Path, places: list[str], leaders: list[int]
) -> None:
    spawn(look, (str(tmp_path), places), nprocs=len(places))
    for rank, leader in enumerate(leaders):
        told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        everyone = sorted({*leaders})
        assert told == [leader, everyone, rank == leader, len(everyone) == 1]
    for place in places:
        assert list((tmp_path / place).iterdir()) == []


def test_a_worker_alone_leads() -> None:
    assert find_places(Path("nowhere")) == Places()
