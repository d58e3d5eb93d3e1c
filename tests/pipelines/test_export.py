"""The export command: tars that the webdataset library reads, with what the dataset was made of."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from lapilli.data.config import MixtureConfig, SourceConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.data.mounts import EXTENSIONS
from lapilli.data.record import Record
from lapilli.data.sources.validation import read_entries
from pipelines.cli.command import UsageError
from pipelines.export import main
from tests.factories import (
    Mixture,
    build_dataset,
    conversation,
    make_mixture,
    make_tokenizer,
)

EXTENSION_NAMES = {extension.removeprefix(".") for extension in EXTENSIONS}


@dataclass(frozen=True)
class Material:
    folder: Path
    mixture: Mixture

    def export(self, output: Path, **flags: Any) -> Path:
        given = {"to": "webdataset", "dataset": self.folder / "out", "output": output, **flags}
        assert main([f"--{name}={value}" for name, value in given.items()]) == 0
        return output


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("export")
    mixture = make_mixture(folder / "root", images=24, text_only=8, defects=True)
    settings = MixtureConfig(epochs={"made_up": 1.5}, held_out=6)
    build_dataset(mixture, folder / "out", make_tokenizer(folder / "tokenizer"), mixture=settings)
    return Material(folder, mixture)


def samples(output: Path, split: str) -> list[dict[str, Any]]:
    """What the library itself makes of a split's tars, undecoded."""
    urls = [str(path) for path in sorted(output.glob(f"{split}-*.tar"))]
    return list(WebDataset(urls, shardshuffle=False, empty_check=False))


def members(sample: dict[str, Any]) -> dict[str, bytes]:
    return {f"{sample['__key__']}.{name}": data for name, data in sample.items() if name[0] != "_"}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_tars_are_an_epoch_of_the_dataset(
    material: Material, tmp_path: Path, split: str
) -> None:
    output = material.export(tmp_path / "shards", samples_per_tar=7)
    dataset = open_dataset(material.folder / "out", view="pad32", image_tokens=4, split=split)
    found = samples(output, split)
    texts = [json.loads(sample["json"]) for sample in found]
    rows = [dataset.token_row(index) for index in range(len(dataset))]
    counts = Counter(row["sample_id"].rpartition("#")[0] or row["sample_id"] for row in rows)
    assert Counter(f"{t['source']}/{t['id']}" for t in texts) == counts
    assert [text["source"] for text in texts] == ["made_up"] * len(dataset)
    for sample, text, row in zip(found, texts, rows, strict=True):
        held = members(sample)
        named = [
            part["image_url"]["url"]
            for message in text["messages"]
            for part in message["content"]
            if part["type"] == "image_url"
        ]
        originals = [(material.mixture.root / i).read_bytes() for i in row["image_ids"]]
        assert [held[name] for name in named] == originals
        assert len(held) == len(originals) + 1
    assert len(list(output.glob(f"{split}-*.tar"))) == -(-len(found) // 7)


def test_what_is_exported_is_read_again_as_it_was(material: Material, tmp_path: Path) -> None:
    output = material.export(tmp_path / "root" / "shards")
    before: dict[str, Record] = {}
    for entry in read_entries(material.mixture.sources[0], material.mixture.root):
        if entry.record is not None and entry.verdict.kept:
            before[entry.record_id] = entry.record
    again = SourceConfig("again", "shards/*.tar", format="webdataset")
    entries = list(read_entries(again, output.parent))
    assert len(entries) == sum(len(samples(output, split)) for split in ("train", "held_out"))
    for entry in entries:
        assert entry.verdict.kept
        assert entry.record is not None
        assert entry.record.turns == before[entry.record_id].turns
        assert len(entry.record.images) == len(before[entry.record_id].images)


def test_an_export_is_a_dataset_again(material: Material, tmp_path: Path) -> None:
    """Tars read by member make the samples that the folder made: ids and pixels."""
    root = tmp_path / "root"
    material.export(root / "shards")
    again = Mixture(root, [SourceConfig("made_up", "shards/*.tar", format="webdataset")], {}, [])
    build_dataset(again, tmp_path / "out", material.folder / "tokenizer")
    found = open_dataset(tmp_path / "out", view="crop24", image_tokens=4)
    before = [
        open_dataset(material.folder / "out", view="crop24", image_tokens=4, split=split)
        for split in ("held_out", "train")
    ]
    expected = [dataset.sample(i) for dataset in before for i in range(len(dataset))]
    assert len(found) == len(expected)
    for index, sample in enumerate(expected):
        made = found.sample(index)
        assert made.input_ids.tolist() == sample.input_ids.tolist()
        assert made.pixels.tobytes() == sample.pixels.tobytes()


def test_extensions_say_what_the_files_are(material: Material, tmp_path: Path) -> None:
    """`odd/really_a_gif.jpg` is a GIF."""
    output = material.export(tmp_path / "shards")
    every = [s for split in ("train", "held_out") for s in samples(output, split)]
    (odd, *_) = [s for s in every if b"odd/really_a_gif.jpg" in s["json"]]
    assert odd["gif"].startswith(b"GIF8")
    pair = next(s for s in every if b'"two images"' in s["json"])
    assert {"0.png", "1.png"} <= pair.keys()


def test_any_format_is_exported_under_its_own_extension(tmp_path: Path) -> None:
    """Named .jpg in the mixture, so that only the bytes tell; Pillow says what was written."""
    root = tmp_path / "root"
    root.mkdir()
    formats = {"JPEG2000": "jp2", "PPM": "ppm", "TGA": "tga", "PNG": "png", "BMP": "bmp"}
    for name in formats:
        Image.new("RGB", (16, 12), (9, 99, 200)).save(root / f"{name}.jpg", format=name)
    records = [conversation(name, f"{name}.jpg") for name in formats]
    (root / "a.json").write_text(json.dumps(records))
    mixture = Mixture(root, [SourceConfig("made_up", "a.json")], {}, [])
    build_dataset(mixture, tmp_path / "out", make_tokenizer(tmp_path / "tokenizer"))
    tars = Material(tmp_path, mixture).export(tmp_path / "shards", samples_per_tar=9)
    found = {
        json.loads(sample["json"])["id"]: next(name for name in sample if name in EXTENSION_NAMES)
        for sample in samples(tars, "train")
    }
    assert found == formats
    source = SourceConfig("again", "shards/*.tar", format="webdataset")
    again = list(read_entries(source, tmp_path))
    assert [entry.verdict for entry in again if not entry.verdict.kept] == []
    assert sum(len(entry.record.images) for entry in again if entry.record) == len(formats)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_second_export_goes_on_and_writes_the_same(material: Material, tmp_path: Path) -> None:
    whole = hashes(material.export(tmp_path / "a", samples_per_tar=9))
    assert len(whole) > 4
    other = material.export(tmp_path / "b", samples_per_tar=9)
    assert hashes(other) == whole
    (other / "train-000001.tar").unlink()
    before = (other / "train-000000.tar").stat().st_mtime_ns
    material.export(other, samples_per_tar=9)
    assert hashes(other) == whole
    assert (other / "train-000000.tar").stat().st_mtime_ns == before


def test_data_may_have_moved(material: Material, tmp_path: Path) -> None:
    here = tmp_path / "elsewhere"
    here.symlink_to(material.mixture.root)
    assert hashes(material.export(tmp_path / "a", root=here)) == hashes(
        material.export(tmp_path / "b")
    )


def test_mistakes_are_told(material: Material, tmp_path: Path) -> None:
    output = tmp_path / "shards"

    def refused(message: str, **flags: Any) -> None:
        with pytest.raises((DataError, UsageError), match=message):
            material.export(output, **flags)

    refused("to: 'zip' is no form; expected one of webdataset", to="zip")
    refused("no dataset", dataset=tmp_path)
    refused("root: folder .* does not exist", root=tmp_path / "nowhere")
    refused("samples_per_tar: 0", samples_per_tar=0)
    assert not output.exists()
    material.export(output)
    refused("another dataset or with another samples_per_tar", samples_per_tar=3)
    (output / "export.json").unlink()
    refused("is not empty and no export")


def test_sources_that_have_changed_are_noticed(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=3)
    build_dataset(mixture, tmp_path / "out", make_tokenizer(tmp_path / "tokenizer"))
    found = Material(tmp_path, mixture)
    path = tmp_path / "root" / "mixture.json"
    elements = json.loads(path.read_text())
    path.write_text(json.dumps(elements[:-1]))
    with pytest.raises(DataError, match="is not in its sources any more"):
        found.export(tmp_path / "a")
    elements[2]["conversations"][1]["value"] += " More."
    path.write_text(json.dumps(elements))
    with pytest.raises(DataError, match="or has another text"):
        found.export(tmp_path / "b")
    path.write_text(json.dumps(elements))
    elements[2]["conversations"][1]["value"] = elements[2]["conversations"][1]["value"][:-6]
    path.write_text(json.dumps(elements))
    ids = pa.ipc.open_file(str(next((tmp_path / "out").glob("images/*/*.arrow")))).read_all()
    (tmp_path / "root" / ids["image_id"][0].as_py()).unlink()
    with pytest.raises(DataError, match=r"image .*give the --root"):
        found.export(tmp_path / "c")
