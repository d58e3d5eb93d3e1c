"""Save a step whose loss is not finite or too high, so that it can be replayed.

`replay/step-00000012/` holds `step.json` (the step, what was seen, sample ids by rank and
micro-batch) and `rank-0.npz`, ... with the arrays of each rank's micro-batches.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypedDict
from zipfile import BadZipFile

import numpy as np
import torch.distributed as dist

from lapilli.data.batches.collate import Batch
from lapilli.data.io.atomic import write_json
from lapilli.data.io.typed_json import JsonError, Natural, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.record import excerpt
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.names import REPLAY, REPLAY_STEP, step_name
from lapilli.train.run_folder.settings import require_missing

__all__ = ["KeptStep", "is_wrong", "keep_step", "read_kept"]

ENOUGH = 10  # losses before a spike can be detected
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error)  # an npz
ARRAYS = (
    "input_ids", "position_ids", "segment_ids", "tree_ids", "branch_ids", "row_lengths",
    "merge_index", "pixels", "image_tokens", "predict_positions", "targets", "target_samples",
)  # fmt: skip


def is_wrong(
    loss: float, norm: float | None, recent: Iterable[float], spike_factor: float
) -> str | None:
    """Why a step is wrong; None if it is fine.

    Args:
        loss: The step's loss.
        norm: Norm of its gradient; None where nothing was reduced.
        recent: Losses of the steps before.
        spike_factor: Largest loss in medians of `recent`; 0 takes any.
    """
    if not math.isfinite(loss) or not math.isfinite(norm or 0.0):
        return "expected finite numbers; lower optim.lr"
    before = [*recent]
    if spike_factor and len(before) >= ENOUGH and loss > spike_factor * median(before):
        return (
            f"more than recovery.loss_spike_factor = {spike_factor:g} times {median(before):.4g}, "
            "the median before; lower optim.lr, or raise recovery.loss_spike_factor"
        )
    return None


@dataclass(frozen=True)
class KeptStep:
    """A step that was kept.

    Attributes:
        path: Its folder.
        step: Its number.
        loss: The loss that was seen.
        grad_norm: The gradient norm that was seen.
        global_tokens: Trained tokens of the global batch.
        sample_indices: Its samples, as the dataset counts them; -1 for empty slots.
        sample_ids: Their ids by rank and micro-batch.
    """

    path: Path
    step: int
    loss: float
    grad_norm: float | None
    global_tokens: int
    sample_indices: list[int]
    sample_ids: list[list[list[str]]]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.resolve().parents[1]

    def batches(self) -> list[list[Batch]]:
        """Micro-batches by rank.

        Raises:
            TrainError: A file that is missing, or holds something else.
        """
        return [self._rank(rank, micros) for rank, micros in enumerate(self.sample_ids)]

    def _rank(self, rank: int, micros: list[list[str]]) -> list[Batch]:
        file, found = self.path / f"rank-{rank}.npz", list[Batch]()
        try:
            with np.load(file, allow_pickle=False) as arrays:
                for micro, ids in enumerate(micros):
                    values: dict[str, Any] = {n: arrays[f"{micro}/{n}"] for n in ARRAYS}
                    images, targets, slots, has_trees = arrays[f"{micro}/counts"].tolist()
                    found.append(Batch(
                        **values, sample_ids=tuple(ids), num_images=images, num_targets=targets,
                        sample_slots=slots, has_trees=bool(has_trees),
                    ))  # fmt: skip
        except UNREADABLE as error:
            raise TrainError(
                f"replay: {file} cannot be read ({excerpt(str(error))}); the run keeps such a step "
                "whole, bring the folder back from a copy"
            ) from None
        return found


def keep_step(
    run: Path,
    step: int,
    seen: tuple[float, float | None],
    batches: Sequence[Batch],
    facts: tuple[int, Sequence[int]],
    place: tuple[int, int],
) -> Path:
    """Save a step. Collective: every rank writes its micro-batches, rank 0 the rest.

    Args:
        run: The run's folder.
        step: Its number.
        seen: Its loss and gradient norm.
        batches: This rank's micro-batches.
        facts: Trained tokens and sample indices of the global batch.
        place: Rank and world size.

    Returns:
        The folder.
    """
    rank, world_size = place
    path = run / REPLAY / step_name(step + 1)
    path.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{micro}/{name}": getattr(batch, name)
        for micro, batch in enumerate(batches)
        for name in ARRAYS
    }
    for micro, batch in enumerate(batches):
        counts = batch.num_images, batch.num_targets, batch.sample_slots, int(batch.has_trees)
        arrays[f"{micro}/counts"] = np.array(counts)
    np.savez(path / f"rank-{rank}.npz", **arrays)  # type: ignore[arg-type]
    ids: list[Any] = [[list(batch.sample_ids) for batch in batches]]
    if world_size > 1:
        mine, ids = ids[0], [None] * world_size
        dist.all_gather_object(ids, mine)
    if rank == 0:
        loss, norm = seen
        kept = {
            "step": step, "loss": loss, "grad_norm": norm, "global_tokens": facts[0],
            "sample_indices": [int(index) for index in facts[1]], "sample_ids": ids,
        }  # fmt: skip
        write_json(path / REPLAY_STEP, kept)
    return path


class _Kept(TypedDict):
    step: Natural
    loss: float
    grad_norm: float | None
    global_tokens: Natural
    sample_indices: list[int]
    sample_ids: list[list[list[str]]]


def read_kept(path: Path) -> KeptStep:
    """Read a kept step.

    Raises:
        TrainError: None is there.
    """
    try:
        kept = from_json(read_whole(path / REPLAY_STEP), _Kept)
        return KeptStep(path=path, **kept)
    except (OSError, JsonError) as error:
        if isinstance(error, OSError):
            require_missing(path / REPLAY_STEP, error)
        why = f" ({error})" if isinstance(error, JsonError) else ""
        raise TrainError(
            f"replay: {path} holds no kept step{why}; expected a folder replay/step-N of a run"
        ) from None
