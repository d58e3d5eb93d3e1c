"""Train a small tokenizer on a mixture's own texts, for a model with random weights.

lapilli tokenizer --config photos_data.yaml --root photos --output tokenizer

A pretrained language model has its own tokenizer and needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.access import require_writable
from lapilli.data.sources.root_address import with_root_address
from lapilli.data.sources.validation import read_entries
from lapilli.data.text.tokenizer_files import has_vocabulary, train_tokenizer
from pipelines.cli.command import UsageError, parse, run, say

__all__ = ["TokenizerConfig", "main", "train"]

MARKER = "<image>"


@dataclass(frozen=True)
class TokenizerConfig(BuildConfig):
    """A recipe for `preprocess`, of which only the sources are read.

    Attributes:
        output: Folder of the tokenizer to write.
        vocab_size: Tokens of the vocabulary, 259 or more; the language model's `vocab_size`.
        tokenizer: Not read.
        template: Not read.
        views: Not read.
    """

    vocab_size: int = 512
    tokenizer: str = ""
    template: str = ""
    views: dict[str, ImageSpec] = field(default_factory=dict[str, ImageSpec])

    def __post_init__(self) -> None:
        """Check the sources; the rest is for `preprocess`."""
        if not self.sources:
            raise DataError("sources: empty; expected at least one {name, annotations, images}")


def train(config: TokenizerConfig) -> int:
    """Train on every question and answer of the sources; returns the number of texts.

    Raises:
        DataError: No record can be read, or `vocab_size` is too small.
        UsageError: The folder holds a tokenizer already.
    """
    output = Path(config.output)
    if output.is_dir() and has_vocabulary(output):
        raise UsageError(
            f"output: {output} holds a tokenizer; use it with preprocess --tokenizer {output}, or "
            "choose another --output"
        )
    require_writable("output", output)
    texts = [*_texts(config)]
    if not texts:
        raise DataError(
            f"sources: no record below {config.root} can be read; look at them with lapilli check"
        )
    train_tokenizer(texts, output, vocab_size=config.vocab_size)
    return len(texts)


def _texts(config: TokenizerConfig) -> Iterator[str]:
    for source in config.sources:
        for entry in read_entries(source, Path(config.root)):
            if entry.record is not None and entry.verdict.kept:
                for turn in entry.record.turns:
                    yield turn.text.replace(MARKER, "").strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        TokenizerConfig, argv, "Train a tokenizer on a mixture's texts.", addresses=["root"]
    )
    count = train(with_root_address(config))
    say(f"{config.output}: {config.vocab_size} tokens at most, trained on {count:,} texts")
    return 0


if __name__ == "__main__":
    run(main)
