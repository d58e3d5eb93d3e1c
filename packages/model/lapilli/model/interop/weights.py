"""Collect a model's tensors under plain names, adapters merged, one file at a time.

An export holds the model and one file's tensors, whatever the model's size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lapilli.model.errors import ModelError
from lapilli.model.parts.added_rows import added_rows, table_names
from lapilli.model.parts.quantized import SCALES, is_packed, whole_shape, whole_weight
from lapilli.model.parts.trainable import base_name, is_adapter
from lapilli.model.parts.weight_files import save_tensors

__all__ = ["Progress", "Weight", "adapted_layers", "low_rank", "plain_weights", "write_weights"]

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""

NAMES = {"safetensors": "model{suffix}.safetensors", "bin": "pytorch_model{suffix}.bin"}


@dataclass(frozen=True)
class Weight:
    """A tensor that is made on demand.

    Attributes:
        shape: Its shape.
        make: Makes it, in the dtype it is held or computed in.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @staticmethod
    def of(value: Tensor) -> Weight:
        """One that is there."""
        return Weight(tuple(value.shape), value.detach)

    def then(self, change: Callable[[Tensor], Tensor], *shape: int) -> Weight:
        """Changed when it is made; `shape` where that differs then."""
        return replace(self, shape=shape or self.shape, make=lambda: change(self.make()))


def adapted_layers(part: nn.Module) -> dict[str, Any]:
    """The layers of peft in a part, by the path of the layer each has around it."""
    return {
        name.removesuffix(".base_layer"): part.get_submodule(name.removesuffix(".base_layer"))
        for name, _ in part.named_modules()
        if name.endswith(".base_layer")
    }


def plain_weights(part: nn.Module, *, merged: bool = True) -> dict[str, Weight]:
    """A part's tensors under the names they have without adapters.

    Args:
        part: The part.
        merged: Whether adapters are merged into their layers, and rows that learnt by themselves
            into their tables; without, the weights are those below them.

    Merging is in fp32 whatever the layer's dtype: `W + (B A) alpha / r` (Hu et al. 2021,
    arXiv:2106.09685). Added rows that learnt by themselves stand in their tables. Weights in 4 bits
    are the numbers that they compute with.
    """
    adapted = adapted_layers(part)
    quantized = {name: module for name, module in part.named_modules() if _is_quantized(module)}
    found: dict[str, Weight] = {}
    for name, value in part.state_dict().items():
        if is_adapter(name) or _is_scale(name, quantized):
            continue
        plain = base_name(name)
        layer, _, leaf = plain.rpartition(".")
        held = quantized.get(name.removesuffix(".weight"))
        found[plain] = Weight.of(value)
        if held is not None:
            found[plain] = Weight(whole_shape(held), partial(whole_weight, held))
        if merged and layer in adapted and leaf == "weight":
            is_turned = held is not None and bool(held.is_transposed)
            found[plain] = found[plain].then(partial(_merge, adapted[layer], is_turned))
    for prefix, language in (("", part), ("language.", getattr(part, "language", None))):
        rows = None if language is None else added_rows(language)
        if merged and rows is not None:
            for name, kind in table_names(language).items():
                learnt = rows.embedding if kind == "embedding" else rows.head_rows
                if learnt is not None:
                    change = partial(_replace_last, learnt.detach())
                    found[prefix + name] = found[prefix + name].then(change)
    return found


def _replace_last(rows: Tensor, table: Tensor) -> Tensor:
    return torch.cat([table[: len(table) - len(rows)], rows.to(table.dtype)])


def _is_quantized(module: Any) -> bool:
    return is_packed(getattr(module, "weight", None))


def _is_scale(name: str, quantized: Mapping[str, Any]) -> bool:
    """Whether a tensor of a state dict is one of those beside a weight in 4 or 8 bits."""
    layer, found, _ = name.rpartition(".weight.")
    beside, _, leaf = name.rpartition(".")
    return (bool(found) and layer in quantized) or (beside in quantized and leaf in SCALES)


def _merge(layer: Any, is_turned: bool, weight: Tensor) -> Tensor:
    merged = weight.float()
    for name, first in layer.lora_A.items():
        pair = first.weight.detach(), layer.lora_B[name].weight.detach()
        is_transposed = is_turned or bool(layer.fan_in_fan_out)
        merged = merged + low_rank(*pair, layer.scaling[name], is_transposed=is_transposed)
    return merged


def low_rank(first: Tensor, second: Tensor, scale: float, *, is_transposed: bool) -> Tensor:
    """What an adapter adds to a weight, fp32: `(B A) scale`.

    Args:
        first: A, [r, in].
        second: B, [out, r].
        scale: alpha / r.
        is_transposed: Whether the layer holds its weight as [in, out] (GPT-2's `Conv1D`).
    """
    made = second.float() @ first.float()
    return (made.T if is_transposed else made) * scale


def write_weights(
    weights: Mapping[str, Weight],
    output: Path,
    dtype: torch.dtype,
    *,
    shard_size: str = "5GB",
    form: Literal["safetensors", "bin"] = "safetensors",
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Write tensors to one file, or to several with an index, as transformers names them.

    Args:
        weights: What is written, by name.
        output: The folder, which is there.
        dtype: Of the written tensors.
        shard_size: Most bytes in one file (`5GB`); one tensor is never split.
        form: `safetensors`, or `bin`: pickles of tensors as older programs read them.
        on_progress: Called after each file.

    Raises:
        ModelError: A size that is none.
        OSError: The disk is full or a file cannot be written; names it.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    planned = {n: torch.empty(w.shape, dtype=dtype, device="meta") for n, w in weights.items()}
    try:
        split = split_torch_state_dict_into_shards(
            planned, filename_pattern=NAMES[form], max_shard_size=shard_size
        )
    except ValueError:
        raise ModelError(f"shard_size: {shard_size!r}; expected a size such as 5GB") from None
    total, done = sum(value.nbytes for value in planned.values()), 0
    for file, names in split.filename_to_tensors.items():
        made = {name: _cast(weights[name].make(), dtype) for name in names}
        save_tensors(made, output / file, metadata={"format": "pt"})
        done += sum(value.nbytes for value in made.values())
        on_progress(done, total)
    if split.is_sharded:
        name = NAMES[form].format(suffix="") + ".index.json"
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (output / name).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """On the host, and with bytes of its own: a view would be pickled with all it is a view of."""
    cast = value.to("cpu", dtype)
    return cast.contiguous() if cast.untyped_storage().nbytes() == cast.nbytes else cast.clone()
