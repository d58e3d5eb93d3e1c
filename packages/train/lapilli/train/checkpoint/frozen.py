"""Fingerprint frozen weights by value, rounded to bf16, whatever dtype holds them.

A run's checkpoints hold what learnt; what lay beside is read again whenever the run is opened, and
compared with these. They are taken of a model as its base weights were read, before an earlier run
is put on top, before adapters and before anything is kept in 4 bits. What an earlier run adds is
compared by the checksum of its file (`lapilli.train.checkpoint.init_from`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lapilli.data.io.typed_json import JsonError, as_type
from lapilli.model.deepspeed_internals import is_shared_out
from lapilli.model.parts.added_rows import source_rows, table_names
from lapilli.model.parts.trainable import base_name, is_adapter
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.engine import deepspeed_engine as engine
from lapilli.train.errors import TrainError
from lapilli.train.renamed import RUN_NAMES
from lapilli.train.run_folder.checkpoint_state import CheckpointState

__all__ = ["FORM", "changed", "check_frozen", "digest", "fingerprint", "source_digests"]

FORM = "bf16-values-1"
DIGITS = 32  # hexadecimal, of a tensor's SHA-256
PIECE = 2**20  # numbers that are rounded and hashed at once: they stay in a core's cache
MINUS_ZERO, INFINITY, NAN = -0x8000, 0x7F80, 0x7FC0  # bf16, as int16


def digest(value: Tensor) -> str:
    """A tensor's shape and values, whatever floating-point type holds them.

    Numbers are rounded to bf16; -0 counts as 0 and every NaN as one. Integers count as bytes.
    """
    found = hashlib.sha256(str(tuple(value.shape)).encode())
    flat = value.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        found.update(_piece(flat[start : start + PIECE]).numpy().data)
    return found.hexdigest()[:DIGITS]


def _piece(flat: Tensor) -> Tensor:
    """The bytes that are hashed."""
    flat = flat.cpu()
    if not flat.is_floating_point():
        return flat.contiguous().view(torch.uint8)
    bits = flat.to(torch.bfloat16, copy=True).view(torch.int16)
    bits.masked_fill_(bits == MINUS_ZERO, 0)
    bits.masked_fill_((bits & 0x7FFF) > INFINITY, NAN)
    return bits.view(torch.uint8)


def source_digests(model: VisionLanguageModel, skips: Collection[str] = ()) -> dict[str, str]:
    """The digest of every parameter, and of every buffer that is saved, by its plain name.

    Of the vocabulary's tables the rows that came with the weights count, not those that were added.
    Whole tensors are hashed by a thread a core. Collective where ZeRO-3 has shared weights out:
    there one after another, each made whole in its turn.

    Args:
        model: The model.
        skips: Parts (`language`) that are left out: whatever they were, they are replaced.
    """
    tables = {f"language.{name}" for name in table_names(model.language)}
    rows = source_rows(model.language)
    named = {
        base_name(name): value
        for name, value in _saved(model)
        if name.partition(".")[0] not in skips and not is_adapter(name)
    }

    def of(name: str) -> str:
        value = named[name]
        return digest(value[:rows] if name in tables else value)

    shared = {name for name, value in named.items() if is_shared_out(value)}
    whole = sorted(named.keys() - shared)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(whole, pool.map(of, whole), strict=True))
    for name in sorted(shared):
        parameter = named[name]
        assert isinstance(parameter, nn.Parameter)
        with engine.gathered([parameter]):
            found[name] = of(name)
    return found


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, each once, and the buffers a `state_dict` has."""
    yield from model.named_parameters()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict().items():
        if name not in parameters and value.is_floating_point():
            yield name, value


def fingerprint(digests: Mapping[str, str]) -> str:
    """One value for all of them."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def changed(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Names whose weights differ from what they were, or are no longer there."""
    return sorted(name for name, value in there.items() if here.get(name) != value)


def check_frozen(
    state: CheckpointState, here: Mapping[str, str], *, run: object, what: str = ""
) -> None:
    """Compare frozen weights with those the run was trained beside.

    Args:
        state: Of the run's checkpoint: its `frozen` and `config`.
        here: Digests of what there is now (`source_digests`).
        run: How a message calls the run.
        what: The setting that names the run; empty where the run itself is opened.

    Raises:
        TrainError: Other weights; names the run, the base, the first parameter that differs, both
            fingerprints and what to do.
    """
    frozen: Any = state.frozen
    field = f"{what}: " if what else ""
    if not _is_comparable(frozen):
        raise TrainError(
            f"{field}{run} was saved by a version whose fingerprints of frozen weights cannot be "
            f"compared with today's ({FORM}); train it again, or use that version"
        )
    there: Mapping[str, str] = frozen["weights"]
    names = changed(there, here)
    if not names:
        return
    found = {name: here[name] for name in there if name in here}
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    verb = "differ" if more else "differs"
    raise TrainError(
        f"{field}{run} was trained beside other frozen weights: {_base(state, names[0])} has "
        f"changed since ({names[0]}{more} {verb}; fingerprint was {fingerprint(there)[:12]}, is "
        f"{fingerprint(found)[:12]}); put the weights back that it was trained with, or "
        + ("name a run that was trained with these" if what else "train it again with these")
    )


def _is_comparable(frozen: Any) -> bool:
    """Whether fingerprints are of today's form, each a text by the name of its weight."""
    try:
        return as_type(frozen, _Frozen)["form"] == FORM
    except JsonError:
        return False


class _Frozen(TypedDict):
    form: str
    weights: dict[str, str]


def _base(state: CheckpointState, name: str) -> str:
    """Name a part's frozen weights by the setting they come from."""
    model: Any = state.config.get("model", {})
    part = name.partition(".")[0]
    named = model.get(part) if isinstance(model, dict) else None
    pretrained = named.get("pretrained") if isinstance(named, dict) else ""
    seed = model.get("seed", 0) if isinstance(model, dict) else 0
    if pretrained:
        return f"{part}.pretrained {pretrained}"
    if foreign := RUN_NAMES.with_new_names(state.config).get("init_from"):
        return f"the {part} below it (init_from {foreign})"
    return f"the {part} of random weights (model.seed {seed})"
