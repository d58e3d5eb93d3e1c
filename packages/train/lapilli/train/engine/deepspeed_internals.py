"""What lapilli uses of DeepSpeed without a public way: how ZeRO holds gradients and moments.

DeepSpeed's `safe_get_...` and `safe_set_...` functions are public and read whole tensors; nothing
public creates the state before the first step, reads a rank's own share, or keeps fp16's loss
scale. Where a name goes, AttributeError is raised as a run starts, or at its first step; exceptions
are said below. What a parameter carries is in `lapilli.model.deepspeed_internals`.
`tests/contracts/test_private_internals.py` looks whether the installed version has each name.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapilli.model.deepspeed_internals import is_shared_out, shape_of
from lapilli.model.parts.trainable import parameter_groups, trainable_parameters

__all__ = [
    "MOMENTS", "SCALE_STATE", "allow_least_scale", "create_moments", "forgo_shared_memory",
    "inner_optimizer", "is_partitioned", "loss_scale", "optimized_tensors", "own_norms",
    "own_part", "own_range_of_shared", "own_weights", "restore_scale", "scale_state",
    "swapped_optimizer",
]  # fmt: skip

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter")


def forgo_shared_memory() -> None:
    """Have DeepSpeed use torch's collectives on a CPU; call before it initialises any.

    Used: `deepspeed.ops.__compatible_ops__`. It would compile its shared-memory operator first (42
    s seen), and no setting keeps it from that. If it looked elsewhere, the first run would compile.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def swapped_optimizer(rank: int) -> Path:
    """Where a rank's optimizer state lies below `nvme_path`.

    Used: the folders that stage 3 makes; it never removes them and does not tell their names. If
    they were renamed, a run that has ended would leave its state on the disk.
    """
    return Path("zero_stage_3") / "optimizer" / f"rank{rank}"


def own_norms(engine: Any) -> Generator[tuple[str, Sequence[Tensor]]]:
    """Norms of the pieces of gradient that this rank counts, with the part that they are of.

    Used: at stage 3 `sub_group_to_group_id`, `fp16_groups`, `offload_optimizer`; at stages 1 and 2
    `params_in_partition`, `cpu_offload`; at all of them `averaged_gradients`, or
    `norm_for_param_grads` and `get_param_id` where the optimizer is offloaded. If the names that
    tell the stages apart went, the parameters' own gradients would be read: there are none, and
    norms by part would be 0.
    """
    zero = engine.optimizer
    if hasattr(zero, "sub_group_to_group_id"):  # stage 3
        groups = {i: zero.param_groups[g]["part"] for i, g in zero.sub_group_to_group_id.items()}
        parameters, is_offloaded = zero.fp16_groups, zero.offload_optimizer
    elif hasattr(zero, "params_in_partition"):  # stages 1 and 2
        groups = {i: group["part"] for i, group in enumerate(zero.param_groups)}
        parameters, is_offloaded = zero.params_in_partition, zero.cpu_offload
    else:  # whole on every rank
        share = dist.get_world_size() ** -0.5 if dist.is_initialized() else 1.0
        for (part, _), whole in parameter_groups(engine.module).items():
            gradients = [p.grad for p in whole if p.grad is not None]
            yield part, [norm * share for norm in _norms(gradients)]
        return
    for i, part in groups.items():
        if is_offloaded:  # taken on the device before the gradient was sent to the host
            ids = [zero.get_param_id(parameter) for parameter in parameters[i]]
            known = zero.norm_for_param_grads
            yield part, [torch.as_tensor(known[key]).float() for key in ids if key in known]
        else:
            yield part, _norms(zero.averaged_gradients[i])


def _norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]


def loss_scale(engine: Any) -> float:
    """What the loss is multiplied with before backward so that fp16 can hold its gradient.

    Used: `loss_scale` of the optimizer that DeepSpeed wraps; without it the scale counts as 1.
    """
    return float(getattr(engine.optimizer, "loss_scale", 1.0))


def scale_state(engine: Any) -> dict[str, float]:
    """What fp16's loss scale follows from at the next step; nothing in other precisions.

    Used: `loss_scaler`, its `dynamic` and `SCALE_STATE`. Public is only DeepSpeed's own checkpoint,
    which holds it beside everything else. Without `loss_scaler` nothing would be saved.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in SCALE_STATE}


def restore_scale(engine: Any, state: dict[str, float]) -> None:
    """Go on with the loss scale of `scale_state`."""
    for name in SCALE_STATE:
        if name in state:
            setattr(engine.optimizer.loss_scaler, name, state[name])


def allow_least_scale(engine: Any) -> None:
    """Let fp16's loss scale stay at its least value without an error: `StepGuard` says it better.

    Used: `loss_scaler.raise_error_at_min_scale`, which no setting reaches. If it were renamed,
    DeepSpeed's own error would end such a run.
    """
    if scale_state(engine):
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO keeps this parameter's fp32 weight and moments (stages 1 to 3).

    Used: `_hp_mapping`, which stages 1 and 2 set. If it were renamed, a checkpoint could not be
    saved: KeyError.
    """
    return is_shared_out(parameter) or hasattr(parameter, "_hp_mapping")


def own_part(parameter: Any, moment: str | None) -> tuple[int, Tensor] | None:
    """What this rank updates of a parameter's fp32 weight or moment, under stages 1 and 2.

    Used: `_hp_mapping`, its `get_hp_fragment` and `lp_fragment_address`; public functions gather
    the whole. If they were renamed, a checkpoint could not be saved.

    Returns:
        The place of its first number in the flat parameter, and the numbers; None for nothing.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)


def own_range_of_shared(parameter: Any) -> tuple[int, int, int]:
    """Which numbers of a parameter this rank holds under stage 3.

    Used: `ds_tensor`; public functions tell the numbers and not their places.

    Returns:
        Start, length, and length with what pads the last ranks' shares.
    """
    size, numbers = parameter.ds_tensor.numel(), math.prod(shape_of(parameter))
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = min(rank * size, numbers)
    return start, min(size, numbers - start), size


def own_weights(parameter: Any) -> Tensor:
    """The numbers that this rank computes with of a parameter under stage 3, to be overwritten.

    Used: `ds_tensor`, and `ds_secondary_tensor` of hpZ, which is forgotten as after each step. If
    the latter were renamed, a resumed run with hpZ would compute its first step with old weights.
    """
    parameter.ds_secondary_tensor = None
    return parameter.ds_tensor.data


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Torch's own optimizer, which ZeRO wraps.

    Used: `optimizer` of the optimizer that DeepSpeed wraps.
    """
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def optimized_tensors(engine: Any) -> Iterable[Tensor]:
    """What the inner optimizer updates: flat partitions under ZeRO, else the parameters.

    Used: `single_partition_of_fp32_groups` of stages 1 and 2, `fp32_partitioned_groups_flat` of 3.
    """
    zero = engine.optimizer
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if hasattr(zero, name):
            return getattr(zero, name)
    return trainable_parameters(engine.module).values()


def create_moments(engine: Any) -> None:
    """Make the inner optimizer's state, which DeepSpeed and torch only make at the first step.

    Used: `_lazy_init_hp_params_optimizer_state` of stages 1 and 2. They look for the moments after
    the first parameter group's first step and then never again: without this call, a second
    group's moments could not be read.
    """
    inner = inner_optimizer(engine)
    for number, tensor in enumerate(optimized_tensors(engine)):
        with _swapped_in(engine, number):
            # as torch makes it: the fused kernel counts where it computes
            place = tensor.device if inner.defaults.get("fused") else "cpu"
            inner.state[tensor] = {"step": torch.zeros((), device=place)}
            inner.state[tensor].update({name: torch.zeros_like(tensor.data) for name in MOMENTS})
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def _swapped_in(engine: Any, number: int) -> Generator[None]:
    """Have a piece of what the optimizer updates in memory inside, if it lies on a disk.

    An error inside leaves the disk as it was.

    Used: `swap_optimizer`, `_swappable_optimizer_subgroup` and
    `_optimizer_states_and_gradient_swap_in` and `..._out`, of stage 3.
    """
    zero = engine.optimizer
    swaps = getattr(zero, "swap_optimizer", False)
    is_on_disk = swaps and zero._swappable_optimizer_subgroup(number)
    if is_on_disk:
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    if is_on_disk:
        zero._optimizer_states_and_gradient_swap_out(number)
