"""`reproduce llava15`: its table and commands as they are, and all of it at tiny size."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lapilli.data.errors import DataError
from pipelines.reproduce import main
from pipelines.reproduction.plan import SystemFolders, planned, read_system, tolerance
from tests.factories import conversation, image_bytes, make_tokenizer
from tests.pipelines.tiny_recipes import DECODER, SCALE, TOWER

SYSTEM = read_system("llava15")
PLACES = SystemFolders("data", "made", "data/eval")
# Rows of docs/MODEL_ZOO.md, LLaVA-v1.5, as they stand in haotian-liu/LLaVA at c121f043.
ZOO = """
| LLaVA-1.5 | 7B | full_ft-1e | 78.5 | 62.0 | 50.0 | 66.8 | 58.2 | 85.9 | 1510.7 | 64.3 | 58.3 | 58.6 | 65.4 | 31.1 |
| LLaVA-1.5 | 13B | full_ft-1e | 80.0 | 63.3 | 53.6 | 71.6 | 61.3 | 85.9 | 1531.3 | 67.7 | 63.6 | 61.6 | 72.5 | 36.1 |
| LLaVA-1.5 | 7B | lora-1e | 79.1 | 63.0 | 47.8 | 68.4 | 58.2 | 86.4 | 1476.9 | 66.1 | 58.9 | 60.1 | 67.9 | 30.2 |
| LLaVA-1.5 | 13B | lora-1e | 80.0 | 63.3 | 58.9 | 71.2 | 60.2 | 86.7 | 1541.7 | 68.5 | 61.5 | 61.3 | 69.5 | 38.3 |
"""  # noqa: E501
FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K",
           "vg/VG_100K_2")  # fmt: skip


class Parsed(Exception):
    """The arguments were read; the command would begin."""


def test_the_table_is_llavas() -> None:
    for line in ZOO.strip().splitlines():
        _, size, schedule, *scores = [cell.strip() for cell in line.strip("|").split("|")]
        model = size.lower() + ("-lora" if schedule == "lora-1e" else "")
        ours = [one.scores[model] for one in SYSTEM.benchmarks.values()]
        assert ours == [float(score) for score in scores], model


def test_a_tolerance_is_two_standard_errors_of_a_difference() -> None:
    expected = 2 * math.sqrt(2 * 0.62 * 0.38 / 12578) * 100
    assert tolerance(SYSTEM.benchmarks["gqa"], "7b") == pytest.approx(expected)


@pytest.mark.parametrize("model", SYSTEM.models)
def test_every_command_is_one_that_its_verb_takes(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in planned(SYSTEM, model, PLACES, (), {}):
        verb, *words = command.words
        module: Any = importlib.import_module(f"pipelines.{verb}")
        name = next(n for n in ("parse", "read_arguments") if hasattr(module, n))
        read = getattr(module, name)

        def then_stop(*given: Any, _read: Any = read, **named: Any) -> Any:
            _read(*given, **named)
            raise Parsed

        with monkeypatch.context() as patch:
            patch.setattr(module, name, then_stop)
            with pytest.raises(Parsed):
                module.main(words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["llava16"], "system: 'llava16'; expected one of llava15; did you mean llava15?"),
        (["llava15", "--model=70b"], "model: '70b'; expected one of 7b, 13b"),
        (["llava15", "--benchmarks=gqa,mmu"], "benchmarks: 'mmu'; expected one of vqav2"),
        (["llava15", "--more={trane: -x}"], "more: 'trane'; expected one of download_pretrain"),
    ],
)
def test_a_name_that_is_none_is_one_line(flags: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as said:
        main([*flags, f"--root={tmp_path}", f"--output={tmp_path}"])
    assert str(said.value).startswith(words)
    assert "\n" not in str(said.value)


def test_scores_that_are_none_are_one_line(tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    (scores / "gqa").mkdir(parents=True)
    words = ["llava15", f"--root={tmp_path}", f"--output={tmp_path}", "--benchmarks=gqa"]
    (scores / "gqa" / "results.json").write_text("{}")
    with pytest.raises(DataError, match=r"no number at metrics\.gqa\.exact_match"):
        main(words)
    (scores / "gqa" / "results.json").write_text('{"metrics": {"gqa": {"exact_match": 0.5}}}')
    assert main(words) == 1  # 50 against 62
    (scores / "by_hand.yaml").write_text("gqa: 61.5\n")
    assert main(words) == 0
    (scores / "by_hand.yaml").write_text("gpa: 61.5\n")
    with pytest.raises(DataError, match=r"gpa: 61\.5; expected a number for one of vqav2"):
        main(words)


def write_data(root: Path) -> None:
    """LLaVA's files as they lie when all is downloaded, a few records each."""
    for name, file, folders in (
        ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images", ("",)),
        ("llava_v1_5_mix665k.json", "", FOLDERS),
    ):
        records: list[dict[str, Any]] = []
        for number in range(6):
            key = f"{folders[number % len(folders)]}/{number}.jpg".lstrip("/")
            path = root / file / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes("jpeg", 40, 30, seed=number))
            records.append(conversation(f"{number}", key, seed=number))
        (root / name).write_text(json.dumps(records), encoding="utf-8")


def write_questions(folder: Path) -> None:
    """Two questions of each of two benchmarks, in LLaVA's files."""
    for name, images in (("vqav2", "test2015"), ("textvqa", "train_images")):
        (folder / name / images).mkdir(parents=True)
        for number in range(2):
            photo = folder / name / images / f"{number}.jpg"
            photo.write_bytes(image_bytes("jpeg", 30, 40, seed=number))
    rows = [{"question_id": n, "image": f"{n}.jpg", "text": "What is it?"} for n in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("test-dev2015", "test2015"):
        (folder / "vqav2" / f"llava_vqav2_mscoco_{split}.jsonl").write_text(lines)
    asked = [{**row, "question_id": str(row["question_id"])} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in asked)
    (folder / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl").write_text(lines)
    truth = [{"image_id": str(n), "question": "what is it?", "answers": ["cat"] * 10, "id": n}
             for n in range(2)]  # fmt: skip
    (folder / "textvqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": truth}))


def more(folder: Path, **wrong: str) -> str:
    """What makes each step tiny."""
    torch.manual_seed(0)
    if not (folder / "tower").exists():
        tower: dict[str, Any] = {**TOWER, "image_size": 336, "patch_size": 112}
        CLIPVisionModel(CLIPVisionConfig(**tower)).save_pretrained(folder / "tower")
        decoder: dict[str, Any] = dict(DECODER)
        LlamaForCausalLM(LlamaConfig(**decoder)).save_pretrained(folder / "language")
        make_tokenizer(folder / "tokenizer")
    models = [f"--model.{part}.pretrained={folder / name}"
              for part, name in (("vision", "tower"), ("language", "language"))]  # fmt: skip
    train, build = " ".join([*SCALE, *models]), f"--tokenizer={folder / 'tokenizer'}"
    asked = "--device=cpu --decoding.max_new_tokens=4"
    flags = {
        "preprocess_pretrain": build, "preprocess_finetune": build, "pretrain": train,
        "finetune": train, "vqav2.generate": asked, "textvqa.generate": asked,
    } | wrong  # fmt: skip
    return json.dumps(flags)


@pytest.mark.faults  # two builds, two trainings and an export: half a minute
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("ray_local")
def test_all_of_it_at_tiny_size_stopped_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, output = tmp_path / "root", tmp_path / "made"
    write_data(root)
    words = ["llava15", f"--root={root}", f"--output={output}", "--benchmarks=vqav2,textvqa"]

    def said() -> str:
        return " ".join(capsys.readouterr().out.split())

    assert main(words) == 0
    listed = said()
    assert "1. download_pretrain: done" in listed
    assert "3. preprocess_pretrain: next" in listed
    assert "8. vqav2: needs" in listed
    assert "2 of 11 done" in listed
    assert not output.exists()  # a list writes nothing
    tiny = more(tmp_path)
    stopped = more(tmp_path, finetune="--optim.lr=-1")
    with pytest.raises(Exception, match="lr"):
        main([*words, "--execute", f"--more={stopped}"])
    pretrained = output / "runs" / "pretrain" / "metrics.jsonl"
    before = pretrained.stat().st_mtime_ns
    said()
    assert main([*words, "--execute", f"--more={tiny}"]) == 0
    went_on = said()
    assert "5 of 11 done" in went_on
    assert "finetune: lapilli train" in went_on
    assert "pretrain: lapilli train" not in went_on
    assert pretrained.stat().st_mtime_ns == before
    write_questions(root / "eval")  # eval.zip has come
    (output / "scores" / "by_hand.yaml").write_text("vqav2: 78.4\n")
    assert main([*words, "--execute", f"--more={tiny}"]) == 1  # TextVQA is far below
    scored = said()
    assert "VQAv2 test-dev 78.5" in scored
    assert "TextVQA val 58.2" in scored
    assert "below the tolerance" in scored
    rows = json.loads((output / "scores" / "vqav2_upload.json").read_text())
    assert [one["question_id"] for one in rows] == [0, 1]
    assert main([*words, f"--more={tiny}"]) == 1
    assert "11 of 11 done" in said()
