"""Basic-VLM from its data to its files: built, trained, exported, and asked as it asks."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import pipelines.export
import pipelines.generate
import pipelines.train
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.record import TextPart
from lapilli.data.text.tokenizer_files import QWEN_SPECIALS, load_tokenizer
from lapilli.model.config import Decoding
from lapilli.train.inference.assistant import Question, open_assistant
from pipelines.cli.settings import ServeLimits
from pipelines.serving.completion_request import QuestionForm, read_request
from tests.factories import build_dataset, image_bytes, make_mixture
from tests.model.test_basic_vlm import adapters
from tests.model.test_qwen1 import write_qwen1

SIDE = 28
PREFIX = "用中文回答："  # what the original's test.py and webUI.py put before a question
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": 14,
}  # fmt: skip
ROWS = 256 + len(QWEN_SPECIALS)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-1 with a tokenizer of its kind: 256 bytes, and Qwen-7B's special tokens."""
    folder = write_qwen1(
        tmp_path_factory.mktemp("base") / "Qwen-7B-Chat", rows=ROWS, seq_length=512
    )
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    mixture = make_mixture(folder / "raw", images=6, text_only=2)
    view = ImageSpec(SIDE, aspect="stretch", fill=(127, 127, 127))
    build_dataset(mixture, folder / "data", base, views={"siglip384": view}, template="qwen_vl")
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(folder / "siglip")
    recipe = Path(pipelines.train.__file__).parent / "recipes/basic_vlm/train.yaml"
    flags = [
        f"--config={recipe}", f"--dataset={folder / 'data'}", f"--output={folder / 'run'}",
        f"--model.language.pretrained={base}", f"--model.vision.pretrained={folder / 'siglip'}",
        "--launcher=process", "--device=cpu", "--max_steps=2", "--precision=fp32",
        "--model.dtype=fp32", "--model.lora.rank=4", "--zero_stage=0",
    ]  # fmt: skip
    assert pipelines.train.main(flags) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    output = run.parent / "exported"
    assert pipelines.export.main([str(run), "--to=basic_vlm", f"--output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def photo(run: Path) -> Path:
    path = run.parent / "photo.png"
    path.write_bytes(image_bytes("png", 40, 30, seed=3))
    return path


def said(model: Path, photo: Path, capsys: Capture, *flags: str) -> str:
    question = f"--question={PREFIX}图中有什么<|extra_0|>"
    asked = [f"--image={photo}", question, "--decoding.max_new_tokens=12", *flags]
    assert pipelines.generate.main([str(model), *asked]) == 0
    return capsys.readouterr().out


def test_a_prompt_is_the_ids_of_its_make_context(run: Path, base: Path, photo: Path) -> None:
    """ChatML around the Chinese system text and prefix, the image where the marker stood."""
    asked = open_assistant(run)
    text = f"{PREFIX}图中有什么<|extra_0|>"
    question = Question.of(text, photo.read_bytes(), marker=asked.template.image_marker)
    tokenizer = load_tokenizer(base)
    written = (
        "<|im_start|>system\n你是一位图像理解助手。<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = np.array(tokenizer(written)["input_ids"])
    marker = tokenizer.convert_tokens_to_ids("<|extra_0|>")
    assert (expected == marker).sum() == 1
    assert (
        asked.prompt(question.turns).tolist()
        == np.where(expected == marker, -200, expected).tolist()
    )


def test_the_prefix_stands_before_each_question(
    run: Path, photo: Path, tmp_path: Path, capsys: Capture
) -> None:
    """`--prefix`, as the original's programs write it; answers of another one are not gone on."""
    asked = [str(run), f"--image={photo}", "--decoding.max_new_tokens=12"]
    assert (
        pipelines.generate.main([*asked, f"--prefix={PREFIX}", "--question=图中有什么<|extra_0|>"])
        == 0
    )
    assert capsys.readouterr().out == said(run, photo, capsys)
    to_file = [*asked, "--question=图<|extra_0|>", f"--output={tmp_path / 'answers.jsonl'}"]
    assert pipelines.generate.main([*to_file, f"--prefix={PREFIX}"]) == 0
    with pytest.raises(DataError, match="has answers with metadata"):
        pipelines.generate.main(to_file)


def test_a_chat_has_several_turns_as_its_page_has(base: Path, run: Path) -> None:
    """A turn with an image where the marker stands, an answer, a turn of text alone."""
    image = base64.b64encode(image_bytes("png", 8, 8)).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    template, tokenizer = open_assistant(run).template, load_tokenizer(base)
    asking = QuestionForm(PREFIX, template.image_marker)

    def question(*turns: tuple[str, Any], asking: QuestionForm = asking) -> Question:
        messages = [{"role": role, "content": content} for role, content in turns]
        body = json.dumps({"model": "m", "messages": messages}).encode()
        return read_request(body, "m", Decoding(), ServeLimits(), asking).question

    first = ("user", [shown, {"type": "text", "text": "图中有什么<|extra_0|>"}])
    asked = question(first, ("assistant", "猫"), ("user", "什么颜色"))
    written = (
        "<|im_start|>system\n你是一位图像理解助手。<|im_end|>\n"
        f"<|im_start|>user\n{PREFIX}图中有什么<|extra_0|><|im_end|>\n<|im_start|>assistant\n猫"
        f"<|endoftext|>\n<|im_start|>user\n{PREFIX}什么颜色<|im_end|>\n<|im_start|>assistant\n"
    )
    marker = tokenizer.convert_tokens_to_ids("<|extra_0|>")
    expected = np.array(tokenizer(written)["input_ids"])
    found = open_assistant(run).prompt(asked.turns)
    assert found.tolist() == np.where(expected == marker, -200, expected).tolist()
    with pytest.raises(DataError, match="2 image markers for 1 image"):
        question(("user", [shown, {"type": "text", "text": "<|extra_0|><|extra_0|>"}]))
    alone = question(("user", "你好<image>"), asking=QuestionForm())  # no place without an image
    assert alone.turns[0].parts == (TextPart("你好<image>"),)


def test_an_export_has_its_files_and_answers_as_its_run(
    run: Path, exported: Path, photo: Path, capsys: Capture
) -> None:
    found = torch.load(exported / "adapter_model.bin", weights_only=True)
    assert {n: tuple(v.shape) for n, v in found.items()} == {
        n: tuple(v.shape) for n, v in adapters().items()
    }
    assert all(v.abs().max() > 0 for n, v in found.items() if "lora_B" in n)  # it has learnt
    others = torch.load(exported / "other_params.bin", weights_only=True)
    assert {*others} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert said(exported, photo, capsys) == said(run, photo, capsys)


def test_a_published_folder_is_asked_with_template_and_view(
    run: Path, exported: Path, photo: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Its three files alone, and the tower beside them, which the original's script names."""
    for name in ("adapter_model.bin", "adapter_config.json", "other_params.bin"):
        shutil.copy(exported / name, tmp_path)
    shutil.copytree(run.parent / "siglip", tmp_path / "mm_vision_tower")
    flags = ("--template=qwen_vl", "--view={aspect: stretch, fill: [127, 127, 127]}")
    assert said(tmp_path, photo, capsys, *flags) == said(run, photo, capsys)


def test_a_checkpoint_starts_another_run(run: Path, exported: Path, base: Path) -> None:
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    flags = [
        f"--config={run / 'config.json'}", f"--output={run.parent / 'second'}",
        f"--init_from={exported}", "--max_steps=1",
    ]  # fmt: skip
    assert pipelines.train.main(flags) == 0
