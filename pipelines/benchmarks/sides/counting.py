"""Count the operations and the bytes of every kernel of a training step, by dispatch.

The model is of fake tensors, so 13B take no memory. A module's operations are told apart by hooks;
in backward by the nodes that its forward made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lapilli.data.batches.collate import Batch
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes, trainable_parameters
from lapilli.model.torch_internals import TorchDispatchMode, without_stacks
from lapilli.train.driver.fake_model import Sketch

__all__ = ["ADAMW", "Kernel", "Part", "Phase", "count_step", "fused_bytes"]

Part = Literal[
    "tower", "projector", "merge", "attention", "mlp", "norms", "rotary", "swiglu", "residual",
    "adapters", "head", "optimizer",
]  # fmt: skip
Phase = Literal["forward", "backward", "recompute", "update"]
ADAMW = "adamw"  # owner of the optimizer's own kernels
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")
GATHERS = ("embedding", "index", "index_select", "gather")
UNREAD = ("copy_", "zero_", "fill_")  # write their first argument without reading it


@dataclass(frozen=True)
class Kernel:
    """One operation that ran.

    Attributes:
        name: As torch names it.
        phase: When it ran.
        part: Of which part.
        owner: Path of the module.
        flops: Operations, of matrix products and attention alone.
        reads: Bytes by storage.
        writes: Bytes by storage.
    """

    name: str
    phase: Phase
    part: Part
    owner: str
    flops: int
    reads: dict[int, int] = field(default_factory=dict[int, int])
    writes: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def bytes(self) -> int:
        """All that it moves."""
        return sum(self.reads.values()) + sum(self.writes.values())


def count_step(sketch: Sketch, batch: Batch, *, checkpointing: bool = False) -> list[Kernel]:
    """Forward, backward and update of one micro-batch of these shapes, kernel by kernel.

    The update is that of `lapilli.train.engine.torch_engine`: gradients to fp32, their norm,
    clipping, AdamW as torch has it without fusing, weights back. Attention is counted as a kernel
    that skips later tokens.
    """
    if checkpointing:
        recompute_all(sketch.model)
        set_modes(sketch.model)
    counter = _KernelCounter(below="adapters" if sketch.model.config.lora else "residual")
    names = ("input_ids", "position_ids", "merge_index", "pixels", "predict_positions", "targets")
    arrays = {name: getattr(batch, name) for name in names}
    with sketch.mode, without_stacks(), counter.owners(sketch.model):
        inputs = {
            name: torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)))
            for name, array in arrays.items()
        }
        with counter:
            loss = sketch.model(**inputs)
            counter.label(loss, "head")
            ones = torch.ones_like(loss)
            counter.phase = "backward"
            loss.backward(ones)
    counter.phase = "update"
    with counter:
        _update(counter, list(trainable_parameters(sketch.model).values()))
    return counter.kernels


def _update(counter: _KernelCounter, parameters: Sequence[Tensor]) -> None:
    """The engine's update on tensors without storage."""
    masters = [torch.empty(p.shape, dtype=torch.float32, device="meta") for p in parameters]
    weights = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in parameters]
    optimizer = torch.optim.AdamW(masters, foreach=False)
    for master in masters:
        moments = {name: torch.empty_like(master) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[master] = {"step": torch.tensor(0.0), **moments}
    for master, weight in zip(masters, weights, strict=True):
        gradient = torch.empty_like(weight)
        master.grad = gradient if weight.dtype == torch.float32 else gradient.float()
        torch.linalg.vector_norm(master.grad)
        master.grad.mul_(0.5)
    counter.enter(ADAMW)
    optimizer.step()
    counter.leave()
    for master, weight in zip(masters, weights, strict=True):
        if weight.dtype != torch.float32:
            weight.copy_(master)


class _KernelCounter(TorchDispatchMode):
    """Records kernels with the module that they belong to."""

    def __init__(self, below: Part) -> None:
        super().__init__()
        self._below: Part = below  # what a linear layer does beside its product
        self.kernels: list[Kernel] = []
        self.phase: Phase = "forward"
        self._owners: list[str] = ["merge"]  # modules whose forward runs, innermost last
        self._in_backward = "head"
        self._nodes: dict[Any, str] = {}
        self._storages: dict[int, Any] = {}  # kept, so that no other storage takes an id

    def enter(self, owner: str) -> None:
        """What runs belongs to an owner from here on."""
        self._owners.append(owner)

    def leave(self) -> None:
        """What runs belongs to the owner before."""
        self._owners.pop()

    @contextmanager
    def owners(self, model: nn.Module) -> Generator[None]:
        """Follow the modules of a model."""
        handles: list[Any] = []
        decoder: Any = model.get_submodule("language").get_decoder()  # pyright: ignore
        for path, module in model.named_modules():
            if not path or path == "language":
                continue

            def enter(module: nn.Module, args: Any, given: Any, path: str = path) -> None:
                self.label((args, given), self._owners[-1])
                self.enter(path)

            def leave(module: nn.Module, args: Any, result: Any, path: str = path) -> None:
                self.leave()
                self.label(result, path)
                if module is decoder:
                    self._owners[0] = "head"

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def label(self, result: Any, owner: str) -> None:
        """Give the nodes of backward behind a result, if nobody has them, to a module."""
        reached: list[Any] = [tensor.grad_fn for tensor in _tensors(result)]
        while reached:
            node = reached.pop()
            if node is None or node in self._nodes:
                continue
            self._nodes[node] = owner
            node.register_prehook(lambda *_, owner=owner: setattr(self, "_in_backward", owner))
            reached += [following for following, _ in node.next_functions]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record what it moves."""
        named = kwargs or {}
        result = func(*args, **named)
        name, _, overload = func.__name__.partition(".")
        given, made = list(_tensors((args, named))), list(_tensors(result))
        reads, writes = self._sizes(given), self._sizes(made)
        if overload == "out":
            given = list(_tensors(args))
            reads = self._sizes(given)
        elif not name.endswith("_"):
            writes = {storage: size for storage, size in writes.items() if storage not in reads}
        elif name in UNREAD:
            reads = self._sizes(given[1:])
        if name in GATHERS:
            reads = {storage: min(size, made[0].nbytes) for storage, size in reads.items()}
        if not writes or "empty" in name:
            return result
        flops = _flops(name, given, made, is_causal=not self._owner.startswith("vision"))
        part = _part(self._owner, self._below, is_product=flops > 0, shape=made[0].shape)
        phase = self.phase
        if phase == "backward" and torch.is_grad_enabled():
            phase = "recompute"  # a checkpointed layer's second forward
        if phase == "update":
            part = "optimizer"
        kernel = Kernel(
            name=name, phase=phase, part=part, owner=self._owner,
            flops=flops, reads=reads, writes=writes,
        )  # fmt: skip
        self.kernels.append(kernel)
        return result

    @property
    def _owner(self) -> str:
        """The module whose operations run."""
        runs_backward = self.phase == "backward" and len(self._owners) == 1
        return self._in_backward if runs_backward else self._owners[-1]

    def _sizes(self, tensors: Sequence[Tensor]) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[id(storage)] = storage
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            count = prod(size for size, stride in steps if stride)
            sizes[id(storage)] = max(sizes.get(id(storage), 0), count * tensor.element_size())
        return sizes


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors(item)


def _flops(name: str, given: Sequence[Tensor], made: Sequence[Tensor], *, is_causal: bool) -> int:
    """Operations of a matrix product, a patch convolution or fused attention; else 0."""
    if "scaled_dot_product" in name:
        is_backward = name.endswith("backward")
        query, key = given[is_backward], given[is_backward + 1]
        batch, heads, length, size = query.shape
        pairs = length * (length + 1) // 2 if is_causal else length * key.shape[2]
        return int(4 * batch * heads * size * pairs * (2.5 if is_backward else 1))
    if name == "convolution":
        return 2 * made[0].numel() * given[1][0].numel()
    if name.rstrip("_") in PRODUCTS:
        return 2 * made[0].numel() * given[-1].shape[-2]
    return 0


def _part(owner: str, below: Part, *, is_product: bool, shape: Sequence[int]) -> Part:
    """The part of an operation from its module's path and its kind."""
    first, last = owner.split(".")[0], owner.split(".")[-1]
    if first in ("merge", "head", "projector"):
        return first  # pyright: ignore[reportReturnType]
    if first == "vision":
        return "tower"
    if "norm" in last:
        return "norms"
    is_scores = len(shape) == 4 and shape[2] == shape[3]
    if "self_attn" in owner:
        if is_product or is_scores:
            return "attention"
        return "rotary" if last == "self_attn" else below
    if ".mlp" in owner:
        if is_product:
            return "mlp"
        return "swiglu" if last in ("mlp", "act_fn") else below
    return "rotary" if last == "rotary_emb" else "residual"


def fused_bytes(
    kernels: Sequence[Kernel], groups: Sequence[Hashable]
) -> dict[tuple[Hashable, Phase], int]:
    """Bytes that kernels move where those of a group and phase are one kernel.

    A fused kernel reads once what it does not make, and writes what others read. What backward
    alone asks of a fused forward is not kept but computed again from what that forward read.

    Args:
        kernels: A step's, in order.
        groups: The group of each; None for one that stays by itself.

    Returns:
        Bytes by group and phase.
    """
    inputs: dict[tuple[Hashable, Phase], dict[int, int]] = defaultdict(dict)
    outputs: dict[tuple[Hashable, Phase], dict[int, int]] = defaultdict(dict)
    maker: dict[int, tuple[Hashable, Phase]] = {}  # of each storage
    unread: dict[int, int] = {}
    made: dict[int, int] = {}
    for kernel, group in zip(kernels, groups, strict=True):
        here = group, kernel.phase
        for storage, size in kernel.reads.items():
            unread.pop(storage, None)
            source = maker.get(storage, (None, kernel.phase))
            if group is not None and source == here:
                continue
            is_fused = group is not None and source[0] is not None
            if is_fused and kernel.phase == "backward" and source[1] != "backward":
                inputs[here] = inputs[source] | inputs[here]
                continue
            outputs[source][storage] = made.get(storage, 0)
            inputs[here][storage] = max(size, inputs[here].get(storage, 0))
        for storage, size in kernel.writes.items():
            if storage in inputs[here]:
                outputs[here][storage] = size  # changed in place
            maker[storage] = here
            made[storage] = unread[storage] = size
    for storage, size in unread.items():
        outputs[maker[storage]][storage] = size
    return {
        key: sum(inputs[key].values()) + sum(outputs[key].values())
        for key in dict.fromkeys([*inputs, *outputs])
        if key[0] is not None
    }
