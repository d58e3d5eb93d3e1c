"""Tokens a second of a token shard's task, against the bare Rust tokenizer, on one core.

The floor is `encode_batch_fast` of the `tokenizers` package on each conversation's whole text, its
ids not read. Ours starts from records and ends with a finished shard: written down, tokenised,
trained spans found, LLaVA's word counts, Arrow, checksum, disk. Both take turns, shard by shard,
and are told in seconds of the processor: one thread each, pinned to a core.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lapilli.data.building.run_task import run_task
from lapilli.data.images.buffers import peak_resident
from lapilli.data.planning.shard_task import TokenTask, writer_version
from lapilli.data.record import Record, pack
from lapilli.data.shards.files import finished_facts, open_table
from lapilli.data.shards.schemas import TOKEN_SCHEMA
from lapilli.data.text.encode import bind_template, load_tokenizer, tokenizer_facts
from lapilli.data.text.rendering import TextSegment, render
from lapilli.data.text.templates import Template, get_template
from lapilli.data.text.tokenizer import backend_for
from pipelines.benchmarks.harness import (
    Elapsed,
    add_row,
    clock,
    pin_to_one_core,
    provenance,
)
from pipelines.benchmarks.material.corpus import conversations
from pipelines.cli.command import parse, say

__all__ = ["TokensConfig", "main"]

AT_ONCE = 1024  # texts in one call of the bare tokenizer


@dataclass(frozen=True)
class TokensConfig:
    """What is measured.

    Attributes:
        tokenizer: Hub name or folder of a tokenizer.
        template: Name of a template.
        records: Conversations; the default is LLaVA-1.5's mixture.
        records_per_shard: Records in a token shard.
        seed: Draws the conversations.
        save: Add the row to `results/tokens.csv`.
    """

    tokenizer: str
    template: str = "v1"
    records: int = 665_298
    records_per_shard: int = 8192
    seed: int = 0
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Measure, tell, and add the row."""
    config = parse(TokensConfig, argv, "Tokens a second against the bare Rust tokenizer.")
    # Read by the Rust side at its first call.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    say(f"pinned to core {pin_to_one_core()}; {config.records} records, template {config.template}")
    # Taken before: it names the code that is measured, not what is there when the run ends.
    row = provenance(("tokenizers", "transformers", "pyarrow"), "tokens", argv)
    figures = measure(config)
    say(
        f"ours {figures['tokens_per_cpu_second']:,} tokens/s, "
        f"bare {figures['bare_per_cpu_second']:,}; "
        f"ratio {figures['ratio']}; most memory {figures['peak_mb']} MB, "
        f"{figures['peak_first_shard_mb']} MB after the first shard"
    )
    if config.save:
        say(f"row added to {add_row('tokens', row | figures)}; add a line to LOG.md beside it")
    return 0


def measure(config: TokensConfig) -> dict[str, Any]:
    """Both sides by turns, shard by shard; the figures of a row."""
    ours, bare = _Side(), _Side()
    backend = backend_for(load_tokenizer(config.tokenizer)).first
    first_peak = shards = 0
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        for task, texts in _shards(config):
            sides = [
                lambda t=task: ours.add(clock(lambda: run_task(t, output))[0], _tokens(t, output)),
                lambda t=texts: bare.add(*clock(lambda: _bare(backend, t))),
            ]
            # Who goes first changes, so that neither always has the warmer caches.
            for side in sides if shards % 2 else reversed(sides):
                side()
            shards += 1
            first_peak = first_peak or peak_resident()
    return {
        "tokenizer": Path(config.tokenizer).name,
        "template": config.template,
        "records": config.records,
        "shards": shards,
        "tokens": ours.tokens,
        "tokens_per_cpu_second": ours.rate(),
        "bare_per_cpu_second": bare.rate(),
        "ratio": round(ours.rate() / bare.rate(), 3),
        "ratio_by_wall_clock": round(bare.wall / ours.wall * ours.tokens / bare.tokens, 3),
        "peak_mb": peak_resident() // 10**6,
        "peak_first_shard_mb": first_peak // 10**6,
    }


class _Side:
    """Tokens and seconds of one of the two."""

    def __init__(self) -> None:
        self.tokens = 0
        self.cpu = self.wall = 0.0

    def add(self, elapsed: Elapsed, tokens: int) -> None:
        """Count one shard."""
        self.tokens += tokens
        self.cpu += elapsed.cpu
        self.wall += elapsed.wall

    def rate(self) -> int:
        """Tokens a second of the processor."""
        return round(self.tokens / self.cpu)


def _shards(config: TokensConfig) -> Iterator[tuple[TokenTask, list[str]]]:
    """A task for ours and the same conversations as whole texts for the bare tokenizer."""
    tokenizer: Any = load_tokenizer(config.tokenizer)
    template = bind_template(get_template(config.template), tokenizer)
    fingerprint = tokenizer_facts(tokenizer).fingerprint
    corpus = conversations(config.records, config.seed)
    while records := tuple(islice(corpus, config.records_per_shard)):
        images = tuple(record.images for record in records)
        task = TokenTask(
            name="tokens/shard.arrow",
            writer=writer_version(),
            packed=tuple(map(pack, records)),
            image_ids=images,
            tokenizer=config.tokenizer,
            fingerprint=fingerprint,
            template=template,
            compat=None,
            max_text_length=0,
        )
        yield task, [_whole(record, template) for record in records]


def _whole(record: Record, template: Template) -> str:
    page = render(record, template)
    return "".join(segment.text for segment in page if isinstance(segment, TextSegment))


def _tokens(task: TokenTask, output: Path) -> int:
    """Ids of the shard on the disk, images left out."""
    facts = finished_facts(output, task.name)
    assert facts is not None
    return sum(open_table(output, facts, TOKEN_SCHEMA)["text_length"].to_pylist())


def _bare(backend: Tokenizer, texts: list[str]) -> int:
    """Tokens that the Rust tokenizer makes of the texts."""
    tokens = 0
    for start in range(0, len(texts), AT_ONCE):
        batch = texts[start : start + AT_ONCE]
        tokens += sum(map(len, backend.encode_batch_fast(batch, add_special_tokens=False)))
    return tokens
