"""`lapilli check FILE` writes a recipe for somebody's own file, which then builds a dataset."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from pipelines.check import main
from pipelines.cli.command import UsageError, parse
from pipelines.cli.views import filled_views
from tests.factories import make_tokenizer

COUNT = 5


def jpeg(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (30, 20), (40 * number, 9, 9)).save(data, "JPEG")
    return data.getvalue()


def photos(folder: Path) -> list[str]:
    """Write photos; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"photo{number}.jpg" for number in range(COUNT)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))
    return names


def llava(image: str) -> dict[str, Any]:
    turns = [("human", "<image>\nWhat?"), ("gpt", "A square.")]
    return {"image": image, "conversations": [{"from": f, "value": v} for f, v in turns]}


def openai(image: str) -> dict[str, Any]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    turns = [("user", asked), ("assistant", "A square.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def pairs(image: str) -> dict[str, Any]:
    return {"images": [image], "texts": [{"user": "What?", "assistant": "A square."}]}


def as_array(root: Path) -> Path:
    path = root / "mine.json"
    path.write_text(json.dumps([llava(name) for name in photos(root / "images")]))
    return path


def as_lines(root: Path) -> Path:
    path = root / "mine.jsonl"
    path.write_text("".join(json.dumps(openai(name)) + "\n" for name in photos(root)))
    return path


def as_pairs(root: Path) -> Path:
    path = root / "mine.json"
    names = photos(root / "set" / "train")
    path.write_text(json.dumps([pairs(f"train/{name}") for name in names]))
    return path


def as_elsewhere(root: Path) -> Path:
    path = root / "mine.json"
    names = photos(root / "pictures")
    path.write_text(json.dumps([llava(f"/home/me/album/{name}") for name in names]))
    return path


def as_csv(root: Path) -> Path:
    path = root / "captions.tsv"
    rows = [f"{name}\tA square." for name in photos(root)]
    path.write_text("\n".join(["file_name\tcaption", *rows]))
    return path


def as_parquet(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(number), "path": None} for number in range(COUNT)]
    table = pa.table({"image": images, "text": ["A square."] * COUNT})
    pq.write_table(table, root / "set.parquet")
    return root


def as_tar(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "shard-0.tar", "w") as tar:
        for number in range(COUNT):
            for suffix, data in (("jpg", jpeg(number)), ("txt", b"A square.")):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root


def as_texts(root: Path) -> Path:
    for name in photos(root / "day1"):
        (root / "day1" / name).with_suffix(".txt").write_text("A square.")
    return root


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (as_array, "llava"), (as_lines, "messages"), (as_pairs, "texts"), (as_elsewhere, "llava"),
        (as_csv, "csv"), (as_parquet, "parquet"), (as_tar, "webdataset"), (as_texts, "text_files"),
    ],
)  # fmt: skip
def test_a_recipe_is_written_that_builds_the_dataset(
    make: Callable[[Path], Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make(tmp_path / "my data")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert main([str(place)]) == 0
    (recipe,) = work.glob("*_data.yaml")
    assert yaml.safe_load(recipe.read_text())["sources"][0]["format"] == kind
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    root = place if place.is_dir() else place.parent
    config = parse(
        BuildConfig,
        [f"--config={recipe}", f"--root={root}", f"--tokenizer={tokenizer}", "--output=dataset"],
        "",
    )
    config = replace(config, views=filled_views(config.views))
    build(plan_build(config), runner=run_here)
    dataset = open_dataset("dataset", view="clip336_pad", image_tokens=576, max_length=2048)
    held = open_dataset(
        "dataset", view="clip336_pad", image_tokens=576, max_length=2048, split="held_out"
    ) if len(dataset) < COUNT else []  # fmt: skip
    assert len(dataset) + len(held) == COUNT
    assert dataset.has_images.all()


def test_a_recipe_that_was_changed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = as_array(tmp_path / "data")
    recipe = tmp_path / "mine_data.yaml"
    recipe.write_text("template: vicuna\n")
    with pytest.raises(UsageError, match="exists and differs"):
        main([str(place)])
    assert recipe.read_text() == "template: vicuna\n"
    assert main([str(place), "--recipe=other.yaml"]) == 0
    assert main([str(place), "--recipe=other.yaml"]) == 0, "the same text may be written again"
    (tmp_path / "data" / "images" / "photo1.jpg").unlink()
    assert main([str(place), "--recipe=other.yaml"]) == 1, "with other photos it is the same recipe"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no annotation file"),
        ({"a.json": "[]", "b.csv": "x"}, r"several annotation files \(a.json, b.csv\)"),
        ({"a.json": '[{"prompt": "x"}, {"prompt": "y"}]'}, "can be read as llava, messages, texts"),
        ({"notes.txt": "no image"}, "holds no annotation file"),
    ],
)
def test_what_cannot_be_guessed_is_one_line(
    files: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        main([str(folder)])
    assert not list(tmp_path.glob("*.yaml"))


def test_keys_that_name_no_file_are_said_and_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.jpg").write_bytes(jpeg(1))
    keys = ["../outside.jpg", "x" * 400 + ".jpg", "gone.jpg"]
    (folder / "mine.json").write_text(json.dumps([llava(key) for key in keys]))
    monkeypatch.chdir(tmp_path)
    assert main([str(folder / "mine.json")]) == 1
    assert "0 of their 3 images are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "root: left out"),
        (["nowhere.json"], "does not exist"),
        (["data", "--root=."], "give either a file to look at or a recipe"),
    ],
)
def test_arguments_that_do_not_go_together_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        main(arguments)
