"""Read weight files: safetensors, and pickles of tensors without executing them.

Everything is read with `weights_only=True`: a pickle that would run code is refused.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lapilli.model.errors import ModelError, require_missing

__all__ = [
    "INDICES", "PROJECTOR", "check_weights", "index_names", "open_safetensors", "read_object",
    "read_object_if_there",
    "read_safetensors", "read_tensors", "require_plain", "save_tensors", "share_as_usual",
]  # fmt: skip

PROJECTOR = "mm_projector.bin"
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MOST_JSON = 256 << 20  # bytes; a tokenizer's file, the largest, has up to 40 MB
OS_ERROR = re.compile(r"\(os error (\d+)\)")


def read_tensors(path: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors of one `.bin`/`.pt` or `.safetensors` file, or of a folder of shards.

    Args:
        path: The file or folder.
        wanted: Which of them, by name; of a `.safetensors` file the others are not read. None
            takes all.

    Raises:
        ModelError: Not there, no weights in it, cut short, or a pickle with more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors.update(_read_file(file, wanted))
    return tensors


def check_weights(path: Path) -> None:
    """Refuse a file or folder without weights, or with some missing that its index names.

    Raises:
        ModelError: As `read_tensors`.
    """
    for _ in _files(path):
        pass


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for index in INDICES:
        if (path / index).is_file():
            yield from _indexed(path / index)
            return
    try:
        next(path.iterdir(), None)
    except OSError as error:  # `glob` finds nothing in a folder that may not be listed
        require_missing(path, error)
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    found = found or sorted(path.glob(PROJECTOR))
    if not found:
        raise ModelError(f"{path}: no weights; expected *.safetensors, *.bin or a file of weights")
    yield from found


def index_names(index: Path) -> list[str]:
    """The files beside an index of weights that it names.

    Raises:
        ModelError: No index, or a path that leads elsewhere.
    """
    named: object = read_object(index).get("weight_map")
    names = {*cast("dict[str, object]", named).values()} if isinstance(named, dict) else {None}
    if not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index}: no index of weights; expected weight_map")
    files = sorted(cast("set[str]", names))
    if outside := [n for n in files if "/" in n or "\\" in n or n in ("", ".", "..")]:
        raise ModelError(
            f"{index}: names {outside[0][:100]!r}; expected names of files beside it, without '/'"
        )
    return files


def _indexed(index: Path) -> list[Path]:
    """The files an index names, all of which must be there."""
    found = [index.parent / name for name in index_names(index)]
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise ModelError(
            f"{index}: names {missing[0]}, which is not there; copy the {len(missing)} missing "
            "files too"
        )
    return found


def read_object_if_there(path: Path) -> dict[str, Any]:
    """`read_object`; empty where there is no such file.

    Raises:
        ModelError: It cannot be read, or holds something else.
    """
    try:
        path.stat()
    except OSError as error:
        require_missing(path, error)
        return {}
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a file, fields of any type.

    Raises:
        ModelError: It cannot be read, or holds something else.
    """
    try:
        require_plain(path)
        found: object = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        why = _first_line(error)[:100]
        raise ModelError(
            f"{path}: damaged; expected a JSON object ({why}); copy the file again"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: damaged; expected a JSON object, copy the file again")
    return cast("dict[str, Any]", found)


def require_plain(path: Path) -> None:
    """Reject paths that are not files (a pipe never ends), and JSON above the bound.

    Raises:
        OSError: It is not there or cannot be read.
        ModelError: Neither a file nor a folder, or too large.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) and not stat.S_ISDIR(facts.st_mode):
        raise ModelError(f"{path}: a pipe, socket or device; expected a file, copy it again")
    if path.suffix == ".json" and facts.st_size > MOST_JSON:
        raise ModelError(f"{path}: {facts.st_size} bytes; at most {MOST_JSON} are read")


def _read_file(file: Path, wanted: Callable[[str], bool] | None) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return read_safetensors(file) if wanted is None else _read_some(file, wanted)
        found = _read_pickle(file)
    except OSError as error:
        why = error.strerror or _first_line(error)
        raise ModelError(f"{file}: cannot be read ({why})") from None
    except ModelError:
        raise
    except (RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({_first_line(error)})") from None
    except Exception as error:  # pickle.UnpicklingError and whatever a hostile pickle raises
        raise ModelError(
            f"{file}: holds more than tensors, and is not run ({_first_line(error)}); convert it "
            "to safetensors where it comes from"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: a {type(found).__name__}; expected tensors by name")
    named = {str(n): v for n, v in found.items() if isinstance(v, Tensor)}  # pyright: ignore
    return {name: value for name, value in named.items() if wanted is None or wanted(name)}


def _read_some(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    with open_safetensors(file) as opened, _one_file(file):
        names: list[str] = [*opened.keys()]
        return {name: opened.get_tensor(name) for name in names if wanted(name)}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        OSError: It is not there or cannot be read: safetensors calls both missing.
        ModelError: It is no whole file of tensors.
    """
    from safetensors.torch import load_file

    require_plain(file)
    file.open("rb").close()
    with _one_file(file):
        return load_file(file)


@contextmanager
def open_safetensors(file: Path) -> Generator[Any]:
    """A file whose tensors are read one at a time, as `safetensors.safe_open` has it.

    Raises:
        OSError, ModelError: As `read_safetensors`.
    """
    from safetensors import safe_open

    require_plain(file)
    file.open("rb").close()
    with _one_file(file):
        opened: Any = safe_open(file, framework="pt")
    with opened as found:
        yield found


@contextmanager
def _one_file(file: Path) -> Generator[None]:
    """Whatever a header makes of safetensors and torch becomes one line."""
    try:
        yield
    except (OSError, MemoryError, ModelError):
        raise
    except Exception as error:  # SafetensorError, and torch's own for types it does not have
        raise ModelError(f"{file}: cannot be read ({_first_line(error)})") from None


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, or as a pickle under any other suffix, with the usual mode.

    Raises:
        OSError: The disk is full or the file cannot be written; names it and the cause.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        if file.suffix == ".safetensors":
            save_file(dict(tensors), file, metadata=metadata)
            share_as_usual(file)
        else:
            with file.open("wb") as opened:
                torch.save(dict(tensors), opened)
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _system_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(file)) from None


def _system_number(error: BaseException) -> int | None:
    """The system's number behind an error; safetensors has it in its text, torch below its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        cause = cause.__context__
    found = OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def share_as_usual(file: Path) -> None:
    """Give a file the mode of any new file beside it: the umask's, or what the folder's ACL says.

    safetensors writes under a temporary name that its owner alone may read, and keeps that mode.
    """
    probe = file.with_name(f".{file.name}.mode")
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    try:
        file.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink(missing_ok=True)


def _read_pickle(file: Path) -> object:
    """Mapped, so that reading a checkpoint holds no second copy; the format before 1.6 cannot."""
    mapped = zipfile.is_zipfile(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
