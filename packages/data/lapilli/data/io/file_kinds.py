"""Identify unexpected files from their first bytes, and say what to do about them.

Used after a failure to read an image, annotations, an archive or a tokenizer's file.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from lapilli.data.record import excerpt

__all__ = ["EMPTY_FILE", "SNIFFED", "Expected", "FileKind", "file_kind", "what_it_is_instead"]

Expected: TypeAlias = Literal["image", "annotations", "archive", "tokenizer", "ranks", "parquet"]

SNIFFED = 1 << 16  # bytes from the beginning of a file that are enough
EMPTY_FILE = "this is an empty file: get it again"
CONVERT = "convert it to JPEG or PNG"
UTF8 = "write it as UTF-8: iconv -f {} -t UTF-8 OLD > NEW"


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        name: With its article, for a sentence.
        remedy: What to do where something else was expected.
        expected_as: Where a file of this kind is in its place.
    """

    name: str
    remedy: str
    expected_as: tuple[Expected, ...] = ()

    def __str__(self) -> str:
        """One line: what it is, and what to do."""
        return f"this is {self.name}: {self.remedy}"


def what_it_is_instead(start: bytes, expected: Expected) -> str:
    """One line for a file that is obviously something else, with what to do; else "".

    Args:
        start: The first `SNIFFED` bytes of the file, or all of a shorter one.
        expected: What it should be.
    """
    kind = file_kind(start)
    if kind is None and expected == "image":
        kind = _plain_text(start)
    if kind is None and expected == "annotations":
        kind = _over_lines(start)
    return "" if kind is None or expected in kind.expected_as else str(kind)


def _plain_text(start: bytes) -> FileKind | None:
    """A text under an image's name: an answer of the server that it was downloaded from."""
    begin = start[:200].decode("utf-8", "ignore").strip()
    if b"\0" in start or not begin or not all(c.isprintable() or c.isspace() for c in begin):
        return None
    return FileKind(f"text ('{excerpt(' '.join(begin.split()), 40)}')", "download the image again")


def file_kind(start: bytes) -> FileKind | None:
    """The kind of a file by its first bytes; None for an unknown one."""
    if not start:
        return FileKind("an empty file", EMPTY_FILE.partition(": ")[2])
    return _by_magic(start) or _by_text(start)


# What a file begins with. The longest come first where one is the beginning of another.
MAGIC: tuple[tuple[bytes, FileKind], ...] = (
    (
        b"version https://git-lfs",
        FileKind("a Git LFS pointer, not the file", "fetch the file with `git lfs pull`"),
    ),
    (b"\xff\xfe\0\0", FileKind("UTF-32 text", UTF8.format("UTF-32"))),
    (b"\0\0\xfe\xff", FileKind("UTF-32 text", UTF8.format("UTF-32"))),
    (b"\xff\xfe", FileKind("UTF-16 text", UTF8.format("UTF-16"))),
    (b"\xfe\xff", FileKind("UTF-16 text", UTF8.format("UTF-16"))),
    (b"%PDF-", FileKind("a PDF document", "make a JPEG or PNG of the page")),
    (b"\xff\x0a", FileKind("a JPEG XL image", CONVERT)),
    (b"\0\0\0\x0cJXL \r\n\x87\n", FileKind("a JPEG XL image", CONVERT)),
    (b"\x1f\x8b", FileKind("gzip", "unpack it with gunzip", ("annotations",))),
    (b"\x28\xb5\x2f\xfd", FileKind("zstd", "unpack it with unzstd", ("annotations",))),
    (b"\xfd7zXZ\0", FileKind("xz", "unpack it with unxz", ("annotations",))),
    (b"BZh", FileKind("bzip2", "unpack it with bunzip2")),
    (b"7z\xbc\xaf\x27\x1c", FileKind("a 7-Zip archive", "unpack it")),
    (b"Rar!\x1a\x07", FileKind("a RAR archive", "unpack it")),
    (b"PK\3\4", FileKind("a ZIP archive", "unpack it", ("archive",))),
    (b"PK\5\6", FileKind("an empty ZIP archive", "get it again")),
    (b"PAR1", FileKind("a Parquet file", "set `format: parquet` of its source", ("parquet",))),
    (b"ARROW1", FileKind("an Arrow file", "write it as Parquet or JSON lines")),
    (b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file", "write its content as files of their own")),
    (b"\x93NUMPY", FileKind("a NumPy array", "write it in the format that is expected")),
    (b"SQLite format 3\0", FileKind("an SQLite database", "write its rows as JSON lines")),
    (b"\x1a\x45\xdf\xa3", FileKind("a WebM or Matroska video", "write its frames as images")),
    (b"\xff\xd8\xff", FileKind("a JPEG image", "check which file is named", ("image",))),
    (b"\x89PNG\r\n", FileKind("a PNG image", "check which file is named", ("image",))),
    (b"GIF8", FileKind("a GIF image", "check which file is named", ("image",))),
)

# Brands of ISO media files, behind `ftyp`.
BRANDS: tuple[tuple[tuple[bytes, ...], FileKind], ...] = (
    ((b"avif", b"avis"), FileKind("an AVIF image", CONVERT)),
    (
        (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"),
        FileKind("a HEIC image", CONVERT),
    ),
    ((b"qt  ",), FileKind("a QuickTime video (MOV)", "write its frames as images")),
    ((), FileKind("an MP4 video", "write its frames as images")),
)
QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")

# A protocol and the first instruction of pickles of containers, texts, bytes, numbers and globals.
PICKLE = re.compile(rb"\x80[\x02-\x05][\x95\x8c\x8d\x8e\x8a\x88\x89XBCKJMGNTUc}\](]")
MARKUP = re.compile(rb"(?:<!--.*?-->|<\?.*?\?>|<!doctype[^>]*>|\s)*", re.S | re.I)


def _by_magic(start: bytes) -> FileKind | None:
    for magic, kind in MAGIC:
        if start.startswith(magic):
            return kind
    if start[4:8] == b"ftyp":
        brands = {start[8:12], *(start[at : at + 4] for at in range(16, _box_end(start), 4))}
        return next(kind for names, kind in BRANDS if not names or not brands.isdisjoint(names))
    if start[4:8] in QUICKTIME and start[:1] == b"\0":
        return FileKind("a QuickTime video (MOV)", "write its frames as images")
    if start[257:262] == b"ustar":
        return FileKind(
            "a tar archive", "as annotations it takes `format: webdataset`", ("archive",)
        )
    if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 30:
        return FileKind("a safetensors file", "it holds weights; check which file is named")
    if PICKLE.match(start):
        return FileKind("a pickle", "it is never loaded, since it may run code; write it as JSON")
    return None


def _box_end(start: bytes) -> int:
    return min(int.from_bytes(start[:4], "big"), 64, len(start))


def _by_text(start: bytes) -> FileKind | None:
    """The kind of a text: a page, a picture in SVG, JSON of another form, tiktoken's ranks."""
    for order, zero, letter in (("LE", start[1:2], start[:1]), ("BE", start[:1], start[1:2])):
        if zero == b"\0" and letter in (b"[", b"{", b"<"):
            return FileKind(f"UTF-16{order} text", UTF8.format(f"UTF-16{order}"))
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return FileKind("a file of white space", "get it again")
    if text.startswith(b"<"):
        match = MARKUP.match(text)
        tag = text[match.end() if match else 0 :][:4].lower()
        if tag == b"<svg":
            return FileKind("an SVG drawing", "make a JPEG or PNG of it")
        if text.lower().startswith(b"<?xml") and tag != b"<htm":
            return FileKind("an XML document", "check which file is named")
        remedy = "download the raw file (/resolve/ in its address, not /blob/)"
        return FileKind("a web page", remedy)
    if text.startswith(b"{"):
        return _json_kind(text.decode("utf-8", "replace"))
    if _is_tiktoken(text):
        return FileKind(
            "a tiktoken file (base64 tokens with their ranks)",
            "get the tokenizer.json of the model's Hugging Face repository",
            ("ranks",),
        )
    return None


def _is_tiktoken(text: bytes) -> bool:
    for line in text.split(b"\n", 3)[:2]:
        token, _, rank = line.strip().partition(b" ")
        try:
            if not rank.isdigit() or not base64.b64decode(token, validate=True):
                return False
        except binascii.Error:
            return False
    return True


# ---- JSON of another form ------------------------------------------------------------------------

# A record, or the file of a tokenizer, has one of these.
RECORD_FIELDS = frozenset(
    {"conversations", "messages", "hf_format_conversations", "texts", "image", "caption", "model",
     "added_tokens", "model_max_length", "tokenizer_class"}
)  # fmt: skip
# What people call the list of the records; another name is one only where the object is not a line.
WRAPPERS = frozenset(
    {"data", "dataset", "annotations", "records", "samples", "items", "examples", "instances",
     "rows", "results", "train", "questions"}
)  # fmt: skip
COCO = frozenset({"images", "annotations", "categories", "licenses", "info", "type"})
FIELD = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*:\s*')


def _json_kind(text: str) -> FileKind | None:
    """Whether the first object is COCO's or wraps the records, as far as it can be seen."""
    is_line, more = _begins_with_a_line(text)
    if is_line and more:
        return None  # JSON lines
    fields = _top_fields(text)
    names = set(fields)
    lists = [name for name, begin in fields.items() if re.match(r"\[\s*\{", begin)]
    if names & RECORD_FIELDS:
        return None
    if len(names & COCO) >= 2 and {"images", "annotations"} & set(lists):
        return FileKind(
            "COCO's form of annotations",
            "write a record {id, image, conversations} for each caption or question",
            ("tokenizer",),
        )
    wrapping = [name for name in lists if name in WRAPPERS or not is_line]
    if len(wrapping) == 1:
        return FileKind(
            f"one object with the records under `{wrapping[0]}`",
            f"write the list alone: jq -c '.{wrapping[0]}[]' OLD > NEW.jsonl",
            ("tokenizer",),
        )
    return None


def _begins_with_a_line(text: str) -> tuple[bool, bool]:
    """Whether the first line is a whole JSON value, and whether more follows it."""
    line, _, rest = text.partition("\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False, bool(rest.strip())
    return True, bool(rest.strip())


def _over_lines(start: bytes) -> FileKind | None:
    """An object over several lines, as jq writes it."""
    text = start.decode("utf-8-sig", "replace").lstrip()
    if not text.startswith("{") or _begins_with_a_line(text)[0] or not _top_fields(text):
        return None
    if text.partition("\n")[0].strip() != "{":
        try:
            _, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        if "\n" not in text[:end]:
            return None
    return FileKind("an object over several lines", "write one a line: jq -c . OLD > NEW.jsonl")


def _top_fields(text: str) -> dict[str, str]:
    """The fields of the object that a text begins with, as far as seen, and how each begins."""
    fields: dict[str, str] = {}
    at = 1
    decoder = json.JSONDecoder()
    while (match := FIELD.match(text, at)) is not None:
        begin = match.end()
        fields[match[1]] = text[begin : begin + 40]
        try:
            _, at = cast("tuple[object, int]", decoder.raw_decode(text, begin))
        except (ValueError, RecursionError):
            break  # it goes on behind what was read
        comma = re.compile(r"\s*,").match(text, at)
        if comma is None:
            break
        at = comma.end()
    return fields
