"""manifest.json: the facts of a dataset, written last."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from lapilli.data.errors import DataError
from lapilli.data.images.encodings import ORIGINAL
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.access import cannot_read, exists, is_denied
from lapilli.data.io.atomic import ShardFacts, write_json
from lapilli.data.io.remote_path import Output
from lapilli.data.io.typed_json import JsonError, Natural, as_type, from_json
from lapilli.data.io.whole_file import read_whole
from lapilli.data.text.templates import Template, template_facts

__all__ = [
    "FORMAT",
    "PLAN",
    "TOKENIZER",
    "Manifest",
    "TargetFacts",
    "TokenizerFields",
    "ViewFacts",
    "digest",
    "read_manifest",
    "template_fingerprint",
    "write_manifest",
]

FORMAT = 3
NAME = "manifest.json"
TOKENIZER = "tokenizer"  # the folder of the tokenizer's files, in a dataset and in a run
IMAGE_TOKEN = -200  # what every reader of a token shard takes for an image's place
PLAN = "plan.json"  # written first: whose build a folder is, finished or not


class TokenizerFields(TypedDict):
    """What a manifest keeps of a tokenizer (`backend.TokenizerFacts`)."""

    name: str
    fingerprint: str
    vocab_size: Natural
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None


class _Members(TypedDict):
    total: Natural
    used: dict[str, Natural]
    unused: dict[str, Natural]
    unknown: dict[str, Natural]


class _Counts(TypedDict):
    read: Natural
    kept: Natural
    quarantined: Natural
    images: Natural
    reasons: dict[str, Natural]
    sources: dict[str, Natural]
    repairs: dict[str, Natural]
    image_notes: NotRequired[dict[str, Natural]]
    unused_images: NotRequired[Natural]
    fields: NotRequired[dict[str, dict[str, Natural]]]
    members: NotRequired[dict[str, _Members]]


class _SourceShare(TypedDict):
    kept: Natural
    held_out: Natural
    used: Natural
    records: Natural
    tokens: Natural
    epochs: float
    share: float


class _Mixture(TypedDict):
    unit: Literal["records", "tokens"]
    records: Natural
    tokens: Natural
    held_out: Natural
    sources: dict[str, _SourceShare]


class _Spec(TypedDict):
    size: int
    fill: tuple[int, int, int]
    aspect: str
    mode: str


class _Codecs(TypedDict):
    decoder: str
    resizer: str
    resizer_version: str


class _Error(TypedDict, total=False):
    mean: float
    psnr: float
    worst: float


class _Stored(TypedDict):
    kind: Literal["raw", "jpeg", "original"]
    quality: NotRequired[int]
    error: NotRequired[_Error]


@dataclass(frozen=True)
class ViewFacts:
    """One view: its spec, the codecs that made it, and where image slot i is.

    Slot i is row `i % images_per_shard` of shard `i // images_per_shard`. `encoding` says how the
    pixels are stored (`kind`, `quality`) and, for `jpeg`, the `error` that this makes.
    `fast_error` is that of mode `fast` (`mean`, `psnr`, `worst`), over the view's first images.
    """

    spec: Annotated[dict[str, Any], _Spec]
    codecs: Annotated[dict[str, Any], _Codecs]
    images_per_shard: int
    shards: list[ShardFacts]
    encoding: Annotated[dict[str, Any], _Stored] = field(default_factory=lambda: {"kind": "raw"})
    fast_error: Annotated[dict[str, float], _Error] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class TargetFacts:
    """A teacher's features: slot i is where `ViewFacts` says of an image.

    Attributes:
        teacher: Its name.
        made: Digest of its weights and settings and of how images are made for it.
        rows: Vectors an image.
        width: Numbers of a vector.
        storage: `int8` with a scale a vector, or `bf16`.
        images_per_shard: As for a view.
        shards: Its shards.
        error: Root mean square of what storing has changed, over that of the features.
        statuses: Images by status: `ok`, `refused` where the teacher gives no finite numbers,
            `unused`, or why an image cannot be decoded.
        weights: What tells the teacher's weights from others: a digest of the folder's files, or
            the hub name and, where this machine has one, the revision. Empty in older datasets.
        settings: Digest of the settings that decide what the teacher gives of an image.
    """

    teacher: str
    made: str
    rows: Natural
    width: Natural
    storage: Literal["int8", "bf16"]
    images_per_shard: Natural
    shards: list[ShardFacts]
    error: float
    statuses: dict[str, Natural]
    weights: str = ""
    settings: str = ""

    @property
    def identity(self) -> str:
        """The teacher and what it is made of, in words; empty where that is not known.

        Equal for datasets of other images, storage or versions of what writes them.
        """
        if not self.settings:
            return ""
        return f"{self.teacher} (weights {self.weights or 'none'}, settings {self.settings[:12]})"


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
            distinct `images`; keys repaired, by kind (`repairs`); images that are used in spite of
            something odd, by `images.Note` (`image_notes`, absent in older datasets).
            distinct `images`; keys repaired, by kind (`repairs`); by source, records by the
            name of a field that nothing reads (`fields`), and `members` of archives.
        mixture: The blend as it came out: by source `kept`, `held_out`, distinct records `used`,
            `records` and `tokens` of an epoch, `epochs`, and its true `share`.
        tokens: The token shards.
        views: The views by name.
        targets: Teachers' features by name.
        selection: Facts of `selection.arrow`.
        versions: Of the libraries that decide bytes.
        quarantine: Facts of the file of quarantined records.
        inputs: Facts of the file that says which image and record each slot and row was made of;
            `--incremental` begins there.
        repairs: Facts of the file of keys that were mended.
    """

    format: int
    fingerprint: str
    plan: dict[str, str]
    tokenizer: Annotated[dict[str, Any], TokenizerFields]
    template: str
    image_token: int
    counts: Annotated[dict[str, Any], _Counts]
    mixture: Annotated[dict[str, Any], _Mixture]
    tokens: list[ShardFacts]
    views: dict[str, ViewFacts]
    selection: ShardFacts
    versions: dict[str, str]
    quarantine: ShardFacts | None = None
    inputs: ShardFacts | None = None
    repairs: ShardFacts | None = None
    template_fields: dict[str, Any] = field(default_factory=dict[str, Any])
    tokenizer_files: list[ShardFacts] = field(default_factory=list[ShardFacts])
    targets: dict[str, TargetFacts] = field(default_factory=dict[str, TargetFacts])

    def shards(self) -> list[ShardFacts]:
        """The token shards, then those of every view and of every teacher."""
        of_images = [*self.views.values(), *self.targets.values()]
        return [*self.tokens, *(shard for kind in of_images for shard in kind.shards)]

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
        try:
            template = as_type(self.template_fields, Template, "template_fields")
        except JsonError as error:
            raise DataError(f"{where}: {NAME}: {error}; {again}") from None
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
    """Read a dataset's facts, and check each: the dataset may be somebody else's.

    Raises:
        DataError: No dataset here, an unfinished one, one of another format, a field of another
            type, or a path that leads out of the dataset.
    """
    path = output / NAME
    try:
        fields = from_json(read_whole(path), dict[str, Any])
        if "format" not in fields:
            raise JsonError("format: missing")
        if (found := fields["format"]) != FORMAT:
            raise DataError(
                f"{path}: format {found!r:.40}, this version reads {FORMAT}; run preprocess "
                "into another --output"
            )
        manifest = as_type(fields, Manifest)
        _check(manifest)
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
    except JsonError as error:
        raise DataError(
            f"{path}: no manifest ({error}); run the same preprocess again, to rewrite it"
        ) from None
    return manifest


def _check(manifest: Manifest) -> None:
    """What the types of single fields cannot say.

    Raises:
        JsonError: Names the field.
    """
    if not manifest.views:
        raise JsonError("views: empty; expected one at least")
    for name, view in manifest.views.items():
        place = f"views.{name}"
        if view.images_per_shard < 1:
            raise JsonError(
                f"{place}.images_per_shard: {view.images_per_shard}; expected 1 or more"
            )
        if view.encoding["kind"] != ORIGINAL:
            as_type(view.spec, ImageSpec, f"{place}.spec")
    for name, target in manifest.targets.items():
        for what in ("rows", "width", "images_per_shard"):
            if getattr(target, what) < 1:
                raise JsonError(
                    f"targets.{name}.{what}: {getattr(target, what)}; expected 1 or more"
                )
    if manifest.image_token != IMAGE_TOKEN:
        raise JsonError(f"image_token: {manifest.image_token}; expected {IMAGE_TOKEN}")
    for number, facts in enumerate(manifest.tokenizer_files):
        if facts.path.count("/") != 1 or not facts.path.startswith(f"{TOKENIZER}/"):
            raise JsonError(
                f"tokenizer_files[{number}].path: {facts.path!r}; expected a file of {TOKENIZER}/"
            )
