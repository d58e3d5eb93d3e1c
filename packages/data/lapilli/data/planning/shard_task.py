"""Describe one shard to build: everything a worker needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lapilli.data.config import TargetConfig
from lapilli.data.images.codecs import Codecs
from lapilli.data.images.encodings import Encoding
from lapilli.data.images.view import ImageSpec
from lapilli.data.mounts import Located
from lapilli.data.record import Record, unpack
from lapilli.data.text.templates import Template
from lapilli.data.versions import installed_versions

__all__ = ["RAW", "ImageTask", "TargetTask", "Task", "TokenTask", "source_bytes", "writer_version"]

WRITERS = ("pyarrow", "tokenizers")
RAW = Encoding()


def writer_version() -> str:
    """The libraries that, beside codecs and tokenizer, decide a shard's bytes."""
    return ", ".join(f"{name} {version}" for name, version in installed_versions(*WRITERS).items())


@dataclass(frozen=True)
class ImageTask:
    """One image shard: decode these images below `root`, in this order, and encode the pixels.

    `images` says where each is, and how large and old its file was; a slot without use has no
    container. `writer` is the driver's `writer_version`; a worker with another one stops. Of mode
    `fast`, the first `compared` images are made exactly too, to say how far off they are.
    """

    name: str
    writer: str
    root: str
    images: Sequence[Located]
    spec: ImageSpec
    codecs: Codecs
    encoding: Encoding = RAW
    compared: int = 0

    @property
    def image_ids(self) -> tuple[str, ...]:
        """The identities of the images, in order."""
        return tuple(place.image_id for place in self.images)


@dataclass(frozen=True, kw_only=True)
class TargetTask(ImageTask):
    """One shard of a teacher's features: decode these images as for a view, and ask the teacher."""

    target: TargetConfig


@dataclass(frozen=True)
class TokenTask:
    """One token shard: tokenise these records, in this order.

    `image_ids` are those of the records' images, resolved; `fingerprint` is that of the tokenizer
    the driver loaded from the same name; `compat` and `max_text_length` are the config's.
    """

    name: str
    writer: str
    packed: Sequence[bytes]
    image_ids: Sequence[tuple[str, ...]]
    tokenizer: str
    fingerprint: str
    template: Template
    compat: str | None
    max_text_length: int

    def records(self) -> tuple[Record, ...]:
        """Unpack the records: a worker does, and the plan stays as small as it was."""
        return tuple(map(unpack, self.packed))


Task: TypeAlias = ImageTask | TokenTask


def source_bytes(place: Located) -> int:
    """Bytes of an image's file, or of its member of an archive."""
    return place.size if place.member is None else place.member.size
