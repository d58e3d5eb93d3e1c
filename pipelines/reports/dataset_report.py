"""report.html of a dataset: composition, quarantine, examples.

Counts come from the manifest, lengths from the selection's columns and sizes from the image
shards': no row becomes a Python object, and no pixel is read but the few that are shown.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from lapilli.data.config import BuildConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage, ImageSpec, decode
from lapilli.data.io.atomic import ShardFacts, write_text
from lapilli.data.io.printable import bytes_text, relative_names
from lapilli.data.io.remote_path import Output
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.planning.located_entries import open_mount
from lapilli.data.record import Verdict, excerpt
from lapilli.data.shards.checks import open_selection
from lapilli.data.shards.manifest import Manifest, ViewFacts, read_manifest
from lapilli.data.shards.quarantine import read_quarantine
from lapilli.data.shards.schemas import IMAGE_SCHEMA, OK
from lapilli.data.shards.summaries import OpenColumns, Summaries
from lapilli.data.sources import get_source
from lapilli.data.sources.rows import with_roles
from lapilli.data.sources.tally import named
from pipelines.reports.page import Figure, GalleryItem, Page
from pipelines.reports.ticks import duration_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["IMAGE_NOTES", "REMEDIES", "BuildTime", "write_dataset_report"]

REPORT = "report.html"
SHOWN = 12  # images of the dataset
EXAMPLES = 6  # quarantined records of a reason
THUMBNAIL = 160  # pixels
PATCH = 14  # pixels, of the towers CLIP-L and SigLIP-so400m
LIMITS = (2048, 4096)  # tokens; LLaVA-1.5's sequence, and its language model's
WORST = "decoder_crashed"  # never decoded in this process

REMEDIES = {
    "schema": "bring the record into the source's format",
    "unsupported_field": "take the field out, if the record means the same without it, or leave "
    "the record out",
    "no_turns": "give it a question and an answer",
    "turn_order": "let questions and answers take turns, an answer last",
    "unknown_role": "use the roles human, gpt and system, or those of messages",
    "empty_answer": "write the answer, or delete the record",
    "image_marker_count": "mark each image once, in order, with <image> in a question",
    "image_unreadable": "give the user that builds permission to read it, or check its disk",
    "image_missing": "put the file where its key says, or set `images` or `aliases`",
    "ambiguous_image": "give the file's exact name: another key, or another file, is just as close",
    "image_outside_root": "use a key below the root, or name the folder in `extra_roots`",
    "image_undecodable": "get the file again; it is damaged or no image",
    "image_too_large": "scale the file down, or raise `max_pixels`",
    "template_refuses": "bring the record into the form its detail names, or take another template",
    "no_trained_token": "raise `max_text_length`, or delete the record",
    "excluded": "take its id out of `exclude` to have it back",
    WORST: "get the file again; decoding it ends the process",
}


IMAGE_NOTES = {
    "flat_after_conversion": "one colour or nearly so in RGB, and not in the file; set the "
    "view's `alpha` (transparency) or `depth` (16 bits, floats)",
    "side_data_ignored": "damaged or overlong texts or profiles beside whole pixels; nothing to do",
}


@dataclass(frozen=True)
class BuildTime:
    """What the build that ends now took."""

    seconds: float
    shards_built: int
    shards_reused: int


def write_dataset_report(
    path: Output, config: BuildConfig, *, time: BuildTime | None = None
) -> Output:
    """Write `report.html` into a dataset.

    Args:
        path: The dataset's folder or address.
        config: The settings it was built with; its root is where quarantined images are looked
            for, and where it is not there their places are filled with the error.
        time: What the build took, where one has just ended.

    Returns:
        The file.

    Raises:
        DataError: No dataset, a damaged one, or a folder that cannot be written.
    """
    manifest = read_manifest(path)
    name = path.absolute().name if isinstance(path, Path) else path.name
    page = Page(f"dataset {name}", f"fingerprint {manifest.fingerprint[:16]}")
    selection = open_selection(path, manifest)
    _tell_figures(page, manifest, selection, time)
    _tell_sources(page, manifest)
    _tell_lengths(page, manifest, selection)
    _tell_modality(page, selection)
    _tell_images(page, path, manifest)
    _tell_quarantine(page, path, manifest, config)
    _tell_build(page, manifest, time)
    try:
        write_text(path / REPORT, page.html(), choose="another file")
    except OSError as error:
        raise DataError(f"{path / REPORT}: {error.strerror}; free space or check rights") from None
    return path / REPORT


def _tell_figures(
    page: Page, manifest: Manifest, selection: pa.Table, time: BuildTime | None
) -> None:
    counts = manifest.counts
    read, bad = counts["read"], counts["quarantined"]
    tokens = int(_numbers(selection, "text_length").sum())
    trained = int(_numbers(selection, "num_trained").sum())
    figures = [
        Figure("records", f"{counts['kept']:,}", f"kept of {read:,} read"),
        Figure("quarantined", f"{bad:,}", f"{bad / read:.2%}, each with its reason"),
        Figure("images", f"{counts['images']:,}", "distinct files"),
        Figure("text tokens", f"{tokens:,}", f"{trained / max(1, tokens):.0%} are trained"),
        Figure("on disk", bytes_text(sum(s.bytes for s in _shards(manifest))), "shards"),
    ]
    if time is not None:
        figures.append(Figure("build", duration_text(time.seconds), _rate(manifest, time)))
    page.figures(figures)


def _rate(manifest: Manifest, time: BuildTime) -> str:
    if not time.shards_built:
        return "every shard was there"
    if time.shards_reused:
        return f"{time.shards_built:,} shards made, {time.shards_reused:,} were there"
    rows = sum(shard.rows for view in manifest.views.values() for shard in view.shards)
    return f"{rows / max(time.seconds, 1e-9):,.0f} images/s, start to end"


def _tell_sources(page: Page, manifest: Manifest) -> None:
    """Proportions of an epoch, as the mixture came out."""
    mixture = manifest.mixture
    sources: dict[str, dict[str, Any]] = mixture["sources"]
    read = manifest.counts["sources"]
    page.section("Sources").bar_chart(
        list(sources),
        {"share": [facts["share"] for facts in sources.values()]},
        title=f"share of an epoch's {mixture['unit']}",
        value_format=".1%",
    )
    columns = ["source", "read", "kept", "held out", "used", "epochs", "in an epoch", "tokens"]
    rows = [
        [name, read.get(name), facts["kept"], facts["held_out"], facts["used"],
         round(facts["epochs"], 3), facts["records"], facts["tokens"]]
        for name, facts in sources.items()
    ]  # fmt: skip
    page.table(columns, rows)


def _tell_lengths(page: Page, manifest: Manifest, selection: pa.Table) -> None:
    text = _numbers(selection, "text_length")
    images = _image_counts(selection)
    most = float(np.quantile(text, 0.995, method="inverted_cdf"))
    title = "text tokens of a record"
    if text.max() > 1.5 * most:
        title += f" (the longest 0.5 % stand at {most:,.0f}; the longest has {text.max():,})"
    page.section("Lengths").histogram(np.minimum(text, most), title=title, x_label="tokens")
    columns = ["sequence", "tokens an image", "median", "95 % at most", "longest"]
    columns += [f"over {limit:,}" for limit in LIMITS]
    rows: list[list[object]] = [["text alone", 0, *_spread(text)]]
    for name, view in manifest.views.items():
        patches = (int(view.spec.get("size", 0)) // PATCH) ** 2
        if patches:
            rows.append([f"view {name}", patches, *_spread(text + images * patches)])
    page.text(f"Records by length, an image as a tower with patches of {PATCH} px sees it:")
    page.table(columns, rows)


def _spread(lengths: NDArray[np.int64]) -> list[object]:
    middle, high = np.quantile(lengths, [0.5, 0.95], method="inverted_cdf")
    over = [int((lengths > limit).sum()) for limit in LIMITS]
    return [int(middle), int(high), int(lengths.max()), *over]


def _tell_modality(page: Page, selection: pa.Table) -> None:
    images = _image_counts(selection)
    counts = {
        "text only": int((images == 0).sum()),
        "one image": int((images == 1).sum()),
        "several images": int((images > 1).sum()),
    }
    page.section("Modality").bar_chart(
        list(counts), {"records": list(counts.values())}, value_format=",.0f"
    )


def _tell_images(page: Page, path: Output, manifest: Manifest) -> None:
    shards = Summaries(path)  # of a store one call each, several at a time
    shards.look()
    shards.fetch(shard.path for view in manifest.views.values() for shard in view.shards)
    page.section("Images").table(
        ["view", "pixels", "mode", "decoder", "resizer", "shards", "size", "usable", "not usable"],
        [_view_row(shards.table, name, view) for name, view in manifest.views.items()],
    )
    if notes := manifest.counts.get("image_notes"):
        page.table(
            ["used in spite of", "images", "what it is"],
            [[note, count, IMAGE_NOTES.get(note, "")] for note, count in notes.items()],
        )
    if not manifest.counts["images"]:
        return
    first = next(iter(manifest.views.values()))
    widths, heights = _source_sizes(shards.table, first.shards)
    if len(widths):
        long_side = np.maximum(widths, heights)
        most = float(np.quantile(long_side, 0.995, method="inverted_cdf"))
        page.histogram(
            np.minimum(long_side, most), title="long side of the source images", x_label="pixels"
        )
        page.table(["resolution", "images", "share"], _common_sizes(widths, heights))
    page.gallery(_thumbnails(path, manifest))


def _view_row(opened: OpenColumns, name: str, view: ViewFacts) -> list[object]:
    rows = sum(shard.rows for shard in view.shards)
    usable = sum(
        pc.call_function(
            "sum", [pc.call_function("equal", [table["status"], pa.scalar(OK)])]
        ).as_py()
        or 0
        for table in (opened(shard, IMAGE_SCHEMA, ["status"]) for shard in view.shards)
    )
    spec, codecs = view.spec, view.codecs
    return [
        name, f"{spec['size']} px, {spec['aspect']}", spec["mode"], codecs["decoder"],
        f"{codecs['resizer']} {codecs['resizer_version']}", len(view.shards),
        bytes_text(sum(shard.bytes for shard in view.shards)), usable, rows - usable,
    ]  # fmt: skip


def _source_sizes(
    opened: OpenColumns, shards: Sequence[ShardFacts]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Width and height of every image that could be decoded, in pixels."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    for shard in shards:
        table = opened(shard, IMAGE_SCHEMA, ["source_width", "source_height"])
        for side, name in zip(sides, ("source_width", "source_height"), strict=True):
            side.append(table[name].drop_null().to_numpy())
    width, height = (np.concatenate([*side, np.empty(0, np.int32)]) for side in sides)
    return width.astype(np.int64), height.astype(np.int64)


def _common_sizes(
    widths: NDArray[np.int64], heights: NDArray[np.int64], most: int = 8
) -> list[list[object]]:
    keys, counts = np.unique((widths << 32) | heights, return_counts=True)
    rows: list[list[object]] = []
    for place in np.argsort(-counts, kind="stable")[:most]:
        key, count = int(keys[place]), int(counts[place])
        rows.append([f"{key >> 32} x {key & 0xFFFFFFFF}", count, f"{count / len(widths):.1%}"])
    return rows


def _thumbnails(path: Output, manifest: Manifest) -> list[GalleryItem]:
    """Images from all over the dataset, as the first view with pixels has them."""
    views = [
        name
        for name, view in manifest.views.items()
        if getattr(view, "encoding", {}).get("kind") != "original"
    ]
    if not views:
        return []
    dataset = open_dataset(
        path if isinstance(path, Path) else str(path), view=views[0], image_tokens=1
    )
    pictured = np.flatnonzero(dataset.has_images)
    if not len(pictured):
        return []
    places = pictured[np.linspace(0, len(pictured) - 1, SHOWN).astype(int)]
    samples = [dataset.sample(int(place)) for place in np.unique(places)]
    return [
        GalleryItem(_jpeg(Image.fromarray(sample.pixels[0])), [sample.sample_id])
        for sample in samples
    ]


def _jpeg(image: Image.Image) -> bytes:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


# ---- quarantine ----------------------------------------------------------------------------------


def _tell_quarantine(page: Page, path: Output, manifest: Manifest, config: BuildConfig) -> None:
    page.section("Quarantine")
    reasons: dict[str, int] = manifest.counts["reasons"]
    if not reasons:
        page.text("Every record read is kept.")
    else:
        page.table(
            ["reason", "records", "what to do"],
            [
                [reason, count, REMEDIES.get(reason, "see its detail")]
                for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
            ],
        )
        page.text("All of them, with detail and record, are in quarantine.parquet.")
        mounts = _Mounts(config)
        for reason, rows in _examples(path):
            _tell_reason(page, reason, reasons.get(reason, len(rows)), rows, mounts)
    repairs: dict[str, int] = manifest.counts["repairs"]
    _tell_tallies(page, manifest)
    page.section("Repairs")
    if repairs:
        page.table(
            ["image keys repaired", "times"],
            [[kind, times] for kind, times in repairs.items()],
        )
        page.text("Every key with the file it is read from is in repairs.parquet.")
    else:
        page.text("No image key was repaired.")


def _tell_tallies(page: Page, manifest: Manifest) -> None:
    """Fields that nothing reads and the members of archives; an older dataset has no counts."""
    fields: dict[str, dict[str, int]] = manifest.counts.get("fields", {})
    members: dict[str, dict[str, Any]] = manifest.counts.get("members", {})
    page.section("Fields not read")
    if fields:
        page.table(
            ["source", "field", "records"],
            [[source, name, n] for source, names in fields.items() for name, n in names.items()],
        )
    else:
        page.text("Every field is read or known to be harmless.")
    if members:
        page.section("Members of archives").table(
            ["source", "members", "used", "not used", "of an unknown suffix"],
            [
                [source, facts["total"], *(named(facts[n]) for n in ("used", "unused", "unknown"))]
                for source, facts in members.items()
            ],
        )


def _examples(path: Output) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The first rows of each reason in `quarantine.parquet`."""
    table = read_quarantine(path)
    reasons = table["reason"].combine_chunks()
    for reason in reasons.unique().sort().to_pylist():
        chosen = pc.call_function("equal", [reasons, pa.scalar(reason)])
        yield reason, table.filter(chosen).slice(0, EXAMPLES).to_pylist()


class _Mounts:
    """Where the images of quarantined records are found, each source looked through once."""

    def __init__(self, config: BuildConfig) -> None:
        self.root = Path(config.root)
        self._config = config
        self._mounts: dict[str, Mount] = {}

    def read(self, row: dict[str, Any]) -> bytes | None:
        """The bytes of a record's first image that is there, or None."""
        source = next((s for s in self._config.sources if s.name == row["source"]), None)
        if source is None or not self.root.is_dir():
            return None
        try:
            element = with_roles(json.loads(row["record"]), source.roles)
            found = get_source(source.format).normalise(element)
        except (ValueError, RecursionError):
            return None
        if isinstance(found, Verdict):
            return None
        _, keys = found
        mount = self._mounts.setdefault(source.name, open_mount(source, self._config, self.root))
        # The detail of a bad image begins with its identity, which ends with its name.
        for place in map(mount.locate, keys):
            if isinstance(place, Located) and row["detail"].startswith(f"{place.image_id}:"):
                return read_image(self.root, place)
        return None


def _tell_reason(
    page: Page, reason: str, count: int, rows: list[dict[str, Any]], mounts: _Mounts
) -> None:
    shown = f"{reason}: {count:,} record{'' if count == 1 else 's'}"
    page.text(shown + (f", the first {len(rows)}" if count > len(rows) else ""))
    if reason.startswith("image_un") or reason in ("image_too_large", "image_missing", WORST):
        page.gallery([_bad_image(row, mounts) for row in rows])
    else:
        page.table(
            ["record", "detail", "what the file says"],
            [[excerpt(row["sample_id"]), relative_names(row["detail"]), (row["record"] or "")[:100]]
             for row in rows],
        )  # fmt: skip


def _bad_image(row: dict[str, Any], mounts: _Mounts) -> GalleryItem:
    """The image where it can be decoded after all, else a crossed frame; the error below."""
    lines = [excerpt(row["sample_id"]), ("error", relative_names(row["detail"]))]
    try:
        data = None if row["reason"] == WORST else mounts.read(row)
        spec = ImageSpec(size=THUMBNAIL, fill=(0, 0, 0))
        image = None if data is None else _jpeg(Image.fromarray(decode(data, spec).image))
    except (BadImage, DataError, OSError):
        image = None
    return GalleryItem(_crossed() if image is None else image, lines)


def _crossed() -> bytes:
    """A grey frame with a cross, legible on light and on dark."""
    y, x = np.mgrid[0:THUMBNAIL, 0:THUMBNAIL]
    on_cross = (abs(x - y) < 2) | (abs(x + y - THUMBNAIL + 1) < 2)
    edge = np.minimum(np.minimum(x, y), THUMBNAIL - 1 - np.maximum(x, y)) < 2
    grey = np.where(on_cross | edge, 90, 140).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


# ---- the build -----------------------------------------------------------------------------------


def _tell_build(page: Page, manifest: Manifest, time: BuildTime | None) -> None:
    page.section("Disk").table(
        ["part", "files", "rows", "size"],
        [
            _disk_row("tokens", manifest.tokens),
            *(_disk_row(f"images, {name}", view.shards) for name, view in manifest.views.items()),
            _disk_row("selection", [manifest.selection]),
        ],
    )
    if time is not None:
        page.key_values({"time": duration_text(time.seconds), "rate": _rate(manifest, time)})
    tokenizer = manifest.tokenizer
    page.section("Settings and versions").key_values(
        {
            "template": manifest.template,
            "tokenizer": f"{Path(str(tokenizer['name'])).name}, {tokenizer['vocab_size']:,} ids",
            "fingerprint": manifest.fingerprint,
            **manifest.versions,
        }
    )


def _disk_row(part: str, shards: Sequence[ShardFacts]) -> list[object]:
    rows, size = sum(s.rows for s in shards), sum(s.bytes for s in shards)
    return [part, len(shards), rows, bytes_text(size)]


def _shards(manifest: Manifest) -> list[ShardFacts]:
    views = [shard for view in manifest.views.values() for shard in view.shards]
    return [*manifest.tokens, *views, manifest.selection]


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return table[name].to_numpy().astype(np.int64)


def _image_counts(selection: pa.Table) -> NDArray[np.int64]:
    (slots,) = selection["image_slots"].chunks
    return np.diff(slots.offsets.to_numpy()).astype(np.int64)
