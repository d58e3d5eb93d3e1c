"""Arrow schemas of a dataset's files, and the values of their enumerations."""

from __future__ import annotations

import pyarrow as pa

__all__ = [
    "FAST_COLUMNS",
    "HELD_OUT",
    "IMAGE_BULK",
    "IMAGE_SCHEMA",
    "INPUT_SCHEMA",
    "JPEG_SCHEMA",
    "OK",
    "REFUSED",
    "SELECTION_SCHEMA",
    "TARGETS_BESIDE",
    "TARGET_SCHEMA",
    "TOKENS_BESIDE",
    "TOKEN_SCHEMA",
    "TRAIN",
    "UNUSED",
]


TRAIN, HELD_OUT = "train", "held_out"  # the splits


OK = "ok"  # status of an image that a view has pixels of


REFUSED = "refused"  # status of an image of which a teacher gives numbers that are not finite


UNUSED = "unused"  # status of a slot whose image no record names any more


# Images are large_binary: 32-bit offsets overflow at 2 GiB.
IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("status", pa.string()),  # "ok" or a Reason
        ("detail", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("encoding", pa.string()),  # "raw": uint8 height x width x RGB; "jpeg"; "original"
        ("pixels", pa.large_binary()),
    ]
)


JPEG_SCHEMA = pa.schema(
    [
        *IMAGE_SCHEMA,
        ("absolute_error", pa.int64()),  # what JPEG has changed, summed over the image's values
        ("squared_error", pa.int64()),
        ("worst_error", pa.int32()),
    ]
)


TARGET_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("status", pa.string()),  # "ok", a Reason, "unused" or "refused" by the teacher
        ("detail", pa.string()),
        ("features", pa.large_binary()),  # rows x width, int8 or bf16
        ("scales", pa.large_binary()),  # of int8: rows, fp32; a row is its numbers times its scale
        ("squared_difference", pa.float64()),  # of what is stored and what the teacher gave
        ("squared_length", pa.float64()),  # of what the teacher gave
    ]
)


FAST_COLUMNS = (  # what mode `fast` has changed, of the images that were made exactly too
    pa.field("fast_absolute_error", pa.int64()),
    pa.field("fast_squared_error", pa.int64()),
    pa.field("fast_worst_error", pa.int32()),
)


INPUT_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # "image" by slot, then "record" by token row
        ("name", pa.string()),
        ("stamp", pa.binary()),  # tells the content under the name from another
    ]
)


TOKEN_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),  # -200 at an image's place
        ("label_spans", pa.list_(pa.int32())),  # start, end, start, end, ... of trained ids
        ("text_length", pa.int32()),  # ids without the placeholders
        ("num_trained", pa.int32()),
        ("image_ids", pa.list_(pa.string())),
        ("llava_length", pa.int32()),
    ]
)


SELECTION_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("token_shard", pa.int32()),
        ("token_row", pa.int32()),
        ("image_slots", pa.list_(pa.int32())),
        ("text_length", pa.int32()),
        ("num_trained", pa.int32()),
        ("llava_length", pa.int32()),
        ("split", pa.string()),  # "train" or "held_out"
        ("repeats", pa.int32()),  # how often the row occurs in an epoch of its split
    ]
)


# What finishing a build asks of its shards, which lies beside them too.
TOKENS_BESIDE = ("sample_id", "text_length", "num_trained", "llava_length")


TARGETS_BESIDE = ("status", "squared_difference", "squared_length")


IMAGE_BULK = frozenset({"pixels", "source_width", "source_height", "encoding"})  # it never asks


_SCHEMAS = (JPEG_SCHEMA, TARGET_SCHEMA, FAST_COLUMNS, INPUT_SCHEMA, TOKEN_SCHEMA, SELECTION_SCHEMA)


COLUMN_TYPES = {field.name: field.type for schema in _SCHEMAS for field in schema}


NULLABLE = {field.name for field in (*JPEG_SCHEMA, *TARGET_SCHEMA, *FAST_COLUMNS)} - {
    "image_id",
    "status",
}
