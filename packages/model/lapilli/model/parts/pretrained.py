"""Load transformers configs and weights, with errors as one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lapilli.model.errors import ModelError, require_missing
from lapilli.model.parts.weight_files import index_names, require_plain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "Loading",
    "check_memory",
    "check_readable",
    "check_settings",
    "check_size",
    "local_folder",
    "one_line",
    "settings_text",
    "whole",
    "without_report",
]  # fmt: skip

# What a language model's weights are loaded in: nothing, or what shares them among processes while
# they are read. A model must not know DeepSpeed, so the trainer brings it.
Loading: TypeAlias = Callable[[], AbstractContextManager[object]]
whole: Loading = nullcontext
MOST_LAYERS = 10_000
SHARE = 0.8  # of the memory that is free, for random weights


def check_settings(name: str, settings: Mapping[str, Any], known: PreTrainedConfig) -> None:
    """Refuse a setting the architecture does not have; transformers would take it and ignore it.

    Args:
        name: The settings' full name in a recipe.
        settings: What the recipe gives.
        known: A config of the same class with its defaults.

    Raises:
        ModelError: Names the first unknown key.
    """
    unknown = sorted(set(settings) - set(known.to_dict()))
    if unknown:
        raise ModelError(
            f"{name}: {unknown[0]!r} is unknown; expected settings of {type(known).__name__}"
        )


def check_readable(name: str | Path) -> None:
    """Open every file of a local folder: transformers passes over some that it may not read.

    A pipe would be waited for without end. An index of weights may name files of its folder alone;
    transformers would follow any path.

    Args:
        name: The folder, or a hub's name, of which nothing is known here.

    Raises:
        ModelError: Names the first file that cannot be read, and the cause; or an index that names
            a file elsewhere.
    """
    folder = Path(name)
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        require_missing(folder, error)
        return
    for file in files:
        try:
            require_plain(file)
            if not file.is_dir():
                file.open("rb").close()
        except OSError as error:
            require_missing(file, error)
        if file.name.endswith(".index.json"):
            index_names(file)


def local_folder(name: str, file: str = "config.json") -> Path | None:
    """The folder that a name stands for on this machine: its own, or the hub's in its cache.

    Nothing is asked of the network. None where there is no such folder, or none in the cache with
    `file` in it.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_memory(name: str, settings: PreTrainedConfig) -> None:
    """Reject random weights that exceed this machine's memory, before any is drawn.

    Settings come from a recipe, or from a run that somebody else made. The size is that of a
    transformer of these dimensions, in fp32, roughly: the system kills processes when memory is
    full.

    Args:
        name: The settings' full name in a recipe.
        settings: The architecture's config.

    Raises:
        ModelError: Names both sizes.
    """

    def number(key: str) -> int:
        value: object = getattr(settings, key, 0)
        return value if isinstance(value, int) and value > 0 else 0

    width, inner = number("hidden_size"), number("intermediate_size")
    layers, rows = number("num_hidden_layers"), number("vocab_size")
    patches = (number("image_size") // max(1, number("patch_size"))) ** 2
    needed = 4 * (width * (2 * rows + patches) + layers * width * (4 * width + 3 * inner))
    what = f"{layers:,} layers of {width:,} with {rows:,} rows of vocabulary"
    check_size(name, needed, what, layers=layers)


def check_size(name: str, needed: int, what: str, *, layers: int) -> None:
    """Reject random weights of `needed` bytes that exceed this machine's memory.

    Args:
        name: The settings' full name in a recipe.
        needed: Bytes.
        what: What takes them, in the plural.
        layers: At most 10,000.

    Raises:
        ModelError: Names both sizes.
    """
    probe = torch.empty(0)
    if type(probe) is not torch.Tensor or probe.is_meta:
        return  # a model of fake tensors
    import psutil

    free = psutil.virtual_memory().available
    if needed > SHARE * free or layers > MOST_LAYERS:
        raise ModelError(
            f"{name}: {what} take about {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB of memory are "
            "free; make it smaller"
        )


def settings_text(settings: Mapping[str, Any]) -> str:
    """A recipe's settings in one line: `vocab_size 512, hidden_act gelu`."""
    return ", ".join(f"{name} {value!r}" for name, value in settings.items()) or "the defaults"


@contextmanager
def one_line(what: str) -> Generator[None]:
    """Turn whatever transformers raises at wrong settings or unreadable weights into one line.

    Its configs and models assert, index and divide by what they are given, so every exception
    counts, except a full memory and a `ModelError`, which says it already.

    Raises:
        ModelError: `what`, and the first line of the reason.
    """
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        if type(error) in (AssertionError, KeyError, IndexError, ZeroDivisionError) or not reason:
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        raise ModelError(f"{what} ({reason})") from None


@contextmanager
def without_report() -> Generator[None]:
    """Without transformers' table of tensors that do not fit, of which the caller tells."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
