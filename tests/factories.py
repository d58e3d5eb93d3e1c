"""Made-up material: images of every kind, LLaVA mixtures with planted defects, small datasets.

Everything is drawn from a seed, so that a clone without other people's data tests nearly all.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lapilli.data.building.driver import BuildReport, build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.images.view import ImageSpec
from lapilli.data.planning.plan import plan_build
from lapilli.data.record import Reason
from lapilli.data.text.encode import train_tokenizer

__all__ = [
    "BAD_KINDS",
    "CLIP_MEAN",
    "IMAGE_KINDS",
    "Mixture",
    "bad_image",
    "build_config",
    "build_dataset",
    "conversation",
    "image_bytes",
    "make_mixture",
    "make_tokenizer",
    "picture",
]

CLIP_MEAN = (122, 116, 104)
SOURCE = "made_up"

# ---- images ------------------------------------------------------------------------------------

IMAGE_KINDS = (
    "jpeg", "jpeg_progressive", "jpeg_gray", "jpeg_cmyk", "jpeg_rotated",
    "png", "png_rgba", "png_gray", "png_la", "png_palette", "png_palette_clear", "png_16bit",
    "png_1bit", "gif", "gif_animated", "webp", "webp_animated", "bmp", "tiff",
    "avif", "avif_animated",
)  # fmt: skip
BAD_KINDS: dict[str, Reason] = {
    "empty": Reason.IMAGE_UNDECODABLE,
    "html": Reason.IMAGE_UNDECODABLE,
    "truncated_jpeg": Reason.IMAGE_UNDECODABLE,
    "truncated_png": Reason.IMAGE_UNDECODABLE,
    "zero_width": Reason.IMAGE_UNDECODABLE,
    "bomb": Reason.IMAGE_TOO_LARGE,
    "long_strip": Reason.IMAGE_TOO_LARGE,
}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """An RGB picture with smooth parts, edges and noise, so that resizers have something to do."""
    rng = np.random.default_rng([seed, width, height])
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        128 + 90 * np.sin(x * rng.uniform(0.05, 0.6) + y * rng.uniform(0.05, 0.6) + phase)
        for phase in rng.uniform(0, 6, 3)
    ]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


def image_bytes(kind: str, width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    """A whole image file of one of `IMAGE_KINDS`."""
    image = picture(width, height, seed)
    form, _, variant = kind.partition("_")
    options: dict[str, Any] = {"quality": 90} if form in ("jpeg", "webp", "avif") else {}
    if variant == "animated":
        frames = [picture(width, height, seed + step) for step in (1, 2)]
        options |= {"save_all": True, "append_images": frames}
    elif variant == "progressive":
        options["progressive"] = True
    elif variant == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    buffer = io.BytesIO()
    _converted(image, variant).save(buffer, form, **options)
    return buffer.getvalue()


def _converted(image: Image.Image, variant: str) -> Image.Image:
    """The picture in another mode, where the variant asks for one."""
    modes = {"gray": "L", "cmyk": "CMYK", "rgba": "RGBA", "la": "LA", "1bit": "1"}
    if variant in ("rgba", "la"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if variant == "16bit":
        gray = np.asarray(image.convert("L")).astype(np.uint16)
        return Image.fromarray(gray * 257)
    if variant.startswith("palette"):
        image = image.quantize(64)
        if variant == "palette_clear":
            image.info["transparency"] = 3
        return image
    return image.convert(modes[variant]) if variant in modes else image


def bad_image(kind: str, seed: int = 0) -> bytes:
    """A file of one of `BAD_KINDS`, which no view can use."""
    if kind == "empty":
        return b""
    if kind == "html":
        return b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    if kind == "truncated_jpeg":
        whole = image_bytes("jpeg", 64, 48, seed)
        return whole[: len(whole) // 2]
    if kind == "truncated_png":
        whole = image_bytes("png", 64, 48, seed)
        return whole[: len(whole) // 2]
    sizes = {"zero_width": (0, 10), "bomb": (60_000, 50_000), "long_strip": (1, 20_000_000)}
    return _png_header(*sizes[kind])


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- mixtures ----------------------------------------------------------------------------------

NOUNS = ("pebble", "crater", "cloud", "harbour", "lantern", "goat", "ladder", "Käse", "火山")
COLOURS = ("red", "grey", "pale blue", "golden", "black")


@dataclass(frozen=True)
class Mixture:
    """A LLaVA-format folder and what must become of every record.

    Attributes:
        root: The folder.
        sources: What a `BuildConfig` is told.
        expected: By sample id, in file order: None for one to keep, or the reason against it.
        texts: What a tokenizer may be trained on.
    """

    root: Path
    sources: list[SourceConfig]
    expected: dict[str, Reason | None]
    texts: list[str]


def conversation(
    record_id: Any, image: Any = None, *, turns: int = 1, seed: int = 0
) -> dict[str, Any]:
    """One well-formed LLaVA record; with a list of images the first turn marks each."""
    rng = random.Random(f"{record_id}/{seed}")
    count = len(image) if isinstance(image, list) else 0 if image is None else 1
    said: list[dict[str, str]] = []
    for turn in range(turns):
        markers = "<image>\n" * count if turn == 0 else ""
        noun = rng.choice(NOUNS)
        said.append({"from": "human", "value": f"{markers}What colour is the {noun}?"})
        answer = " ".join(f"The {noun} is {rng.choice(COLOURS)}." for _ in range(rng.randint(1, 6)))
        said.append({"from": "gpt", "value": answer})
    record: dict[str, Any] = {"id": record_id, "conversations": said}
    return record if image is None else {**record, "image": image}


def make_mixture(
    root: Path,
    *,
    images: int = 12,
    text_only: int = 4,
    asked: int = 1,
    defects: bool = False,
    seed: int = 0,
) -> Mixture:
    """Write `mixture.json` and `images/` below `root`.

    Args:
        root: Folder to fill; made if it is not there.
        images: Records with one image each, every kind of `IMAGE_KINDS` in turn.
        text_only: Records without an image.
        asked: Records about each image.
        defects: Plant a record for every reason there is, and records that need a repair.
        seed: Draws pictures, sizes, words and the order.
    """
    rng = random.Random(seed)
    about = [_with_image(root, number, rng) for number in range(images)]
    about += [
        conversation(f"{one['id']}-{again}", one["image"], seed=again)
        for again in range(1, asked)
        for one in about[:images]
    ]
    good = about + [
        conversation(f"text-{n}", turns=rng.randint(1, 3), seed=seed) for n in range(text_only)
    ]
    rng.shuffle(good)
    records: list[tuple[Any, Reason | None]] = [(record, None) for record in good]
    if defects:
        records += list(_defects(root))
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "mixture.json").write_text(
        json.dumps([record for record, _ in records]), encoding="utf-8"
    )
    return Mixture(
        root,
        [SourceConfig(SOURCE, "mixture.json", "images", aliases={"spelt_so": "spelt_otherwise"})],
        _expected(records),
        [text for record, _ in records for text in _texts(record)],
    )


def _with_image(root: Path, number: int, rng: random.Random) -> dict[str, Any]:
    kind = IMAGE_KINDS[number % len(IMAGE_KINDS)]
    width, height = rng.randint(8, 90), rng.randint(8, 90)
    key = f"{number % 3}/{number:04d}_{kind}.{kind.partition('_')[0]}"
    _put(root, key, image_bytes(kind, width, height, number))
    return conversation(f"image-{number}", key, turns=rng.randint(1, 3), seed=number)


def _put(root: Path, key: str, data: bytes) -> None:
    path = root / "images" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _defects(root: Path) -> Iterator[tuple[Any, Reason | None]]:
    """Records with something wrong, or something that looks wrong, and their verdicts."""
    yield from _bad_structure()
    yield from _bad_images(root)
    yield from _odd_but_good(root)


def _bad_structure() -> Iterator[tuple[Any, Reason]]:
    human = {"from": "human", "value": "Why?"}
    answer = {"from": "gpt", "value": "Because."}

    def said(name: str, *turns: Any, **fields: Any) -> dict[str, Any]:
        return {"id": name, "conversations": list(turns), **fields}

    yield "not an object", Reason.SCHEMA
    yield None, Reason.SCHEMA
    yield {"id": "no conversations"}, Reason.SCHEMA
    yield {"id": "conversations no list", "conversations": {"from": "human"}}, Reason.SCHEMA
    yield said("turn no object", "Why?", answer), Reason.SCHEMA
    yield said("value no text", {"from": "human", "value": 7}, answer), Reason.SCHEMA
    yield said("image no key", human, answer, image={"path": "a.png"}), Reason.SCHEMA
    yield said("a tool", human, answer, tools=[{"name": "look"}]), Reason.UNSUPPORTED_FIELD
    yield said("no turns"), Reason.NO_TURNS
    yield said("only an answer", answer), Reason.NO_TURNS
    yield said("two humans", human, human, answer), Reason.TURN_ORDER
    yield said("ends on human", human, answer, human), Reason.TURN_ORDER
    yield said("unknown role", {"from": "narrator", "value": "So."}, answer), Reason.UNKNOWN_ROLE
    yield said("empty answer", human, {"from": "gpt", "value": ""}), Reason.EMPTY_ANSWER
    yield said("blank answer", human, {"from": "gpt", "value": " \n"}), Reason.EMPTY_ANSWER
    marked = {"from": "human", "value": "<image>\nWhy?"}
    yield said("marker, no image", marked, answer), Reason.IMAGE_MARKER_COUNT
    yield said("image, no marker", human, answer, image="a.png"), Reason.IMAGE_MARKER_COUNT
    yield (
        said("marker twice", marked, answer, marked, answer, image="a.png"),
        Reason.IMAGE_MARKER_COUNT,
    )


def _bad_images(root: Path) -> Iterator[tuple[Any, Reason]]:
    for kind, reason in BAD_KINDS.items():
        _put(root, f"bad/{kind}.jpg", bad_image(kind))
        yield conversation(f"image {kind}", f"bad/{kind}.jpg"), reason
    _put(root, "bad/folder.jpg/inside.txt", b"")
    for kind in ("png", "gif"):
        _put(root, f"bad/two.{kind}", image_bytes(kind))
    yield conversation("image of two", "bad/two.jpg"), Reason.AMBIGUOUS_IMAGE
    outside = root.parent / f"{root.name}_outside.png"
    outside.write_bytes(image_bytes("png"))
    (root / "images" / "bad" / "link.png").symlink_to(outside.resolve())
    yield conversation("image missing", "bad/nowhere.jpg"), Reason.IMAGE_MISSING
    yield conversation("image folder", "bad/folder.jpg"), Reason.IMAGE_MISSING
    yield conversation("image empty key", ""), Reason.IMAGE_MISSING
    yield conversation("image dot", "."), Reason.IMAGE_MISSING
    yield conversation("image above", "../../secret.png"), Reason.IMAGE_OUTSIDE_ROOT
    yield conversation("image absolute", str(outside.resolve())), Reason.IMAGE_OUTSIDE_ROOT
    yield conversation("image linked", "bad/link.png"), Reason.IMAGE_OUTSIDE_ROOT
    yield conversation("image NUL", "bad/\0.png"), Reason.IMAGE_OUTSIDE_ROOT


def _odd_but_good(root: Path) -> Iterator[tuple[Any, None]]:
    _put(root, "odd/one.png", image_bytes("png", 1, 1))
    _put(root, "odd/strip.png", image_bytes("png", 200, 2))
    _put(root, "odd/really_a_gif.jpg", image_bytes("gif"))
    _put(root, "odd/Shouting.JPG", image_bytes("jpeg"))
    _put(root, "odd/other.webp", image_bytes("webp"))
    _put(root, "spelt_otherwise/a.png", image_bytes("png"))
    for key in ("odd/one.png", "odd/strip.png", "odd/really_a_gif.jpg", "odd/shouting.jpg"):
        yield conversation(f"odd {key}", key), None
    yield conversation("odd extension", "odd/other.jpg"), None
    yield conversation("odd folder name", "spelt_so/a.png"), None
    yield conversation("two images", ["odd/one.png", "odd/strip.png"]), None
    yield conversation("one image twice", ["odd/one.png", "odd/one.png"]), None
    yield conversation("said twice"), None
    yield conversation("said twice"), None
    yield conversation(17), None
    quoted = conversation("marker in an answer")
    quoted["conversations"][1]["value"] = "Write <image> there."
    yield quoted, None


def _expected(records: list[tuple[Any, Reason | None]]) -> dict[str, Reason | None]:
    """Verdicts by sample id: the source, the id (or `@place`), `#2` for a second one."""
    expected: dict[str, Reason | None] = {}
    for place, (record, reason) in enumerate(records):
        found = record.get("id") if isinstance(record, dict) else None
        sample_id = f"{SOURCE}/{f'@{place}' if found is None else found}"
        expected[f"{sample_id}#2" if sample_id in expected else sample_id] = reason
    return expected


def _texts(record: Any) -> Iterator[str]:
    turns = record.get("conversations") if isinstance(record, dict) else None
    for turn in turns if isinstance(turns, list) else []:
        value = turn.get("value") if isinstance(turn, dict) else None
        if isinstance(value, str):
            yield value


# ---- datasets ----------------------------------------------------------------------------------


def make_tokenizer(folder: Path, *, vocab_size: int = 320) -> Path:
    """Train a small byte-level tokenizer on the words the mixtures are made of."""
    texts = [f"What colour is the {noun}? The {noun} is {c}." for noun in NOUNS for c in COLOURS]
    train_tokenizer(texts, folder, vocab_size=vocab_size)
    return folder


def build_config(mixture: Mixture, output: Path, tokenizer: Path, /, **changes: Any) -> BuildConfig:
    """Settings with two small views (`pad32`, `crop24`) and shards small enough to be several."""
    config = BuildConfig(
        root=str(mixture.root),
        output=str(output),
        sources=mixture.sources,
        tokenizer=str(tokenizer),
        template="v1",
        views={
            "pad32": ImageSpec(32, CLIP_MEAN, max_pixels=10_000_000),
            "crop24": ImageSpec(24, CLIP_MEAN, aspect="crop", resizer="pillow", max_pixels=99_999),
        },
        max_quarantined=1.0,
        records_per_shard=8,
        shard_bytes=5 * 32 * 32 * 3,
    )
    return replace(config, **changes)


def build_dataset(
    mixture: Mixture, output: Path, tokenizer: Path, /, **changes: Any
) -> BuildReport:
    """Plan and build in this process, without Ray; `changes` are fields of `BuildConfig`."""
    return build(plan_build(build_config(mixture, output, tokenizer, **changes)), runner=run_here)
