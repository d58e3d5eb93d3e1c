"""What a worker holds of the parameters that learn, as fragments of flat tensors.

ZeRO cuts the fp32 weights and moments otherwise at each stage and world size. A fragment says which
numbers of which parameter they are, so that who saves and loads knows nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lapilli.model.deepspeed_internals import is_shared_out
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.train.engine.deepspeed_internals import (
    MOMENTS,
    inner_optimizer,
    is_partitioned,
    optimized_tensors,
    own_part,
    own_range_of_shared,
    own_weights,
)

__all__ = [
    "KINDS",
    "WEIGHT",
    "Fragment",
    "checkpoint_share",
    "held_fragments",
    "own_range",
    "set_steps",
    "this_rank",
    "working_fragments",
]

WEIGHT = "weight"
KINDS = (WEIGHT, *MOMENTS)
NUMBER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Consecutive numbers of a parameter, or of one of its moments, that this worker holds.

    Attributes:
        name: The parameter's.
        kind: One of `KINDS`.
        start: The place of the first in the flat tensor.
        length: How many.
        get: The numbers, [length]; they may be overwritten by the next call.
        set: Sets them from fp32 [length].
    """

    name: str
    kind: str
    start: int
    length: int
    get: Callable[[], Tensor]
    set: Callable[[Tensor], None]


def this_rank() -> tuple[int, int]:
    """This worker's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_range(numbers: int, rank: int, workers: int) -> tuple[int, int]:
    """Start and length of a worker's share of what all of them hold."""
    start = numbers * rank // workers
    return start, numbers * (rank + 1) // workers - start


def checkpoint_share(trained: int, workers: int, *, milestone: bool = False) -> int:
    """Bytes of a checkpoint that one worker copies to its host and writes.

    Args:
        trained: Parameters that learn.
        workers: Among whom they are divided, at every ZeRO stage.
        milestone: Of a milestone, which has no moments.
    """
    return math.ceil(trained / workers) * NUMBER_BYTES * (1 if milestone else len(KINDS))


def held_fragments(
    engine: Any, kinds: tuple[str, ...] = KINDS, *, divided: bool = False
) -> Generator[Fragment]:
    """The fp32 weights and moments of this worker, one parameter after the other.

    Args:
        engine: DeepSpeed's engine.
        kinds: Which of `KINDS`.
        divided: Of what every worker holds whole (stage 0) this worker's share.
    """
    rank, workers = this_rank()
    for name, parameter in trainable_parameters(engine.module).items():
        for kind in kinds:
            if is_shared_out(parameter):
                found = _of_stage_3(name, kind, parameter)
            elif is_partitioned(parameter):
                found = _of_stages_1_and_2(name, kind, parameter)
            else:
                moments: Any = engine.optimizer.state[parameter]
                flat = parameter.data if kind == WEIGHT else moments[kind]
                numbers = parameter.numel()
                place = own_range(numbers, rank, workers) if divided else (0, numbers)
                found = _of_flat(name, kind, flat.view(-1), place)
            if found is not None and found.length:
                yield found


def working_fragments(model: nn.Module) -> Generator[Fragment]:
    """The weights that this worker computes with, of a model without an engine."""
    for name, parameter in trainable_parameters(model).items():
        if not is_shared_out(parameter):
            yield _of_flat(name, WEIGHT, parameter.data.view(-1), (0, parameter.numel()))
            continue
        start, length, _ = own_range_of_shared(parameter)
        if length:
            yield _of_flat(name, WEIGHT, own_weights(parameter), (0, length), start)


def set_steps(engine: Any, step: int) -> None:
    """Set the count of steps that the optimizer corrects its moments by."""
    for tensor in optimized_tensors(engine):
        inner_optimizer(engine).state[tensor]["step"].fill_(step)


def _of_flat(
    name: str, kind: str, flat: Tensor, place: tuple[int, int], first: int = 0
) -> Fragment:
    """A piece of a flat tensor whose own first number is number `first` of the parameter's."""
    start, length = place
    held = flat.detach()[start : start + length]

    def write(value: Tensor) -> None:
        held.copy_(value)

    return Fragment(
        name=name, kind=kind, start=first + start, length=length, get=lambda: held, set=write
    )


def _of_stages_1_and_2(name: str, kind: str, parameter: nn.Parameter) -> Fragment | None:
    found = own_part(parameter, None if kind == WEIGHT else kind)
    if found is None:  # all of it is elsewhere
        return None
    start, held = found
    return _of_flat(name, kind, held, (0, held.numel()), start)


def _of_stage_3(name: str, kind: str, parameter: nn.Parameter) -> Fragment:
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    start, length, padded = own_range_of_shared(parameter)
    getting: Callable[[], Any] = partial(safe_get_local_fp32_param, parameter)
    setting: Callable[[Tensor], Any] = partial(safe_set_local_fp32_param, parameter)
    if kind != WEIGHT:
        getting = partial(safe_get_local_optimizer_state, parameter, kind)
        setting = partial(safe_set_local_optimizer_state, parameter, optim_state_key=kind)

    def write(value: Tensor) -> None:
        setting(nn.functional.pad(value, (0, padded - length)))

    return Fragment(
        name=name, kind=kind, start=start, length=length,
        get=lambda: getting().detach().view(-1)[:length], set=write,
    )  # fmt: skip
