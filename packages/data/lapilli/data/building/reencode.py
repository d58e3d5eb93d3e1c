"""Check a build: its first records, encoded with the stored tokenizer, give the same ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lapilli.data.building.run_task import encode_rows
from lapilli.data.errors import DataError
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.shard_task import TokenTask
from lapilli.data.record import excerpt
from lapilli.data.shards.files import open_table
from lapilli.data.shards.schemas import TOKEN_SCHEMA

__all__ = ["REENCODED", "check_ids"]

REENCODED = 1000  # records: 50 ms


def check_ids(
    plan: BuildPlan, output: Output, tokens: Sequence[ShardFacts], folder: Path, tokenizer: Any
) -> None:
    """Compare what a copy of the tokenizer writes with what the shards hold.

    Args:
        plan: The build's plan.
        output: Where its token shards are.
        tokens: Their facts, in the order of the plan's groups.
        folder: The copy.
        tokenizer: What was loaded from it.

    Raises:
        DataError: Other ids; names both tokenizers, the record and the place.
    """
    rows = list(islice(_rows(plan, output, tokens), REENCODED))
    task = TokenTask(
        name="",
        writer=plan.digests["writer"],
        packed=tuple(packed for packed, _, _ in rows),
        image_ids=(),
        tokenizer=str(folder),
        fingerprint=plan.tokenizer.fingerprint,
        template=plan.template,
        compat=plan.config.compat,
        max_text_length=plan.config.max_text_length,
    )
    again = encode_rows(task.records(), task, tokenizer)
    for (_, sample_id, ids), encoded in zip(rows, again, strict=True):
        if encoded.input_ids != ids:
            pairs = enumerate(zip(ids, encoded.input_ids, strict=False))
            place = next(
                (n for n, (a, b) in pairs if a != b), min(len(ids), len(encoded.input_ids))
            )
            raise DataError(
                f"tokenizer: the copy for {output} writes other ids than {plan.config.tokenizer} "
                f"did: {len(encoded.input_ids)} where the shard has {len(ids)} for "
                f"{excerpt(sample_id)}, different from place {place} on; see that all nodes have "
                "the same library versions, and preprocess into another --output"
            )


def _rows(
    plan: BuildPlan, output: Output, tokens: Sequence[ShardFacts]
) -> Iterator[tuple[bytes, str, list[int]]]:
    """The packed record, sample id and ids of each row that is wanted, in order."""
    packed = plan.kept_packed()
    for group, facts in zip(plan.token_groups, tokens, strict=True):
        table = open_table(output, facts, TOKEN_SCHEMA, ["sample_id", "input_ids"])
        # A shard that stays as it is has rows that are no longer wanted; a new one has none.
        places = [p for p in group.kept if p is not None or group.facts is not None]
        for row, place in enumerate(places):
            if place is not None:
                ids: list[int] = table["input_ids"][row].as_py()
                yield packed[place], str(table["sample_id"][row].as_py()), ids
