"""Save fragments by torch's distributed checkpoint: who writes what, and when all is written.

Each worker writes one part. Rank 0 finishes the checkpoint when every worker has told that its part
is on the disk; a worker that fails is told to all of them.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lapilli.train.checkpoint.parts import part_name, write_part
from lapilli.train.checkpoint.places import Places
from lapilli.train.checkpoint.staging import StagedFragment
from lapilli.train.engine.fragments import this_rank
from lapilli.train.run_folder.checkpoint_state import CheckpointFile

__all__ = ["save_pieces"]

Files = Mapping[str, CheckpointFile]


def save_pieces(
    pieces: Sequence[StagedFragment],
    sizes: Mapping[str, int],
    folder: Path,
    finish: Callable[[Files], None],
    group: dist.ProcessGroup | None = None,
    places: Places | None = None,
) -> None:
    """Write every worker's pieces into a folder, then let rank 0 `finish`. Collective.

    Args:
        pieces: This worker's.
        sizes: Numbers of the whole flat tensors, by key.
        folder: A new folder, which the leader of each place makes.
        finish: Called on rank 0 with size and checksum of each file.
        group: The workers; None for all of them.
        places: Who sees the same folder; None where all workers do.

    Raises:
        Exception: What a worker raised first, by rank, on every worker.
    """
    # of a worker that is alone, as it is in tests
    warnings.filterwarnings("ignore", r"torch\.distributed is disabled", UserWarning)
    try:
        save(
            {},
            storage_writer=_PartWriter(folder, finish, places or Places(this_rank()[0])),
            planner=_PiecePlanner(pieces, sizes),
            process_group=group,
        )
    except CheckpointException as failed:
        raise next(error for _, (error, _) in sorted(failed.failures.items())) from None


class _PiecePlanner(SavePlanner):
    """Pieces as shards of flat tensors, with their global offsets."""

    def __init__(self, pieces: Sequence[StagedFragment], sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._pieces = {_index(piece): piece for piece in pieces}

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Nothing: the pieces are given."""

    def create_local_plan(self) -> SavePlan:
        """This worker's pieces."""
        return SavePlan([self._item(index, piece) for index, piece in self._pieces.items()])

    def _item(self, index: MetadataIndex, piece: StagedFragment) -> WriteItem:
        start, length = torch.Size([piece.start]), torch.Size([len(piece.numbers)])
        whole = torch.Size([self._sizes[piece.key]])
        properties = TensorProperties(dtype=torch.float32)
        data = TensorWriteData(ChunkStorageMetadata(start, length), properties, whole)
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """All workers' pieces; together they are every number once."""
        plans, metadata = create_default_global_save_plan(all_plans)
        held = dict.fromkeys(self._sizes, 0)
        for plan in plans:
            for item in plan.items:
                assert item.tensor_data is not None
                held[item.index.fqn] += item.tensor_data.chunk.sizes[0]
        if wrong := [key for key, numbers in self._sizes.items() if held[key] != numbers]:
            raise RuntimeError(f"{wrong[0]}: workers hold {held[wrong[0]]} numbers of it")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """A piece's numbers."""
        return self.piece(write_item).numbers

    def piece(self, item: WriteItem) -> StagedFragment:
        """What an item of the plan writes."""
        return self._pieces[MetadataIndex(item.index.fqn, item.index.offset)]


def _index(piece: StagedFragment) -> MetadataIndex:
    return MetadataIndex(piece.key, torch.Size([piece.start]))


class _PartWriter(StorageWriter):
    """One file a worker."""

    def __init__(self, folder: Path, finish: Callable[[Files], None], places: Places) -> None:
        self._folder = folder
        self._finish = finish
        self._places = places

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: all is given."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder, before anyone writes: all plans are gathered first."""
        if self._places.is_leader:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this worker's part."""
        assert isinstance(planner, _PiecePlanner)
        done: Future[list[WriteResult]] = Future()
        results = list[WriteResult]()
        if plan.items:
            name = part_name(*this_rank())
            file = write_part(self._folder / name, [planner.piece(item) for item in plan.items])
            results.append(WriteResult(plan.items[0].index, file.bytes, {name: file}))
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Hand over what was written, on rank 0."""
        files: dict[str, CheckpointFile] = {}
        for result in results:
            for written in result:
                files.update(written.storage_data)
        self._finish(files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether a place can be written to."""
        return True
