"""`lapilli download`: what a recipe needs, from a server, into the root alone."""

from __future__ import annotations

import io
import json
import socket
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pipelines.download
import pipelines.downloads.catalog as catalog
import pipelines.downloads.transfer as transfer
from lapilli.data.config import SourceConfig
from lapilli.data.mounts.published import PublishedArchive
from pipelines.downloads.catalog import needed
from tests.downloads.web import Page, Web, serve
from tests.factories import conversation, image_bytes
from tests.pipelines.test_train import one_line

LLAVA = "/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main"
JPEG = image_bytes("jpeg")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BACKOFF", 0.01)


def zipped(**members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("__", "/"), data)
    return made.getvalue()


def instructions(*images: str) -> bytes:
    return json.dumps([conversation(str(n), image) for n, image in enumerate(images)]).encode()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def download(root: Path, recipe: str, *flags: str) -> int:
    return pipelines.download.main([f"--config={recipe}", f"--root={root}", *flags])


PLACES = {
    "llava15/finetune_data": [
        "llava_v1_5_mix665k.json", "coco/train2017.zip", "gqa/images.zip",
        "ocr_vqa/ocr_vqa_images_llava_v15.zip", "textvqa/train_val_images.zip", "vg/images.zip",
        "vg/images2.zip",
    ],
    "llava15/pretrain_data": ["blip_laion_cc_sbu_558k.json", "images.zip"],
    "basic_vlm/data": ["detail_23k.json", "complex_reasoning_77k.json", "train2017.zip"],
    "icm_instruct/csft_data": ["icm-instruct-train.zip"],
    "visper_lm/vpt_data": [
        "allava_laion/ALLaVA-Caption-LAION-4V.json", "allava_vflan/ALLaVA-Caption-VFLAN-4V.json",
        *(f"allava_laion/image_chunks/images_{n}.zip" for n in range(10)),
        "allava_vflan/images.zip",
    ],
}  # fmt: skip


@pytest.mark.parametrize("recipe", PLACES)
def test_a_dry_run_says_what_is_needed_without_a_network(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert download(tmp_path / "root", recipe, "--dry_run") == 0
    text = said(capsys)
    for place in PLACES[recipe]:
        assert f"get: {place}" in text
    assert text.count("get: ") == len(PLACES[recipe])
    assert not (tmp_path / "root").exists()


def test_what_is_got_by_hand_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download(tmp_path, "basic_vlm/data", "--dry_run")
    assert "by hand: ai_challenger" in said(capsys)
    download(tmp_path, "vlm_training/finetune_prepared_data", "--dry_run")
    assert "by hand: instruction_train_all.json: written by" in said(capsys)


def test_folders_and_archives_that_are_there_are_not_got(tmp_path: Path) -> None:
    (tmp_path / "text_vqa" / "train_images").mkdir(parents=True)
    (tmp_path / "text_vqa" / "train_images" / "1.jpg").write_bytes(JPEG)
    (tmp_path / "coco" / "train2017").mkdir(parents=True)  # empty: it is not there
    source = SourceConfig("mix", "llava_v1_5_mix665k.json", aliases={"textvqa": "text_vqa"})
    there = {one.place for one in needed([source]) if one.is_there(tmp_path)}
    assert there == {"textvqa/train_val_images.zip"}


@pytest.fixture
def basic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A server with Basic-VLM's COCO files, which a mirror and the catalogue point to."""
    pages = {
        f"{LLAVA}/detail_23k.json": Page(instructions("1.jpg"), cuts=[20], etag='"d"'),
        f"{LLAVA}/complex_reasoning_77k.json": Page(instructions("1.jpg", "2.jpg")),
        "/train2017.zip": Page(
            zipped(**{"train2017__1.jpg": JPEG, "train2017__2.jpg": JPEG}), cuts=[100], etag='"z"'
        ),
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sources:\n"
        "  - {name: detail_23k, annotations: detail_23k.json, images: train2017}\n"
        "  - {name: reasoning, annotations: complex_reasoning_77k.json, images: train2017}\n"
        "views:\n  pad32: {size: 32, fill: [0, 0, 0], aspect: pad}\n",
        encoding="utf-8",
    )
    with serve() as web:
        web.pages.update(pages)
        monkeypatch.setenv("HF_ENDPOINT", web.address(""))
        archives = {
            **catalog.ARCHIVES_BY_FOLDER,
            "coco/train2017": PublishedArchive(
                "train2017.zip", web.address("/train2017.zip"), 0.001
            ),
        }
        monkeypatch.setattr(catalog, "ARCHIVES_BY_FOLDER", archives)
        yield web, str(recipe)


def test_a_recipe_is_got_and_checked_and_nothing_twice(
    basic: tuple[Web, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, recipe = basic
    root = tmp_path / "root"
    assert download(root, recipe, "--parallel=2") == 0
    text = said(capsys)
    assert "3 records: 3 good, 0 with a problem" in text
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    assert found == ["complex_reasoning_77k.json", "detail_23k.json", "train2017.zip"]
    asked = len(web.asked)
    assert download(root, recipe) == 0
    assert len(web.asked) == asked
    assert "there: train2017.zip" in said(capsys)


def test_what_is_not_got_is_named_and_the_rest_is_there(
    basic: tuple[Web, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, recipe = basic
    web.pages["/train2017.zip"] = Page(b"<html><body>moved</body></html>", kind="text/html")
    assert download(tmp_path / "root", recipe) == 1
    assert "not got: train2017.zip: " in said(capsys)
    assert (tmp_path / "root" / "detail_23k.json").is_file()


def test_nothing_is_written_outside_of_the_root(
    basic: tuple[Web, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, _ = basic
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "coco").symlink_to(outside)
    web.pages.clear()
    line = one_line(
        pipelines.download.main, ["--config=llava15/finetune_data", f"--root={root}"], capsys
    )
    assert "root: coco/train2017.zip leads out of" in line
    assert [*outside.iterdir()] == []


def test_a_file_inside_an_archive_is_put_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "/datasets/wumengyangok/ICM-Instruct/resolve/main/icm-instruct-train.zip"
    made = zipped(
        **{
            "icm-instruct-train__icm_llava_train.json": instructions("sexy_check_all/1.jpg"),
            "icm-instruct-train__sexy_check_all__1.jpg": JPEG,
        }
    )
    with serve() as web:
        web.pages[name] = Page(made)
        monkeypatch.setenv("HF_ENDPOINT", web.address(""))
        assert download(tmp_path, "icm_instruct/csft_data") == 0


def test_the_images_of_ocr_vqas_list_and_its_dead_addresses(
    basic: tuple[Web, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, recipe = basic
    web.pages["/b.gif"] = Page(image_bytes("gif"))
    web.pages["/c.jpg"] = Page(b"<html>gone</html>", kind="text/html")
    listed = {
        "1": {"imageURL": web.address("/b.gif")}, "2": {"imageURL": web.address("/none.jpg")},
        "3": {"imageURL": web.address("/c.jpg")},
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(listed), encoding="utf-8")
    root = tmp_path / "root"
    flags = [f"--ocr_vqa_list={tmp_path / 'dataset.json'}", "--check_after=false"]
    assert download(root, recipe, *flags) == 0
    assert "2 of 3 addresses of OCR-VQA's list are dead" in said(capsys)
    assert (root / "ocr_vqa" / "images" / "1.jpg").read_bytes() == image_bytes("gif")
    lines = (root / "ocr_vqa" / "dead_addresses.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == ["2", "3"]


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ({"../1": {"imageURL": "http://a/b"}}, "is no name of an image"),
        ({"1": {"imageURL": "file:///etc/passwd"}}, "has no imageURL"),
        ({"1": 1}, "has no imageURL"),
        ([], "has no addresses"),
    ],
)
def test_a_list_of_something_else_is_one_line(
    listed: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(listed), encoding="utf-8")
    flags = ["--config=llava15/finetune_data", f"--root={tmp_path / 'root'}"]
    flags.append(f"--ocr_vqa_list={tmp_path / 'dataset.json'}")
    assert words in one_line(pipelines.download.main, flags, capsys)
    assert not (tmp_path / "root").exists()
