"""manifest.json: the facts of a dataset. Written last; a folder without it is no dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lapilli.data.access import cannot_read, exists, is_denied
from lapilli.data.errors import DataError
from lapilli.data.output import Output
from lapilli.data.record import excerpt
from lapilli.data.shards import ShardFacts, write_json
from lapilli.data.templates import Template, template_facts

__all__ = [
    "FORMAT",
    "PLAN",
    "Manifest",
    "ViewFacts",
    "digest",
    "read_manifest",
    "template_fingerprint",
    "write_manifest",
]

FORMAT = 3
NAME = "manifest.json"
PLAN = "plan.json"  # written first: whose build a folder is, finished or not


@dataclass(frozen=True)
class ViewFacts:
    """One view: its spec, the codecs that made it, and where image slot i is.

    Slot i is row `i % images_per_shard` of shard `i // images_per_shard`. `encoding` says how the
    pixels are stored (`kind`, `quality`) and, for `jpeg`, the `error` that this makes.
    `fast_error` is that of mode `fast` (`mean`, `psnr`, `worst`), over the view's first images.
    """

    spec: dict[str, Any]
    codecs: dict[str, Any]
    images_per_shard: int
    shards: list[ShardFacts]
    encoding: dict[str, Any] = field(default_factory=lambda: {"kind": "raw"})
    fast_error: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Manifest:
    """All a reader must know; training compares it with the model before step 0.

    Attributes:
        format: Version of this layout.
        fingerprint: Digest of every shard's checksum and the selection's: the data's identity.
        plan: Inputs and settings by name, as short text or a digest, for naming what changed.
        tokenizer: name, fingerprint, vocab_size and special ids.
        template: Name of the template.
        template_fields: All fields of the template, the tokenizer's own chat template in it.
        tokenizer_files: The tokenizer's own files, kept in `tokenizer/`.
        image_token: The placeholder in `input_ids`.
        counts: `read` = `kept` + `quarantined` records; records by `reasons` and by `sources`;
            distinct `images`; keys mended, by kind (`repairs`); images that are used in spite of
            something odd, by `images.Note` (`image_notes`, absent in older datasets).
            distinct `images`; keys mended, by kind (`repairs`); by source, records by the
            name of a field that nothing reads (`fields`), and `members` of archives.
        mixture: The blend as it came out: by source `kept`, `held_out`, distinct records `used`,
            `records` and `tokens` of an epoch, `epochs`, and its true `share`.
        tokens: The token shards.
        views: The views by name.
        selection: Facts of `selection.arrow`.
        versions: Of the libraries that decide bytes.
        quarantine: Facts of the file of quarantined records.
        inputs: Facts of the file that says which image and record each slot and row was made of;
            `--amend` begins there.
        repairs: Facts of the file of keys that were mended.
    """

    format: int
    fingerprint: str
    plan: dict[str, str]
    tokenizer: dict[str, Any]
    template: str
    image_token: int
    counts: dict[str, Any]
    mixture: dict[str, Any]
    tokens: list[ShardFacts]
    views: dict[str, ViewFacts]
    selection: ShardFacts
    versions: dict[str, str]
    quarantine: ShardFacts | None = None
    inputs: ShardFacts | None = None
    repairs: ShardFacts | None = None
    template_fields: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizer_files: list[ShardFacts] = field(default_factory=list[ShardFacts])

    def bound_template(self, where: object) -> Template:
        """The template that the records were written with; no file beside is asked.

        Args:
            where: The dataset, for an error.

        Raises:
            DataError: It is not kept here, or not what it was.
        """
        again = "run the same preprocess again, it writes the manifest anew"
        if not self.template_fields:
            raise DataError(f"{where}: {NAME} does not hold the template's fields; {again}")
        template = Template(**self.template_fields)
        if (found := digest(template_facts(template))) != (was := self.plan.get("template", "")):
            raise DataError(
                f"{where}: template_fields of {NAME} are not what the dataset was made with "
                f"(fingerprint was {was[:12]}, is {found[:12]}); {again}"
            )
        return template


def template_fingerprint(template: Template) -> str:
    """Digest of how a template writes a conversation down, whatever it is called."""
    return digest({**asdict(template), "name": ""})


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in its one canonical spelling."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_manifest(output: Output, manifest: Manifest) -> None:
    """Write `manifest.json` atomically."""
    write_json(output / NAME, asdict(manifest))


def read_manifest(output: Output) -> Manifest:
    """Read a dataset's facts.

    Raises:
        DataError: No dataset here, an unfinished one, or one of another format.
    """
    path = output / NAME
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise DataError(
                f"{path}: format {fields['format']!r}, this version reads {FORMAT}; run preprocess "
                "into another --output"
            )
        return _parse(fields)
    except FileNotFoundError:
        unfinished = exists(output / PLAN)
        what = (
            "an unfinished build: run the same preprocess again"
            if unfinished
            else "no dataset; give the --output of a preprocess that has finished"
        )
        raise DataError(f"{output}: {what} (no {NAME})") from None
    except OSError as error:
        if is_denied(error):
            raise DataError(cannot_read(path, error)) from None
        raise DataError(f"{path}: {error.strerror}; check the path") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: no manifest ({type(error).__name__}: {excerpt(str(error))}); "
            "run the same preprocess again, it writes it anew"
        ) from None


def _parse(fields: Mapping[str, Any]) -> Manifest:
    values = dict(fields)
    for name in ("tokens", "tokenizer_files"):
        values[name] = [ShardFacts(**shard) for shard in fields.get(name, [])]
    values["selection"] = ShardFacts(**fields["selection"])
    for name in ("quarantine", "inputs", "repairs"):
        values[name] = ShardFacts(**fields[name]) if fields.get(name) else None
    values["views"] = {
        name: ViewFacts(
            view["spec"],
            view["codecs"],
            view["images_per_shard"],
            [ShardFacts(**shard) for shard in view["shards"]],
            view["encoding"],
            view.get("fast_error", {}),
        )
        for name, view in fields["views"].items()
    }
    return Manifest(**values)
