"""Settings of a build: sources, mixture and views, read from a recipe's YAML."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from lapilli.data.cluster.pool import PoolConfig
from lapilli.data.errors import DataError
from lapilli.data.images.encodings import ORIGINAL, Encoding
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.addresses import refuse_secrets, refuse_web
from lapilli.data.renamed import BUILD_NAMES, Renamed

__all__ = [
    "MOST_RECORD", "MOST_UNPACKED", "BuildConfig", "MixtureConfig", "SourceConfig", "TargetConfig",
]  # fmt: skip

# Names become folders, and sample ids are split at their first slash.
NAME = re.compile(r"\w[\w.+-]*")
MOST_RECORD = 64 * 2**20
MOST_UNPACKED = 16 * 2**30
WITH_SUFFIXES = ("webdataset",)
WITH_COLUMNS = ("csv", "parquet")
COLUMN_MEANINGS = ("image", "answer", "question", "id")
WITH_ROLES = ("llava", "messages", "parquet", "webdataset")


@dataclass(frozen=True)
class SourceConfig:
    """Annotation files of one format and where their images are.

    Attributes:
        name: The source's name in every report, and the first half of its sample ids.
        annotations: Annotation file, a glob, or a list of these, relative to the root.
        images: Folder of the images, relative to the root; the keys of the file start there. For
            images elsewhere an absolute folder or an address (`s3://bucket/images`).
        format: Name of a reader in `lapilli.data.sources.SOURCES`, or `package.module:name`.
        aliases: Folder names spelt otherwise in the file than on disk (`{text_vqa: textvqa}`).
        captions: Of an image's captions `all`, a record each, or `one`, drawn by `seed`.
        prompts: Questions for captions that have none, one drawn by `seed` for each record;
            `<image>` is the image's place, at the front where it is left out.
        seed: Draws captions and prompts; another epoch's choice is another seed.
        path_prefix: Where the paths in the file begin on the machine that wrote it; taken off.
        drop_newlines: Take every line break out of users' turns, as Basic-VLM's preparation does.
        roles: Who speaks under a name that the format does not know, `user`, `assistant` or
            `system` by that name (`{bot: assistant}`).
        image_suffixes: Which members of a WebDataset sample are its images, in this order;
            `jpg` stands for `0.jpg`, `1.jpg`, ... too. Without it a single image, or numbered ones.
        columns: In a table of captions, the column of `image`, `answer`, `question` or `id` where
            it has none of the usual names (`{image: photo, answer: alt}`).
        max_record_bytes: A record of more bytes in its file is quarantined as `schema`; embedded
            images do not count.
        max_unpacked_bytes: A compressed annotation file that unpacks to more is an error.
    """

    name: str
    annotations: str | list[str]
    images: str = "."
    format: str = "llava"
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    captions: Literal["all", "one"] = "all"
    prompts: list[str] = field(default_factory=list[str])
    seed: int = 0
    path_prefix: str = ""
    drop_newlines: bool = False
    roles: dict[str, Literal["user", "assistant", "system"]] = field(
        default_factory=dict[str, Literal["user", "assistant", "system"]]
    )
    image_suffixes: list[str] = field(default_factory=list[str])
    columns: dict[str, str] = field(default_factory=dict[str, str])
    max_record_bytes: int = MOST_RECORD
    max_unpacked_bytes: int = MOST_UNPACKED

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        _check_name("sources.name", self.name)
        if not self.patterns or not all(self.patterns):
            raise DataError(
                f"sources.annotations: {self.annotations!r} of source {self.name}; expected a "
                "file, a glob or a list of these, relative to the root"
            )
        for name, values in (("annotations", self.patterns), ("images", [self.images])):
            for value in values:
                refuse_secrets(f"sources.{name} of source {self.name}", value)
                refuse_web(f"sources.{name} of source {self.name}", value)
        for name in ("max_record_bytes", "max_unpacked_bytes"):
            if not 1 <= getattr(self, name) < 2**63:
                raise DataError(
                    f"sources.{name}: {getattr(self, name)} of source {self.name}; expected a "
                    "number of bytes, 1 or more"
                )
        self._check_format()

    def facts(self) -> dict[str, Any]:
        """The settings as a plan compares them: later ones only where they are set."""
        later: dict[str, Any] = {
            "max_record_bytes": MOST_RECORD, "max_unpacked_bytes": MOST_UNPACKED, "columns": {},
            "drop_newlines": False,
        }  # fmt: skip
        return {name: v for name, v in asdict(self).items() if later.get(name) != v}

    def _check_format(self) -> None:
        """Settings that its format does not read are a mistake; a reader of one's own reads any."""
        if ":" in self.format:
            return
        unknown = [name for name in self.columns if name not in COLUMN_MEANINGS]
        if unknown:
            raise DataError(
                f"sources.columns: {unknown[0]!r} of source {self.name}; expected columns of "
                f"{', '.join(COLUMN_MEANINGS)}"
            )
        settings = (
            ("image_suffixes", WITH_SUFFIXES), ("roles", WITH_ROLES), ("columns", WITH_COLUMNS),
        )  # fmt: skip
        for name, formats in settings:
            if getattr(self, name) and self.format not in formats:
                raise DataError(
                    f"sources.{name}: source {self.name} has the format {self.format}, which reads "
                    f"none; expected one of {', '.join(formats)}, or leave it out"
                )
        for suffix in self.image_suffixes:
            if not suffix.strip(".") or "/" in suffix:
                raise DataError(
                    f"sources.image_suffixes: {suffix!r} of source {self.name}; expected the end "
                    "of a member's name, e.g. jpg or left.png"
                )

    @property
    def patterns(self) -> list[str]:
        """`annotations` as a list."""
        return [self.annotations] if isinstance(self.annotations, str) else self.annotations


@dataclass(frozen=True)
class MixtureConfig:
    """How the sources are blended; without any of it they stand one after the other, whole.

    Attributes:
        unit: What weights, counts and total are counted in, `records` or `tokens`.
        image_tokens: Tokens an image counts for in `tokens`, e.g. 576 for CLIP-L/14 at 336 px.
        weights: Proportion of the blend by source, for every source; they need not add up to 1.
        total: Size of a blend by weights; left out, the largest that keeps to `epochs`.
        counts: Exact size by source; a source without one is used whole, `epochs` times.
        epochs: How often a source occurs in the blend, by source, 1 where it is left out; below 1
            is a part of it. With `weights`, the most it may.
        held_out: Records kept apart from training, drawn by image: all records of an image are
            on one side. A share below 1, or a number.
        seed: Seed of the draws of held-out records and of partial sources.
    """

    unit: Literal["records", "tokens"] = "records"
    image_tokens: int = 0
    weights: dict[str, float] = field(default_factory=dict[str, float])
    total: int | None = None
    counts: dict[str, int] = field(default_factory=dict[str, int])
    epochs: dict[str, float] = field(default_factory=dict[str, float])
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("weights", "counts", "epochs"):
            bad = {source: much for source, much in getattr(self, name).items() if not much >= 0}
            if bad:
                raise DataError(f"mixture.{name}: {bad}; expected 0 or more")
        if self.weights and self.counts:
            raise DataError("mixture: weights and counts are both given; expected one of them")
        if self.weights and not 0 < sum(self.weights.values()) < float("inf"):
            raise DataError(f"mixture.weights: {self.weights}; expected one above 0, none infinite")
        if self.total is not None and (self.total < 1 or not self.weights):
            raise DataError(
                f"mixture.total: {self.total}; expected 1 or more, and the weights it is divided by"
            )
        if self.image_tokens < 0:
            raise DataError(f"mixture.image_tokens: {self.image_tokens}; expected 0 or more")
        if not 0 <= self.held_out < float("inf") or (self.held_out >= 1 and self.held_out % 1):
            raise DataError(
                f"mixture.held_out: {self.held_out}; expected a share below 1, e.g. 0.01, or a "
                "number of records, e.g. 5000"
            )

    def check_names(self, sources: list[str]) -> None:
        """Every name is a source's, and with weights every source has one.

        Raises:
            DataError: Names the first that is not.
        """
        for field_name in ("weights", "counts", "epochs"):
            for name in getattr(self, field_name):
                if name not in sources:
                    raise DataError(
                        f"mixture.{field_name}: {name!r} is no source; expected of "
                        f"{', '.join(sources)}"
                    )
        missing = [name for name in sources if self.weights and name not in self.weights]
        if missing:
            raise DataError(
                f"mixture.weights: source {missing[0]} has none; give it one, 0 to leave it out"
            )


@dataclass(frozen=True)
class TargetConfig:
    """Features of a frozen teacher, a row of vectors an image, that training predicts.

    Attributes:
        teacher: Name in `lapilli.data.building.teachers.TEACHERS`, or `package.module:name`: what
            makes a teacher of these settings.
        rows: Vectors an image, before pooling.
        width: Numbers of a vector.
        pretrained: Hub name or folder of its weights.
        settings: Whatever else it is made with.
        size: Side of the square, in pixels, that it is given of an image.
        aspect: How the square is made, as for a view.
        storage: `int8` with a scale a vector, or `bf16`.
        pool: Side of the square blocks of vectors that are averaged; 1 keeps all.
        batch_size: Images that it is given at once.
        num_workers: Processes, each with a teacher of its own. Decides no byte.
        num_gpus: GPUs of each, 0.5 for two on one. Decides no byte.
    """

    teacher: str
    rows: int
    width: int
    pretrained: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    size: int = 336
    aspect: Literal["pad", "crop", "stretch"] = "stretch"
    storage: Literal["int8", "bf16"] = "int8"
    pool: int = 1
    batch_size: int = 8
    num_workers: int = 1
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        for name in ("rows", "width", "size", "pool", "batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise DataError(f"targets.{name}: {getattr(self, name)}; expected at least 1")
        if self.num_gpus < 0:
            raise DataError(f"targets.num_gpus: {self.num_gpus}; expected 0 or more")
        side = math.isqrt(self.rows)
        if self.pool > 1 and (side * side != self.rows or side % self.pool):
            raise DataError(
                f"targets.pool: {self.pool} of {self.rows} rows; expected a square grid of rows "
                "whose side it divides"
            )

    @property
    def stored_rows(self) -> int:
        """Vectors an image that are kept."""
        return self.rows // self.pool**2

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's vectors, with their scales."""
        each = self.width + 4 if self.storage == "int8" else 2 * self.width
        return self.stored_rows * each

    def facts(self) -> dict[str, Any]:
        """The settings that decide bytes."""
        return {n: v for n, v in asdict(self).items() if n not in ("num_workers", "num_gpus")}


@dataclass(frozen=True)
class BuildConfig:
    """All that decides a dataset's bytes, and where to read and write.

    Attributes:
        root: Folder or address that holds annotations and images.
        output: Folder or address of the dataset to write.
        sources: The annotation files, in the order of the dataset.
        tokenizer: Hub name, folder or address of a tokenizer.
        template: Name of a conversation template, or a YAML file with one.
        views: How images are made square, by name; a tower reads one of them.
        encodings: How a view's pixels are stored, by view; raw where it is left out.
        targets: Features of teachers for embedding losses, by name.
        keep_original: Also store the source bytes of every image, so that a view can be added
            later without the images' folders.
        exclude: Sample ids (`source/record_id`) of records to leave out; they are quarantined as
            `excluded`.
        mixture: How the sources are blended and which records are held out.
        compat: "llava" treats records, texts and pixels as LLaVA does, its mistakes included.
        max_text_length: Ids kept of a record, an image counted as one; 0 keeps all. With `compat:
            llava` 0 means 2048, as in LLaVA's scripts.
        max_quarantined: Largest share of records that may be quarantined, 0 to 1. Decides no byte.
        records_per_shard: Records in a token shard.
        shard_bytes: Largest size of an image shard's pixels, in bytes.
        extra_roots: Folders outside of the root that links below it may lead to, as where
            `coco/train2017` is a link to another disk. None are followed out of the root otherwise.
        incremental: Bring the dataset in `output` to these inputs and settings, and make only what
            has changed. Without it a change is an error.
        num_workers: Shards built at the same time; 0 takes every core Ray has. Decides no byte.
        build: The nodes that build, and what each task asks of one.
    """

    old_names: ClassVar[Renamed] = BUILD_NAMES

    root: str
    output: str
    sources: list[SourceConfig]
    tokenizer: str
    template: str
    views: dict[str, ImageSpec]
    encodings: dict[str, Encoding] = field(default_factory=dict[str, Encoding])
    targets: dict[str, TargetConfig] = field(default_factory=dict[str, TargetConfig])
    keep_original: bool = False
    exclude: list[str] = field(default_factory=list[str])
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    compat: Literal["llava"] | None = None
    max_text_length: int = 0
    max_quarantined: float = 0.01
    records_per_shard: int = 8192
    shard_bytes: int = 64 * 2**20
    extra_roots: list[str] = field(default_factory=list[str])
    incremental: bool = False
    num_workers: int = 0
    build: PoolConfig = field(default_factory=PoolConfig)

    def __post_init__(self) -> None:
        """Check what types cannot say."""
        if not self.sources:
            raise DataError("sources: empty; expected at least one {name, annotations, images}")
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"sources: name {repeated[0]!r} is used twice; give each its own")
        self.mixture.check_names(names)
        if not self.views:
            raise DataError("views: empty; expected at least one, e.g. clip336: {size: 336, ...}")
        for view in self.views:
            _check_name("views", view)
        for target in self.targets:
            _check_name("targets", target)
        self._check_encodings()
        if not 0.0 <= self.max_quarantined <= 1.0:
            raise DataError(
                f"max_quarantined: {self.max_quarantined}; expected a share from 0 to 1, "
                "e.g. 0.01 for one record in a hundred"
            )
        for name in ("records_per_shard", "shard_bytes"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}: {getattr(self, name)}; expected at least 1")
        if self.max_text_length < 0:
            raise DataError(
                f"max_text_length: {self.max_text_length}; expected 0 (all of it) or more"
            )
        if self.num_workers < 0:
            raise DataError(f"num_workers: {self.num_workers}; expected 0 (every core) or more")

    def _check_encodings(self) -> None:
        """Every encoding is a view's and one that a tower can read."""
        if ORIGINAL in self.views:
            raise DataError(
                f"views: {ORIGINAL!r} is the name of the source bytes; rename the view, or set "
                "keep_original"
            )
        for view, encoding in self.encodings.items():
            if view not in self.views:
                raise DataError(
                    f"encodings: {view!r} is no view; expected of {', '.join(self.views)}"
                )
            if encoding.kind == ORIGINAL:
                raise DataError(f"encodings.{view}: {ORIGINAL}; set keep_original for source bytes")


def _check_name(field_name: str, name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise DataError(
            f"{field_name}: {name!r}; expected letters, digits, '.', '_', '+' and '-' only, the "
            "first a letter or digit; rename it"
        )
