"""The data recipes of the five systems, on made-up data in the layouts these publish."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipelines.check
from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.planning.build_plan import BuildPlan
from lapilli.data.planning.plan import plan_build
from lapilli.data.record import ImagePart, TextPart
from lapilli.data.sources.validation import read_entries
from pipelines.cli.command import UsageError, parse
from tests.factories import conversation, image_bytes, make_tokenizer

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
PNG = image_bytes("png")


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)


def put_json(root: Path, name: str, value: Any) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(value), encoding="utf-8")


def mix665k(textvqa: str) -> Callable[[Path], None]:
    """Nine records; the folder of TextVQA's images may be spelt otherwise than in them."""
    keys = [
        "coco/train2017/1.jpg",
        "gqa/images/1.jpg",
        "ocr_vqa/images/1.jpg",
        "textvqa/train_images/1.jpg",
        "vg/VG_100K/1.jpg",
        "vg/VG_100K_2/1.jpg",
    ]

    def write(root: Path) -> None:
        put(root, *(key.replace("textvqa", textvqa) for key in keys))
        records = [conversation(n, key, turns=2) for n, key in enumerate(keys)]
        records += [conversation(f"sharegpt {n}") for n in range(3)]
        put_json(root, "llava_v1_5_mix665k.json", records)

    return write


def captions558k(root: Path) -> None:
    put(root, "images/00001/1.jpg", "images/00002/2.jpg")
    records = [conversation("1", "00001/1.jpg"), conversation("2", "00002/2.jpg")]
    put_json(root, "blip_laion_cc_sbu_558k.json", records)


def vlm_prepared(root: Path) -> None:
    """Lines as pandas writes them: keys renamed, a missing image null."""
    put(root, "coco/1.jpg", "text_vqa/1.jpg")
    records = [conversation(0, "coco/1.jpg"), conversation(1, "textvqa/1.jpg"), conversation(2)]
    lines = [
        {
            "id": record["id"],
            "image": record.get("image"),
            "hf_format_conversations": [
                {"role": turn["from"], "content": turn["value"]} for turn in record["conversations"]
            ],
        }
        for record in records
    ]
    path = root / "instruction_train_all.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


CHALLENGER = "ai_challenger_caption_train_20170902"


def basic_vlm(root: Path) -> None:
    """Both LLaVA files describe image 1."""
    put(root, "train2017/1.jpg", f"{CHALLENGER}/caption_train_images_20170902/a.jpg")
    for name in ("detail_23k", "complex_reasoning_77k"):
        put_json(root, f"{name}.json", [conversation("1", "1.jpg"), conversation("2", "1.jpg")])
    captions = [{"image_id": "a.jpg", "caption": ["一", "二", "三"], "url": ""}]
    put_json(root, f"{CHALLENGER}/caption_train_annotations_20170902.json", captions)


def basic_vlm_prepared(root: Path) -> None:
    put(root, "coco/1.jpg", "aic/2.jpg")
    entries = {
        name: {"path": f"/home/user/data/{folder}/", "iamge_file": name, "ID": number}
        for number, (folder, name) in enumerate([("coco", "1.jpg"), ("aic", "2.jpg")])
    }
    put_json(root, "image_map_b.json", entries)
    captions = {str(n): {"q": "看<|extra_0|>", "a": ["一", "二"]} for n in range(2)}
    put_json(root, "captions_b.json", captions)


def icm(root: Path) -> None:
    put(root, "sexy_check_all/1.jpg")
    record = conversation("identity_1_pair0", "sexy_check_all/1.jpg")
    record["conversations"][0]["value"] = "Is it?\n<image>"  # the marker stands last
    put_json(root, "icm_llava_train.json", [record])


def icm_mixed(root: Path) -> None:
    icm(root)
    mix665k("textvqa")(root)


def allava_records(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each part one, as in the README of FreedomIntelligence/ALLaVA."""
    url = {"original_caption": "A ring", "url": "https://example.com/1.jpg"}
    found: dict[str, list[dict[str, Any]]] = {}
    for part, key, more in (
        ("laion", "allava_laion/images/100277305.jpeg", url),
        ("vflan", "allava_vflan/images/images_191task_1k/PACS+guitar_830_n03272010-5.png", {}),
    ):
        put(root, key)
        record = conversation(f"allava_{part}_cap_100277305", key)
        found[part] = [record | more]
    return found


def allava(root: Path) -> None:
    for part, records in allava_records(root).items():
        put_json(root, f"allava_{part}/ALLaVA-Caption-{part.upper()}-4V.json", records)


def allava_merged(root: Path) -> None:
    """VisPer-LM's `datasets/allava`."""
    laion, vflan = allava_records(root).values()
    put_json(root, "ALLaVA-Caption.json", [*laion, *vflan])


LAYOUTS: dict[str, tuple[Callable[[Path], None], int, int]] = {
    "vlm_training/pretrain_data": (captions558k, 2, 0),
    "vlm_training/finetune_data": (mix665k("text_vqa"), 9, 1),
    "vlm_training/finetune_prepared_data": (vlm_prepared, 3, 1),
    "basic_vlm/data": (basic_vlm, 5, 0),
    "basic_vlm/prepared_data": (basic_vlm_prepared, 2, 0),
    "icm_instruct/csft_data": (icm, 1, 0),
    "icm_instruct/msft_data": (icm_mixed, 10, 0),
    "visper_lm/pretrain_data": (captions558k, 2, 0),
    "visper_lm/vpt_data": (allava, 2, 0),
    "visper_lm/vpt_merged_data": (allava_merged, 2, 0),
    "visper_lm/finetune_data": (mix665k("text_vqa"), 9, 1),
    "gaudi_llava/pretrain_data": (captions558k, 2, 0),
    "gaudi_llava/finetune_data": (mix665k("textvqa"), 9, 0),
    "llava15/pretrain_data": (captions558k, 2, 0),
    "llava15/finetune_data": (mix665k("textvqa"), 9, 0),
}


def test_cocos_questions_lose_their_line_breaks(tmp_path: Path) -> None:
    """`question.replace("\\n", "")` in its preparation; answers keep theirs."""
    basic_vlm(tmp_path)
    said = [conversation("1", "1.jpg"), conversation("2", "1.jpg")]
    for one, text in zip(said, ("<image>\nWhat is it?", "Where\n is it?\n<image>"), strict=True):
        one["conversations"][0]["value"] = text
        one["conversations"][1]["value"] = "A\nkite."
    put_json(tmp_path, "detail_23k.json", said)
    argv = [f"--config={RECIPES / 'basic_vlm/data'}.yaml", f"--root={tmp_path}", "--output=out"]
    first = parse(BuildConfig, argv, "").sources[0]
    records = [entry.record for entry in read_entries(first, tmp_path)]
    turns = [record.turns for record in records if record is not None]
    assert [one.parts for one, _ in turns] == [
        (ImagePart(0), TextPart("What is it?")),
        (TextPart("Where is it?"), ImagePart(0)),
    ]
    assert [two.text for _, two in turns] == ["A\nkite."] * 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def plan(name: str, root: Path, tokenizer: Path, *flags: str) -> BuildPlan:
    """The recipe's plan; the systems' own tokenizers are not at hand."""
    argv = [
        f"--config={RECIPES / name}.yaml",
        f"--root={root}",
        f"--output={root / 'out'}",
        f"--tokenizer={tokenizer}",
        "--template=v1",
        "--mixture.held_out=0",  # 5,000 are more than there are here
        *flags,
    ]
    return plan_build(parse(BuildConfig, argv, ""))


def test_every_data_recipe_of_the_systems_is_tried() -> None:
    found = {
        path.relative_to(RECIPES).with_suffix("").as_posix()
        for path in RECIPES.rglob("*data.yaml")
        if "sources" in yaml.safe_load(path.read_text(encoding="utf-8"))  # else a layer on one
    }
    nobodys = ("tiny/", "own_data/")
    assert {name for name in found if not name.startswith(nobodys)} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_record_of_the_published_layout_is_kept(
    name: str, tmp_path: Path, tokenizer: Path
) -> None:
    write, records, aliased = LAYOUTS[name]
    write(tmp_path)
    found = plan(name, tmp_path, tokenizer)
    bad = [(entry.sample_id, entry.verdict) for entry in found.entries if not entry.verdict.kept]
    assert bad == []
    assert len(found.entries) == records
    assert found.repairs == ({"alias": aliased} if aliased else {})


def test_a_weight_can_be_given_on_the_command_line(tmp_path: Path, tokenizer: Path) -> None:
    """As the README of icm_instruct writes it."""
    icm_mixed(tmp_path)
    weights = "{icm_instruct: 0.2, llava_v1_5_mix665k: 0.8}"
    found = plan("icm_instruct/msft_data", tmp_path, tokenizer, f"--mixture.weights={weights}")
    assert found.config.mixture.weights == {"icm_instruct": 0.2, "llava_v1_5_mix665k": 0.8}


def test_paths_of_another_machine_and_of_this_one(tmp_path: Path, tokenizer: Path) -> None:
    """The pair's paths begin with what `path_prefix` says, or lie in the root as they are."""
    put(tmp_path, "coco/1.jpg", "aic/2.jpg")
    captions = {str(n): {"q": "看<|extra_0|>", "a": ["一"]} for n in range(2)}
    put_json(tmp_path, "captions_b.json", captions)
    for prefix, flags in (
        (str(tmp_path), []),
        ("/elsewhere", ["--sources.basic_vlm.path_prefix", "/elsewhere"]),
        ("/elsewhere", ["--sources.basic_vlm.path_prefix=/elsewhere"]),
    ):
        entries = {
            name: {"path": f"{prefix}/{folder}/", "image_file": name, "ID": number}
            for number, (folder, name) in enumerate([("coco", "1.jpg"), ("aic", "2.jpg")])
        }
        put_json(tmp_path, "image_map_b.json", entries)
        found = plan("basic_vlm/prepared_data", tmp_path, tokenizer, *flags)
        assert all(entry.verdict.kept for entry in found.entries)
        assert len(found.entries) == 2


def test_one_field_of_one_source_is_given_on_the_command_line(
    tmp_path: Path, tokenizer: Path
) -> None:
    icm_mixed(tmp_path)
    flags = ["--sources.icm_instruct.seed=7", "--sources.llava_v1_5_mix665k.aliases.a=b"]
    first, second = plan("icm_instruct/msft_data", tmp_path, tokenizer, *flags).config.sources
    assert (first.seed, second.seed) == (7, 0)
    assert second.aliases == {"text_vqa": "textvqa", "a": "b"}
    assert first.aliases == {}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--sources.nobody.seed=1", "the sources are icm_instruct, llava_v1_5_mix665k"),
        ("--sources.icm_instruct=1", "expected the name of a source and a field"),
        ("--sources.icm_instruct.nothing=1", "nothing"),
        ("--sources.icm_instruct.name.x=1", "name has no fields"),
        ("--sources.icm_instruct.seed=many", "seed"),
    ],
)
def test_a_field_or_source_that_is_not_there_is_named(
    flag: str, words: str, tmp_path: Path, tokenizer: Path
) -> None:
    icm_mixed(tmp_path)
    with pytest.raises(UsageError, match=words) as said:
        plan("icm_instruct/msft_data", tmp_path, tokenizer, flag)
    assert "\n" not in str(said.value)


def test_more_held_out_than_there_is_is_found_before_an_image_is_decoded(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("an image was decoded")

    captions558k(tmp_path)
    monkeypatch.setattr(pipelines.check, "verify_images", decode)
    words = r"mixture.held_out: 5000 of 2 kept records"
    with pytest.raises(DataError, match=words):
        plan("vlm_training/pretrain_data", tmp_path, tokenizer, "--mixture.held_out=5000")
    recipe = f"--config={RECIPES / 'vlm_training/pretrain_data'}.yaml"
    with pytest.raises(DataError, match=words):
        pipelines.check.main([recipe, f"--root={tmp_path}", "--decode"])


@pytest.mark.parametrize("place", ["textvqa", "text_vqa"])
def test_the_archive_of_an_aliased_folder_is_read_and_named(
    place: str, tmp_path: Path, tokenizer: Path
) -> None:
    """Under the name of the published layout or under the folder's own."""
    mix665k("text_vqa")(tmp_path)
    shutil.rmtree(tmp_path / "text_vqa")
    name = "vlm_training/finetune_data"
    with pytest.raises(DataError, match=r"get it: mkdir -p .*text_vqa/train_val_images\.zip"):
        plan(name, tmp_path, tokenizer)
    (tmp_path / place).mkdir()
    with zipfile.ZipFile(tmp_path / place / "train_val_images.zip", "w") as archive:
        archive.writestr("train_images/1.jpg", PNG)
    assert all(entry.verdict.kept for entry in plan(name, tmp_path, tokenizer).entries)


def test_a_folder_that_is_not_there_is_no_known_hole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix665k("textvqa")(tmp_path)
    arguments = [f"--config={RECIPES / 'llava15/finetune_data'}.yaml", f"--root={tmp_path}"]
    (tmp_path / "ocr_vqa/images/1.jpg").rename(tmp_path / "ocr_vqa/images/other.jpg")
    assert pipelines.check.main(arguments) == 1
    assert "known, 1 OCR-VQA images whose addresses are dead" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "ocr_vqa")
    assert pipelines.check.main(arguments) == 1
    said = capsys.readouterr().out
    assert "known" not in said
    assert "ocr_vqa_images_llava_v15.zip" in said
