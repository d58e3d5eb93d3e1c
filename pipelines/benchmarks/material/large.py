"""A dataset of LLaVA-1.5's size whose shards are made at once: every number right, no build."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data.io.atomic import ShardFacts, write_json
from lapilli.data.shards.manifest import FORMAT, PLAN, Manifest, ViewFacts, write_manifest
from lapilli.data.shards.schemas import IMAGE_SCHEMA, SELECTION_SCHEMA, TOKEN_SCHEMA

__all__ = ["RECORDS", "write_large"]

CLIP_MEAN = (122, 116, 104)

RECORDS = 665_298
PER_TOKEN_SHARD = 8192


def write_large(
    path: Path,
    *,
    records: int = RECORDS,
    size: int = 336,
    shards: int = 4,
    per_shard: int = 16,
    stubs: int = 0,
) -> Path:
    """Write a dataset with one view, `wide`.

    Args:
        path: Its folder.
        records: Records; one of seven is text only. Their images take turns.
        size: Side of the squares, in pixels.
        shards: Image shards with pixels.
        per_shard: Images in each.
        stubs: Image shards beside them that are of the right size and hold nothing.
    """
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    text = np.minimum(rng.lognormal(5.2, 0.8, records).astype(np.int32) + 24, 6000)
    images = (np.arange(records) % 7 != 0).astype(np.int32)
    tokens = _write_tokens(path, text, images)
    slots = rng.permutation(records) % (shards * per_shard)
    offsets = np.concatenate([[0], np.cumsum(images)]).astype(np.int32)
    columns: dict[str, Any] = {
        "sample_id": [f"mix665k/{i:09d}" for i in range(records)],
        "token_shard": (np.arange(records) // PER_TOKEN_SHARD).astype(np.int32),
        "token_row": (np.arange(records) % PER_TOKEN_SHARD).astype(np.int32),
        "image_slots": pa.ListArray.from_arrays(offsets, slots[images > 0].astype(np.int32)),
        "text_length": text,
        "num_trained": text // 2,
        "llava_length": text // 2,
        "split": pa.array(["train"]).take(pa.array(np.zeros(records, np.int32))),
        "repeats": np.ones(records, np.int32),
    }
    selection = _write(path, "selection.arrow", columns, SELECTION_SCHEMA)
    view = [_write_images(path, n, size, per_shard) for n in range(shards)]
    view += [_write_stub(path, n, view[0]) for n in range(shards, shards + stubs)]
    pq.write_table(
        pa.table({n: pa.array([], pa.string()) for n in
                  ("source", "record_id", "sample_id", "reason", "detail", "record")}),
        path / "quarantine.parquet",
    )  # fmt: skip
    facts = _manifest(records, int(text.sum()), tokens, view, selection, size, per_shard)
    write_json(path / PLAN, {})
    write_manifest(path, facts)
    return path


def _manifest(
    records: int,
    total: int,
    tokens: list[ShardFacts],
    view: list[ShardFacts],
    selection: ShardFacts,
    size: int,
    per_shard: int,
) -> Manifest:
    """The facts of the dataset; `total` is its text tokens."""
    used = {"kept": records, "held_out": 0, "used": records, "records": records,
            "tokens": total, "epochs": 1.0, "share": 1.0}  # fmt: skip
    return Manifest(
        format=FORMAT,
        fingerprint=selection.sha256,
        plan={},
        tokenizer={
            "name": "made up", "vocab_size": 32_000, "fingerprint": "0" * 64,
            "bos_id": 1, "eos_id": 2, "pad_id": None,
        },
        template="v1",
        image_token=-200,
        counts={"read": records, "kept": records, "quarantined": 0, "reasons": {},
                "sources": {"mix665k": records}, "images": sum(s.rows for s in view),
                "repairs": {}},
        mixture={"unit": "records", "records": records, "tokens": total,
                 "held_out": 0, "sources": {"mix665k": used}},
        tokens=tokens,
        views={"wide": ViewFacts(
            spec={"size": size, "fill": CLIP_MEAN, "aspect": "pad", "mode": "exact"},
            codecs={"decoder": "pillow", "resizer": "pillow", "resizer_version": "13"},
            images_per_shard=per_shard, shards=view)},
        selection=selection,
        versions={},
    )  # fmt: skip


def _write(path: Path, name: str, columns: dict[str, Any], schema: pa.Schema) -> ShardFacts:
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    batch = pa.record_batch([pa.array(columns[f.name], type=f.type) for f in schema], schema=schema)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return ShardFacts(name, batch.num_rows, file.stat().st_size, digest)


def _write_tokens(path: Path, text: np.ndarray, images: np.ndarray) -> list[ShardFacts]:
    facts: list[ShardFacts] = []
    for number, start in enumerate(range(0, len(text), PER_TOKEN_SHARD)):
        rows = slice(start, start + PER_TOKEN_SHARD)
        length, pictured = text[rows], images[rows]
        count = len(length)
        ends = np.concatenate([[0], np.cumsum(length + pictured)]).astype(np.int32)
        ids = np.arange(ends[-1], dtype=np.int32) % 32_000
        ids[ends[:-1][pictured > 0]] = -200
        spans = np.stack([length - length // 2, length], 1).astype(np.int32).reshape(-1)
        columns: dict[str, Any] = {
            "sample_id": [f"mix665k/{i:09d}" for i in range(start, start + count)],
            "source": pa.array(["mix665k"] * count),
            "input_ids": pa.ListArray.from_arrays(ends, ids),
            "label_spans": pa.ListArray.from_arrays(
                np.arange(0, 2 * count + 1, 2, dtype=np.int32), spans
            ),
            "text_length": length,
            "num_trained": length // 2,
            "image_ids": [["some.jpg"] * int(n) for n in pictured],
            "llava_length": length // 2,
        }
        facts.append(_write(path, f"tokens/made/{number:05d}.arrow", columns, TOKEN_SCHEMA))
    return facts


def _image_name(number: int) -> str:
    return f"images/wide/{number:05d}.arrow"


def _write_images(path: Path, number: int, size: int, count: int) -> ShardFacts:
    rng = np.random.default_rng(number)
    columns: dict[str, Any] = {
        "image_id": [f"{number}/{row}.jpg" for row in range(count)],
        "status": ["ok"] * count,
        "detail": [""] * count,
        "source_width": rng.integers(200, 1200, count).astype(np.int32),
        "source_height": rng.integers(200, 1200, count).astype(np.int32),
        "encoding": ["raw"] * count,
        "pixels": [rng.bytes(size * size * 3) for _ in range(count)],
    }
    return _write(path, _image_name(number), columns, IMAGE_SCHEMA)


def _write_stub(path: Path, number: int, like: ShardFacts) -> ShardFacts:
    name = _image_name(number)
    with (path / name).open("wb") as file:
        file.truncate(like.bytes)
    return ShardFacts(name, like.rows, like.bytes, "0" * 64)
