"""Files of strangers with damage drawn by chance, read in a process of its own.

`python -m tests.fuzzing FOLDER --seconds 480 --seed 0` runs until the time or `--cases` is used up.
The case at work lies in `FOLDER/case`, so that one that ends the process can be looked at. Whatever
is no error of the package's own, a read that does not end and more than 2 GB are printed as JSON
lines.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import lzma
import random
import shutil
import signal
import sys
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lapilli.data import open_dataset
from lapilli.data.config import SourceConfig
from lapilli.data.dataset.verify import verify_dataset
from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.mounts import Located, Mount, read_image
from lapilli.data.planning.scan import survey
from lapilli.data.sources.validation import read_entries
from lapilli.data.text.chat_template.bounded_jinja import BoundedTemplate
from lapilli.data.text.templates import get_template
from lapilli.model.errors import ModelError
from lapilli.train.errors import TrainError
from pipelines.check import CheckConfig
from pipelines.cli.command import UsageError, parse
from pipelines.cli.question_file import read_questions
from tests.factories import build_dataset, conversation, image_bytes, make_mixture, make_tokenizer

__all__ = ["FILES", "OWN", "main"]

OURS = (DataError, ModelError, TrainError, UsageError, BadImage)
MOST_SECONDS = 60  # of one case; the slowest takes one or two
MOST_MEMORY = 2 << 20  # KiB
EXTREMES = [
    b"9" * 5000, b"-1", b"-9223372036854775808", b"18446744073709551616", b"1e999", b"NaN", b"null",
    b"[" * 100_000, b'{"a":' * 2000, b"\xe2\x80\xa8", b'"\\ud800"', b"\0", b"\xff\xfe", b"../" * 20,
    b"a/" * 3000, b"true", b" " * 70_000, b'""', b"{}", b"&a [*a]", b"<image>", b"\r", b"\n", b'"',
]  # fmt: skip
RECORDS: list[dict[str, Any]] = [
    conversation("a", "1.jpg", turns=2),
    conversation("b"),
    conversation("c", ["1.jpg", "2.png"]),
    conversation(4, "1.jpg") | {"width": 5, "weight": [1]},
]
RECIPE = """
sources:
- {name: s, annotations: &files ["a.json", "b-{0..3}.json"], images: ., roles: {bot: assistant}}
template: v1
tokenizer: ""
views: {v: {size: 64, fill: [0, 0, 0]}}
mixture: {weights: {s: 1.5}, total: 10}
exclude: [s/1, *files]
max_quarantined: 0.5
"""
TEMPLATE = "base: v1\nsystem: 'a system text'\nanswer_end: '</s>'\ntrains: answers\n"
JINJA = (
    "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x ~ m['role'] %}"
    "{{ '<|' + m.role + '|>' }}{{ m['content'] | trim * 2 }}{% if loop.last %}{{ ns.x }}{% endif %}"
    "{% endfor %}{{ range(10) | join(', ') }}{{ '%s' % messages | length }}"
)


@dataclass(frozen=True)
class Kind:
    """A kind of file: its whole content, its name, and what reads it from a folder."""

    name: str
    content: bytes
    read: Callable[[Path], object]


def _source(format_name: str = "llava", *files: str) -> Callable[[Path], object]:
    """Every record, and each image that is found."""

    def read(folder: Path) -> object:
        config = SourceConfig("s", [*files], format=format_name)
        mount = Mount(folder)
        for entry in read_entries(config, folder):
            for key in entry.record.images[:3] if entry.record else ():
                _read(mount, key)
            assert entry.pack().raw_json is None or entry.verdict.reason
        return None

    return read


def _read(mount: Mount, key: str) -> None:
    place = mount.locate(key)
    if isinstance(place, Located):
        read_image(mount.root, place)


def _archive(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        mount = Mount(folder)
        for key in (f"{name}/1.jpg", f"{name}/x/2.png", f"{name}/x\\3.png", f"{name}/none.jpg"):
            try:
                _read(mount, key)
            except BadImage:
                continue

    return read


def _recipe(folder: Path) -> object:
    config = parse(CheckConfig, [f"--config={folder / 'r.yaml'}", f"--root={folder}"], "")
    return survey(replace(config, root=str(folder))) if config.sources else None


def _jinja(folder: Path) -> object:
    """A template may raise whatever it likes; it must end, and in little memory."""
    try:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        source = (folder / "t.jinja").read_text("utf-8", "replace")
        return BoundedTemplate(source).render(said, {"bos_token": "<s>"})
    except Exception:
        return None


def _packed() -> dict[str, bytes]:
    jpeg, png = image_bytes("jpeg"), image_bytes("png")
    made: dict[str, bytes] = {}
    members = {"1.jpg": jpeg, "x/2.png": png, "x\\3.png": png}
    zipped, tarred, sharded = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    samples = {
        "0.jpg": jpeg,
        "0.json": json.dumps(RECORDS[1]).encode(),
        "1.png": png,
        "1.txt": b"a",
    }
    for file, files, form in (
        (tarred, members, tarfile.GNU_FORMAT),
        (sharded, samples, tarfile.PAX_FORMAT),
    ):
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(data), {"comment": "é" * 50}
                tar.addfile(info, io.BytesIO(data))
    made["m.zip"], made["m.tar"], made["shard.tar"] = (
        f.getvalue() for f in (zipped, tarred, sharded)
    )
    return made


def _tables() -> dict[str, bytes]:
    rows = [{"id": r["id"], "conversations": r["conversations"]} for r in RECORDS[:3]]
    pictured = [row | {"image": {"bytes": image_bytes("jpeg"), "path": "1.jpg"}} for row in rows]
    made: dict[str, bytes] = {}
    for name, table in (("t.parquet", rows), ("p.parquet", pictured)):
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(table), file, compression="zstd")
        made[name] = file.getvalue()
    return made


def _kinds() -> list[Kind]:
    array = json.dumps(RECORDS, indent=1).encode()
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    packed, tables = _packed(), _tables()
    roles = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]
    captions = [{"image_id": "1.jpg", "caption": ["a", "b"], "url": "u"}]
    texts = [{"images": ["1.jpg"], "texts": [{"user": "a", "assistant": "b"}]}]
    pair = b'{"1.jpg": {"image_file": "1.jpg", "ID": "7", "path": "."}}'
    questions = (
        b'{"question_id": 1, "text": "a", "image": "1.jpg"}\n{"question_id": "b", "text": "c"}\n'
    )
    made = [
        Kind("a.json", array, _source("llava", "a.json")),
        Kind("a.jsonl", lines, _source("llava", "a.jsonl")),
        Kind("a.json.gz", gzip.compress(array), _source("llava", "a.json.gz")),
        Kind("a.json.xz", lzma.compress(array), _source("llava", "a.json.xz")),
        Kind(
            "a.json.zst", pa.compress(lines, "zstd", asbytes=True), _source("llava", "a.json.zst")
        ),
        Kind("m.json", json.dumps(roles).encode(), _source("messages", "m.json")),
        Kind("c.json", json.dumps(captions).encode(), _source("ai_challenger", "c.json")),
        Kind("x.json", json.dumps(texts).encode(), _source("texts", "x.json")),
        Kind("map.json", pair, _source("basic_vlm", "map.json", "said.json")),
        Kind("t.parquet", tables["t.parquet"], _source("parquet", "t.parquet")),
        Kind("p.parquet", tables["p.parquet"], _source("parquet", "p.parquet")),
        Kind("shard.tar", packed["shard.tar"], _source("webdataset", "shard.tar")),
        Kind("m.zip", packed["m.zip"], _archive("m.zip")),
        Kind("m.tar", packed["m.tar"], _archive("m.tar")),
        Kind("r.yaml", RECIPE.encode(), _recipe),
        Kind("t.yaml", TEMPLATE.encode(), lambda folder: get_template(folder / "t.yaml")),
        Kind("t.jinja", JINJA.encode(), _jinja),
        Kind("q.jsonl", questions, lambda f: read_questions(f / "q.jsonl", f)),
    ]
    view = ImageSpec(32, (0, 0, 0), max_pixels=1 << 20)
    for kind in ("jpeg", "png", "webp", "gif"):
        name = f"i.{kind}"
        made.append(
            Kind(name, image_bytes(kind), lambda f, n=name: prepare((f / n).read_bytes(), view))
        )
    return made


def _read_dataset(folder: Path) -> None:
    verify_dataset(folder)
    opened = open_dataset(folder, view="pad32", image_tokens=4)
    for number in range(min(3, len(opened))):
        opened.sample(number)


def _dataset_kinds(folder: Path) -> list[Kind]:
    """The files of a dataset, each of which is damaged in a copy of it."""
    build_dataset(
        make_mixture(folder / "root"), folder / "out", make_tokenizer(folder / "tokenizer")
    )
    files = sorted(path for path in (folder / "out").rglob("*") if path.is_file())

    def reader(path: Path) -> Callable[[Path], object]:
        inner = path.relative_to(folder / "out")

        def read(case: Path) -> None:
            copy = case / "dataset"
            shutil.copytree(folder / "out", copy)
            shutil.copy(case / path.name, copy / inner)
            _read_dataset(copy)

        return read

    return [Kind(path.name, path.read_bytes(), reader(path)) for path in files]


FILES = [kind.name for kind in _kinds()]
OWN = "dataset"


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A file with some bytes flipped, cut, doubled or replaced by what readers fear."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(data) + 1)
        way = chance.randrange(6)
        if way == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif way == 1 and data:
            data[at % len(data)] = chance.randrange(256)
        elif way == 2:
            del data[at : at + chance.choice((1, 4, 100, len(data)))]
        elif way == 3:
            data[at:at] = data[at : at + chance.randrange(200)]
        elif way == 4:
            extreme = chance.choice(EXTREMES)
            data[at : at + chance.choice((0, 1, 4, 8))] = extreme
        else:
            data[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
    return bytes(data)


def _memory() -> int:
    """The most memory of this process so far, KiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0])


class Hang(BaseException):
    """A case that does not end."""


def _hang(*_: object) -> None:
    raise Hang


def _fault(kind: Kind, folder: Path) -> str:
    """What reading one damaged file comes to that it must not; "" for nothing."""
    signal.alarm(MOST_SECONDS)
    try:
        kind.read(folder)
    except OURS as error:
        return "an error of several lines" if "\n" in str(error).strip() else ""
    except (Exception, Hang):
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return ""


def _write_case(folder: Path, kind: Kind, chance: random.Random) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, form in ((1, "jpeg"), (2, "png")):
        (folder / f"{number}.{'jpg' if number == 1 else 'png'}").write_bytes(image_bytes(form))
    (folder / "said.json").write_text('{"7": {"q": "a", "a": [{"value": "b"}]}}')
    (folder / kind.name).write_bytes(damaged(kind.content, chance))


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--cases", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=f"a name, or {OWN}: the files of a dataset")
    given = parser.parse_args(argv)
    kinds = _kinds()
    if given.only == OWN:
        kinds = _dataset_kinds(given.folder)
    elif given.only:
        kinds = [kind for kind in kinds if kind.name == given.only]
    signal.signal(signal.SIGALRM, _hang)
    end, faults, done = time.monotonic() + given.seconds, 0, 0
    for number in range(given.cases):
        if time.monotonic() > end or faults >= 20:
            break
        kind = kinds[number % len(kinds)]
        before = _memory()
        _write_case(given.folder / "case", kind, random.Random(f"{given.seed}/{number}"))
        fault = _fault(kind, given.folder / "case")
        if not fault and _memory() > MOST_MEMORY > before:
            fault = f"{_memory()} KiB of memory"
        if fault:
            faults += 1
            kept = given.folder / f"fault-{number}-{kind.name}"
            shutil.copy(given.folder / "case" / kind.name, kept)
            print(
                json.dumps({"case": number, "file": kind.name, "kept": str(kept), "fault": fault})
            )
        done = number + 1
    print(json.dumps({"cases": done, "memory": _memory()}))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
