"""Files of weights: safetensors, and pickles of tensors, which are read and never run.

Everything is read with `weights_only=True`: a pickle that would run code is refused.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lapilli.model.errors import ModelError

__all__ = ["PROJECTOR", "read_tensors"]

PROJECTOR = "mm_projector.bin"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.bin`/`.pt` or `.safetensors` file, or of a folder of shards.

    Raises:
        ModelError: Not there, no weights in it, cut short, or a pickle with more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors.update(_read_file(file))
    return tensors


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            yield from _indexed(path / index)
            return
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    found = found or sorted(path.glob(PROJECTOR))
    if not found:
        raise ModelError(f"{path}: no weights; expected *.safetensors, *.bin or a file of weights")
    yield from found


def _indexed(index: Path) -> list[Path]:
    """The files an index names, all of which must be there."""
    try:
        named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = [index.parent / name for name in sorted({*named.values()})]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index}: cannot be read; expected weight_map") from None
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise ModelError(
            f"{index}: names {missing[0]}, which is not there; copy the {len(missing)} missing "
            "files too"
        )
    return found


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = _read_pickle(file)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({_first_line(error)})") from None
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile pickle raises
        raise ModelError(
            f"{file}: holds more than tensors, and is not run ({_first_line(error)}); convert it "
            "to safetensors where it comes from"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: a {type(found).__name__}; expected tensors by name")
    return {str(n): v for n, v in found.items() if isinstance(v, Tensor)}  # pyright: ignore


def _read_pickle(file: Path) -> object:
    """Mapped, so that reading a checkpoint holds no second copy; the format before 1.6 cannot."""
    mapped = zipfile.is_zipfile(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
