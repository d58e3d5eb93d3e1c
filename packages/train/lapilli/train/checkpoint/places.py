"""Find out which workers see the same folder of a run."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

__all__ = ["Places", "find_places"]


@dataclass(frozen=True)
class Places:
    """The folders that a run's workers write to under one path.

    Attributes:
        rank: This worker.
        leaders: The lowest rank of each folder: one rank where all see the same one, one a node
            where each has a disk of its own.
        leader: That of this worker's folder.
    """

    rank: int = 0
    leaders: tuple[int, ...] = (0,)
    leader: int = 0

    @property
    def is_leader(self) -> bool:
        """Whether this worker makes and finishes folders where it is."""
        return self.rank == self.leader

    @property
    def is_shared(self) -> bool:
        """Whether all workers see one folder."""
        return len(self.leaders) == 1


def find_places(run: Path) -> Places:
    """Group the workers by what they see, in as many rounds as there are folders. Collective.

    In a round the lowest rank that belongs nowhere yet writes a file; whoever sees it shares its
    folder.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Places()
    rank, workers = dist.get_rank(), dist.get_world_size()
    name: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    leaders = dict[int, int]()  # by rank
    while len(leaders) < workers:
        leader = min(set(range(workers)) - leaders.keys())
        mark = run / f".place-{name[0]}-{leader}"
        if rank == leader:
            run.mkdir(parents=True, exist_ok=True)
            mark.touch()
        dist.barrier()
        seen: list[Any] = [None] * workers
        dist.all_gather_object(seen, rank not in leaders and mark.exists())
        if rank == leader:
            mark.unlink()
        leaders |= {one: leader for one, sees in enumerate(seen) if sees}
    return Places(rank, tuple(sorted({*leaders.values()})), leaders[rank])
