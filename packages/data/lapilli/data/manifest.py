"""manifest.json: the facts of a dataset. Written last; a folder without it is no dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.shards import ShardFacts, write_atomic

__all__ = ["FORMAT", "Manifest", "ViewFacts", "digest", "read_manifest", "write_manifest"]

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class ViewFacts:
    """One view: its spec, the codecs that made it, and where image slot i is.

    Slot i is row `i % images_per_shard` of shard `i // images_per_shard`.
    """

    spec: dict[str, Any]
    codecs: dict[str, Any]
    images_per_shard: int
    shards: list[ShardFacts]


@dataclass(frozen=True)
class Manifest:
    """All a reader must know; training compares it with the model before step 0.

    Attributes:
        format: Version of this layout.
        fingerprint: Digest of every shard's checksum and the selection's: the data's identity.
        plan: Digest of inputs and settings by name, for noticing what changed.
        tokenizer: name, fingerprint, vocab_size and special ids.
        template: Name of the template.
        image_token: The placeholder in `input_ids`.
        counts: read, kept, quarantined, images, repairs and reasons.
        tokens: The token shards.
        views: The views by name.
        selection: Facts of `selection.arrow`.
        versions: Of the libraries that decide bytes.
    """

    format: int
    fingerprint: str
    plan: dict[str, str]
    tokenizer: dict[str, Any]
    template: str
    image_token: int
    counts: dict[str, Any]
    tokens: list[ShardFacts]
    views: dict[str, ViewFacts]
    selection: ShardFacts
    versions: dict[str, str]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in its one canonical spelling."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_manifest(output: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False)
    write_atomic(output / NAME, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_manifest(output: Path) -> Manifest:
    """Read a dataset's facts.

    Raises:
        DataError: No dataset here, an unfinished one, or one of another format.
    """
    path = output / NAME
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = (output / "plan.json").exists()
        what = "an unfinished build: run the same preprocess again" if unfinished else "no dataset"
        raise DataError(f"{output}: {what} (no {NAME})") from None
    except ValueError as error:
        raise DataError(f"{path}: no valid JSON ({error}); run preprocess again") from None
    if fields.get("format") != FORMAT:
        raise DataError(
            f"{path}: format {fields.get('format')!r}, this version reads {FORMAT}; preprocess again"
        )
    return _parse(fields)


def _parse(fields: Mapping[str, Any]) -> Manifest:
    values = dict(fields)
    values["tokens"] = [ShardFacts(**shard) for shard in fields["tokens"]]
    values["selection"] = ShardFacts(**fields["selection"])
    values["views"] = {
        name: ViewFacts(**{**view, "shards": [ShardFacts(**shard) for shard in view["shards"]]})
        for name, view in fields["views"].items()
    }
    return Manifest(**values)
