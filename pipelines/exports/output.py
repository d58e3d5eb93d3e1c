"""What all exports of models share: the run, the disk space, the atomic folder."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lapilli.data.cluster.places import check_places
from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.cluster.probe import JobPlaces
from lapilli.data.io.access import FULL, exists, is_denied, is_folder, naming, subpaths
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.printable import bytes_text
from lapilli.data.io.remote_path import RemotePath
from lapilli.data.trust import Trust
from lapilli.model.interop.hf import FACTS
from lapilli.model.interop.weights import Progress
from lapilli.model.parts.quantized import numbers_of
from lapilli.model.parts.trainable import is_adapter
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import Assistant, open_assistant
from lapilli.train.inference.published import is_published
from lapilli.train.run_folder.names import CONFIG
from lapilli.train.run_folder.scratch import SCRATCH
from pipelines.cli.command import progress_bar, say

__all__ = ["filled", "open_run", "stored", "tokenizer_bytes", "weight_bytes", "writing_progress"]

SETTINGS_BYTES = 64 << 10  # the JSON files of an export, generously


def open_run(run: str, output: Path, trust: Trust) -> Assistant:
    """The model that is exported.

    Raises:
        TrainError, DataError, ModelError: No run, or an output that is there already.
    """
    if not run:
        raise TrainError("run: nothing named; pass the folder of a training run")
    if exists(output) and not is_folder(output):
        raise TrainError(f"output: {output} is a file; choose another name")
    if subpaths(output):
        raise TrainError(f"output: {output} is not empty; choose another folder")
    if is_published(Path(run)):
        what = "an export already" if exists(Path(run) / FACTS) else "a model of others"
        raise TrainError(f"run: {run} is {what}; expected a training run's folder")
    return open_assistant(Path(run), trust=trust)


def weight_bytes(part: Any, size: int) -> int:
    """Bytes of a part's weights, adapters merged, each number in `size` bytes."""
    named = part.named_parameters()
    return sum(size * numbers_of(value) for name, value in named if not is_adapter(name))


def tokenizer_bytes(tokenizer: Any) -> int:
    """Bytes of a tokenizer's own files; a copy may have its `tokenizer.json` beside them anew."""
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    own = sum(path.stat().st_size for path in subpaths(folder) if path.is_file())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return own + (len(backend.to_str().encode()) if backend is not None else 0)


@contextmanager
def writing_progress() -> Generator[Progress]:
    """Show the bytes of weights that are written."""
    with progress_bar() as bar:
        task = bar.add_task("MB written", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=round(done / 1e6), total=round(total / 1e6))

        yield on_progress


@contextmanager
def filled(output: Path, needed: int) -> Generator[Path]:
    """A folder beside `output` to fill, which becomes it when all is there and goes if not.

    Args:
        output: The folder that is asked for.
        needed: Bytes of all that will be written but a few settings.

    Raises:
        TrainError: There is no room for it, or it cannot be written.
    """
    needed += SETTINGS_BYTES
    temporary = output.absolute().with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        if needed > shutil.disk_usage(temporary).free:  # before any weights are merged
            raise _no_room(output, needed)
        with naming(temporary):
            yield temporary
        if is_folder(output):
            output.rmdir()  # empty: `open_run` has looked
        temporary.rename(output)
    except OSError as error:
        if error.errno in FULL:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _no_room(output, needed, f": {error.strerror};") from None
        if is_denied(error) or error.errno == errno.ENOTEMPTY:
            raise TrainError(
                f"output: {output} cannot be written ({error.strerror}); choose another --output"
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def stored(output: str) -> Generator[str]:
    """A folder to fill in place of an address, whose files are stored there in the end.

    Raises:
        TrainError: There is something at the address.
        DataError: The store cannot be read or written.
    """
    if not is_remote(output):
        yield output
        return
    target = RemotePath(output.rstrip("/"))
    if target.exists():
        raise TrainError(f"output: {output} is not empty; choose another address")
    check_places(JobPlaces({}, {}, {"output": output}), PoolConfig())  # before the work
    with tempfile.TemporaryDirectory(prefix="lapilli-export-", dir=os.environ.get(SCRATCH)) as made:
        folder = Path(made) / target.name
        yield str(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == CONFIG):  # then the rest is there
            (target / str(path.relative_to(folder))).put(path)
    say(f"{output}: {len(files)} files stored")


def _no_room(output: Path, needed: int, why: str = "") -> TrainError:
    """The line for a disk that is too small; of a quota its free space says nothing, `why` does."""
    free = shutil.disk_usage(output.absolute().parent).free
    return TrainError(
        f"output: {output}{why} has {bytes_text(free)} free, the export needs "
        f"{bytes_text(needed)}; free space or choose another --output"
    )
