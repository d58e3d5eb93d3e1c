"""Run one task: decode images, ask a teacher or tokenize records into one shard.

Pixels never pass through Ray's object store: a task reads files, writes its shard and returns
the shard's facts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lapilli.data.building.image_shard import Guard, image_columns, image_schema, unguarded
from lapilli.data.building.target_shard import target_columns
from lapilli.data.errors import DataError
from lapilli.data.images.buffers import Room
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.shard_task import ImageTask, TargetTask, Task, TokenTask, writer_version
from lapilli.data.record import Reason, Record
from lapilli.data.shards.files import begin_shard
from lapilli.data.shards.schemas import (
    IMAGE_BULK,
    IMAGE_SCHEMA,
    TARGET_SCHEMA,
    TARGETS_BESIDE,
    TOKEN_SCHEMA,
    TOKENS_BESIDE,
)
from lapilli.data.shards.summaries import Summaries
from lapilli.data.text.encode import (
    Encoded,
    encode_batch,
    llava_length,
    load_tokenizer,
    tokenizer_facts,
    truncate,
)
from lapilli.data.text.llava_compat import LLAVA_MAX_LENGTH, encode_as_llava

__all__ = ["begin_task", "finished_task", "run_task"]

RECORDS_AT_ONCE = 256  # limits memory beside the shard's own columns to about 20 MB
_ROOM = Room()  # a process makes one shard at a time


def finished_task(task: Task, shards: Summaries) -> ShardFacts | None:
    """The facts of a task's shard if an earlier run finished it, or None if it is to be made.

    The plan saw every file, so a file that was gone, or could not be read, when its turn came
    leaves a shard that does not follow from the plan: it is made again.
    """
    facts = shards.finished(task.name)
    if facts is not None and isinstance(task, ImageTask):
        column = shards.table(facts, IMAGE_SCHEMA, ["status"])["status"]
        statuses: set[Any] = set(column.to_pylist())
        if statuses & {str(Reason.IMAGE_MISSING), str(Reason.IMAGE_UNREADABLE)}:
            return None
    return facts


def run_task(task: Task, output: Output, guard: Guard = unguarded) -> ShardFacts:
    """Make one shard, in this process; see `begin_task`."""
    return begin_task(task, output, guard)()


def begin_task(task: Task, output: Output, guard: Guard = unguarded) -> Callable[[], ShardFacts]:
    """Make a shard's rows in this process; `guard` wraps the decoding of each image.

    Returns:
        What finishes the shard: it waits for the disk or the store, and may be called in another
        thread while the next task is begun.

    Raises:
        DataError: This process has other libraries or another tokenizer than the driver, or the
            shard cannot be written.
    """
    if task.writer != writer_version():
        raise DataError(
            f"libraries differ: this worker has {writer_version()}, the build was planned with "
            f"{task.writer}; install the same versions on every node"
        )
    with warnings.catch_warnings():
        # Pillow warns of large images, odd palettes and EXIF: a line for each of 600,000 files.
        # What there is to say of a template was said when the build was planned.
        warnings.simplefilter("ignore")
        if isinstance(task, TokenTask):
            columns = _token_columns(task)
            return begin_shard(output, task.name, columns, TOKEN_SCHEMA, TOKENS_BESIDE)
        if isinstance(task, TargetTask):
            columns = target_columns(task, guard)
            return begin_shard(output, task.name, columns, TARGET_SCHEMA, TARGETS_BESIDE)
        columns = image_columns(task, guard, _ROOM)
        schema = image_schema(task)
        beside = [name for name in schema.names if name not in IMAGE_BULK]
        return begin_shard(output, task.name, columns, schema, beside)


def _token_columns(task: TokenTask) -> dict[str, list[Any]]:
    folder = task.name.rpartition("/")[0]
    tokenizer = _tokenizer(task.tokenizer, task.fingerprint, folder)
    records = task.records()
    columns: dict[str, list[Any]] = {
        "sample_id": [record.sample_id for record in records],
        "source": [record.source for record in records],
        "image_ids": [list(ids) for ids in task.image_ids],
        "llava_length": [llava_length(record) for record in records],
    }
    rows: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "label_spans", "text_length", "num_trained")
    }
    for encoded in encode_rows(records, task, tokenizer):
        spans = _predictable(encoded)
        # An array takes 4 bytes an id, a list of Python's ints 36.
        rows["input_ids"].append(np.array(encoded.input_ids, np.int32))
        rows["label_spans"].append(spans)
        rows["text_length"].append(encoded.text_length)
        rows["num_trained"].append(sum(spans[1::2]) - sum(spans[::2]))
    return columns | rows


@lru_cache(maxsize=2)
def _tokenizer(name: str, fingerprint: str, folder: str) -> Any:
    """The driver's tokenizer, loaded once a process: half a second, that of 400,000 tokens.

    Loaded again for shards of another folder, whose name stands for all that decides ids.
    """
    del folder
    tokenizer = load_tokenizer(name)
    if tokenizer_facts(tokenizer).fingerprint != fingerprint:
        raise DataError(
            f"tokenizer: {name} on this worker differs from the driver's; "
            "give every node the same files and library versions"
        )
    return tokenizer


def encode_rows(records: Sequence[Record], task: TokenTask, tokenizer: Any) -> Iterator[Encoded]:
    """The rows of a task's records in order, a few at a time, cut where its settings say so."""
    most = task.max_text_length
    for start in range(0, len(records), RECORDS_AT_ONCE):
        part = records[start : start + RECORDS_AT_ONCE]
        if task.compat == "llava":
            most = most or LLAVA_MAX_LENGTH
            rows = encode_as_llava(part, tokenizer, task.template, max_length=most)
        else:
            rows = encode_batch(part, tokenizer, task.template)
        for row in rows:
            yield truncate(row, most)


def _predictable(row: Encoded) -> list[int]:
    """The spans without the record's first id, which no earlier id predicts.

    So `num_trained` is the number of targets the collator makes of the row, and the loss of a
    global batch is divided by what it sums, for templates that train everything too.
    """
    spans = list(row.label_spans)
    if spans[:1] == [0]:
        spans[0] = 1
    return spans[2:] if spans[:2] == [1, 1] else spans
