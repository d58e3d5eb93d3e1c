"""From a run to files of others and to answers: what stock transformers makes of an image file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaImageProcessorPil,
)
from transformers.utils.import_utils import is_torchvision_available

import pipelines.export
import pipelines.generate
import pipelines.train
from lapilli.data.images.view import ImageSpec, prepare
from lapilli.model.interop.hf import Preprocessing, read_hf, write_processor
from lapilli.model.interop.llava import load_llava
from lapilli.model.vlm import build_model
from lapilli.train.inference.assistant import Assistant, Question, open_assistant
from pipelines.cli.command import run
from tests.factories import image_bytes
from tests.pipelines.test_train import RECIPE
from tests.train.small_run import small_dataset

# transformers' processor resizes with torchvision where that is installed, else with Pillow
STOCK_RESIZER: Any = "torch" if is_torchvision_available() else "pillow"
QUESTION = "What colour is the cat?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    dataset = small_dataset(folder, images=10, text_only=10)
    (folder / "run.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [f"--config={folder / 'run.yaml'}", f"--dataset={dataset}", "--launcher=process"]
    assert pipelines.train.main([*arguments, f"--output={folder / 'run'}", "--max_steps=3"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    output = trained.parent / "export"
    assert pipelines.export.main([str(trained), "--to=hf", f"--output={output}"]) == 0
    return output


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(image_bytes("png", 57, 40, seed=3))
    return path


def messages(photo: Path) -> list[dict[str, Any]]:
    content = [{"type": "image", "path": str(photo)}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def test_stock_transformers_sees_what_training_saw(
    trained: Path, exported: Path, photo: Path
) -> None:
    ours = open_assistant(trained)
    processor: Any = AutoProcessor.from_pretrained(exported)
    twin: Any = LlavaForConditionalGeneration.from_pretrained(exported).eval()
    inputs = processor.apply_chat_template(
        messages(photo),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    question = Question.of(QUESTION, photo.read_bytes())
    prompt = ours.prompt(question.turns)
    expanded = np.repeat(prompt, np.where(prompt < 0, ours.model.vision.num_tokens, 1))
    image_id = twin.config.image_token_id
    assert inputs["input_ids"][0].tolist() == [image_id if i < 0 else i for i in expanded.tolist()]

    spec = replace(ours.spec, resizer=STOCK_RESIZER)
    torch.testing.assert_close(
        inputs["pixel_values"][0], normalised(ours, photo, spec), rtol=1e-5, atol=1e-5
    )
    pixels = np.array(prepare(photo.read_bytes(), spec))

    slots = expanded < 0
    index = np.where(slots, np.cumsum(slots) - 1, -1).astype(np.int32)[None]
    with torch.inference_mode():
        embedded = ours.model.embed(
            torch.from_numpy(np.where(slots, 0, expanded))[None],
            torch.from_numpy(index),
            torch.from_numpy(pixels)[None],
        )
        expected = ours.model.language(inputs_embeds=embedded).logits
        found = twin(**inputs).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def processed(backend: Any, asked: Assistant, aspect: str, image: Path, folder: Path) -> Tensor:
    """What transformers' processor, written for an aspect, makes of an image file."""
    how = Preprocessing(32, aspect, asked.spec.colour)
    write_processor(asked.model, how, folder)
    with Image.open(image) as opened:
        made = backend.from_pretrained(folder)(opened.convert("RGB"), return_tensors="pt")
    return made["pixel_values"][0]


def normalised(asked: Assistant, image: Path, spec: ImageSpec) -> Tensor:
    """The same file as training sees it, float32 [3, H, W]."""
    pixels = torch.from_numpy(np.array(prepare(image.read_bytes(), spec)))
    vision = asked.model.config.vision
    mean, std = 255 * torch.tensor(vision.mean), 255 * torch.tensor(vision.std)
    return ((pixels.float() - mean) / std).permute(2, 0, 1)


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(57, 40), (40, 57), (32, 32), (31, 90)])
@pytest.mark.parametrize("resizer", ["torch", "pillow"])
def test_each_backends_pixels_are_its_resizers(
    exported: Path, tmp_path: Path, resizer: Any, size: tuple[int, int], aspect: Any
) -> None:
    if resizer == "torch" and not is_torchvision_available():
        pytest.skip("transformers' tensor processor needs torchvision, which is not installed")
    backend = LlavaImageProcessor if resizer == "torch" else LlavaImageProcessorPil
    image = tmp_path / "image.png"
    image.write_bytes(image_bytes("png", *size, seed=5))
    asked = open_assistant(exported)
    found = processed(backend, asked, aspect, image, tmp_path)
    spec = replace(asked.spec, resizer=resizer, aspect=aspect)
    expected = normalised(asked, image, spec)
    if (resizer, aspect) == ("pillow", "stretch") and size[1] > size[0]:
        # Pillow takes the passes of a tall image in the other order: roundings differ
        level = 1 / (255 * min(asked.model.config.vision.std or ()))
        assert (found - expected).abs().mean() < level
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_export_answers_as_its_run(
    trained: Path, exported: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    for model in (trained, exported):
        arguments = [str(model), f"--image={photo}", f"--question={QUESTION}", "--device=cpu"]
        capsys.readouterr()
        assert pipelines.generate.main([*arguments, "--decoding.max_new_tokens=12"]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0] == said[1]
    assert said[0]


def test_the_weights_are_the_runs_in_every_form(trained: Path, exported: Path) -> None:
    ours = open_assistant(trained).model
    output = trained.parent / "llava"
    assert pipelines.export.main([str(trained), "--to=llava", f"--output={output}"]) == 0
    back = build_model(replace(ours.config, seed=99))
    load_llava(output, back)
    alone = build_model(replace(ours.config, seed=99))
    load_llava(output / "projector" / "mm_projector.bin", alone)
    assert torch.equal(
        alone.projector.state_dict()["0.weight"], ours.projector.state_dict()["0.weight"]
    )
    for found in (back.state_dict(), read_hf(exported).state_dict()):
        for name, value in ours.state_dict().items():
            assert torch.equal(value, found[name]), name


def test_a_file_of_questions_and_a_folder_of_images(exported: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image_bytes("png", 40, 30, seed=number))
    rows = [
        {"question_id": n, "image": f"{n}.png", "text": f"{QUESTION} {n}", "category": "conv"}
        for n in range(3)
    ] + [{"question_id": "text", "text": QUESTION}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    common = [f"--output={output}", "--batch=2", "--decoding.max_new_tokens=4", "--device=cpu"]
    questions = [f"--questions={tmp_path / 'q.jsonl'}", f"--images={tmp_path}"]
    assert pipelines.generate.main([str(exported), *questions, *common]) == 0
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in found] == [0, 1, 2, "text"]
    alone = open_assistant(exported).answer(
        [Question.of(str(rows[1]["text"]), (tmp_path / "1.png").read_bytes())],
        pipelines.generate.Decoding(4),
    )
    assert found[1]["text"] == alone[0]
    output = tmp_path / "folder.jsonl"
    folder = [f"--image={tmp_path}", f"--question={QUESTION}", f"--output={output}"]
    assert pipelines.generate.main([str(exported), *common, *folder]) == 0
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in found] == ["0.png", "1.png", "2.png"]


def one_line(
    main: Callable[[Sequence[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(arguments))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if not line.startswith("Loading weights")]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing asked"),
        (["--image=/no/cat.jpg"], "image: /no/cat.jpg is not there"),
        (["--image=EMPTY"], "no image in"),
        (["--image=BROKEN", "--question=?"], "image 1 is image_undecodable"),
        (["--questions=/no/file"], "questions: /no/file is not there"),
        (["--questions=BROKEN"], "line 1: expected an object with question_id"),
        (["--question=x", "--questions=y"], "expected one or the other"),
        (["--question=x", "--decoding.temperature=-1"], "temperature"),
        (["--question=x", "--batch=0"], "batch: 0"),
        (["--question=x", "--output=/no/folder/x"], "is in no folder"),
    ],
)
def test_a_mistake_in_what_is_asked_is_one_line(
    exported: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_text("no image\n", encoding="utf-8")
    replaced = [
        flag.replace("EMPTY", str(tmp_path / "empty")).replace(
            "BROKEN", str(tmp_path / "broken.jpg")
        )
        for flag in flags
    ]
    arguments = [str(exported), "--device=cpu", *replaced]
    assert words in one_line(pipelines.generate.main, arguments, capsys)


def test_a_mistake_in_an_export_is_one_line(
    trained: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        return one_line(pipelines.export.main, list(arguments), capsys)

    assert "is no form" in said("--to=gguf", f"--output={tmp_path / 'a'}")
    assert "run: nothing named" in said("--to=hf", f"--output={tmp_path / 'a'}")
    assert "no run" in said(str(tmp_path), "--to=hf", f"--output={tmp_path / 'a'}")
    assert "is not empty" in said(str(trained), "--to=hf", f"--output={exported}")
    assert "dataset: nothing named" in said("--to=webdataset", f"--output={tmp_path / 'a'}")
    assert "without adapters" in said(str(trained), "--to=peft", f"--output={tmp_path / 'a'}")
    assert "is an export already" in said(str(exported), "--to=hf", f"--output={tmp_path / 'a'}")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file" in said(str(trained), "--to=hf", f"--output={tmp_path / 'file'}")
    large = ("--shard_size=large", f"--output={tmp_path / 'a'}")
    assert "expected a size such as 5GB" in said(str(trained), "--to=hf", *large)
    assert not (tmp_path / "a").exists()


def test_a_refused_export_leaves_nothing_behind(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def rest(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", rest)
    said = one_line(
        pipelines.export.main, [str(trained), "--to=hf", f"--output={tmp_path / 'a'}"], capsys
    )
    assert "o space left" in said
    assert list(tmp_path.iterdir()) == []
