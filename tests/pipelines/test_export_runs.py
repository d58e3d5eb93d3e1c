"""Runs with adapters and with other towers: exported, loaded by others, answering as the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

import pipelines.export
import pipelines.generate
import pipelines.train
from lapilli.data.images.view import ImageSpec, prepare
from lapilli.model.config import LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.interop.hf import read_hf
from lapilli.model.interop.llava import load_llava
from lapilli.model.interop.weights import plain_weights
from lapilli.model.parts.language import build_language
from lapilli.model.vlm import build_model
from lapilli.train.inference.assistant import Assistant, Question, open_assistant
from lapilli.train.inference.evaluate import answer_dataset, load_trained, open_test
from tests.factories import build_dataset, image_bytes, make_mixture, make_tokenizer
from tests.pipelines.test_generate import STOCK_RESIZER, messages, one_line

TOWERS = {
    "clip": "intermediate_size: 24",
    "siglip": "intermediate_size: 24",
    "dinov2": "mlp_ratio: 2",
}
FILLS = {"clip": (122, 116, 104), "siglip": (127, 127, 127), "dinov2": (123, 116, 103)}
LORA = "lora: {rank: 4, alpha: 16}"
RECIPE = """
view: view
global_batch_size: 8
micro_batch_size: 4
num_workers: 1
device: cpu
optim: {lr: 0.05}
model:
  vision: {tower: TOWER, settings: {hidden_size: 16, WIDTH, num_hidden_layers: 2,
    num_attention_heads: 2, image_size: 32, patch_size: 16}}
  language: {LANGUAGE}
  LORA
"""
DECODER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Runs:
    """Trains a run of a kind on the same records."""

    folder: Path

    def dataset(self, tower: str) -> Path:
        out = self.folder / f"data-{tower}"
        if not out.exists():
            mixture = make_mixture(self.folder / f"raw-{tower}", images=8, text_only=4)
            view = ImageSpec(32, aspect="pad", fill=FILLS[tower])
            build_dataset(
                mixture, out, make_tokenizer(self.folder / "tokenizer"), views={"view": view}
            )
        return out

    def train(
        self,
        name: str,
        *,
        tower: str = "clip",
        lora: str = "",
        language: str = "",
        flags: tuple[str, ...] = (),
    ) -> Path:
        recipe, output = self.folder / f"{name}.yaml", self.folder / name
        filled = RECIPE.replace("TOWER", tower).replace("WIDTH", TOWERS[tower])
        filled = filled.replace("LORA", lora)
        filled = filled.replace("LANGUAGE", language or f"settings: {json.dumps(DECODER)}")
        recipe.write_text(filled, encoding="utf-8")
        arguments = [f"--config={recipe}", f"--dataset={self.dataset(tower)}", "--max_steps=3"]
        arguments += ["--launcher=process", f"--output={output}", *flags]
        assert pipelines.train.main(arguments) == 0
        return output

    def export(self, run: Path, to: str, *flags: str) -> Path:
        output = self.folder / f"{run.name}-{to}"
        assert pipelines.export.main([str(run), f"--to={to}", f"--output={output}", *flags]) == 0
        return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def adapted(runs: Runs) -> Path:
    """Adapters on a language model that has a folder of its own."""
    torch.manual_seed(2)
    base = build_language(LanguageConfig(settings=DECODER))
    base.save_pretrained(runs.folder / "base")
    return runs.train("lora", lora=LORA, language=f"pretrained: {runs.folder / 'base'}")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(image_bytes("png", 57, 40, seed=3))
    return path


def logits(asked: Assistant, photo: Path, question: str, spec: ImageSpec) -> tuple[Any, Any]:
    """Our ids, -200 in every slot of the image, and logits."""
    prompt = asked.prompt(Question.of(question, photo.read_bytes()).turns)
    ids = np.repeat(prompt, np.where(prompt < 0, asked.model.vision.num_tokens, 1))
    index = np.where(ids < 0, np.cumsum(ids < 0) - 1, -1).astype(np.int32)[None]
    pixels = torch.from_numpy(np.array(prepare(photo.read_bytes(), spec)))[None]
    with torch.inference_mode():
        embedded = asked.model.embed(
            torch.from_numpy(np.where(ids < 0, 0, ids))[None], torch.from_numpy(index), pixels
        )
        return ids, asked.model.language(inputs_embeds=embedded).logits


def check_processor(run: Path, export: Path, photo: Path) -> None:
    """An image file and messages through stock transformers: training's ids, pixels, logits."""
    asked = open_assistant(run)
    processor: Any = AutoProcessor.from_pretrained(export)
    twin: Any = LlavaForConditionalGeneration.from_pretrained(export).eval()
    said = messages(photo)
    inputs = processor.apply_chat_template(
        said, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    spec = replace(asked.spec, resizer=STOCK_RESIZER)
    ids, expected = logits(asked, photo, said[0]["content"][1]["text"], spec)
    image_id = twin.config.image_token_id
    assert inputs["input_ids"][0].tolist() == [image_id if i < 0 else i for i in ids.tolist()]
    mean, std = (
        torch.tensor(v) for v in (asked.model.config.vision.mean, asked.model.config.vision.std)
    )
    pixels = torch.from_numpy(np.array(prepare(photo.read_bytes(), spec))).float() / 255
    torch.testing.assert_close(
        inputs["pixel_values"][0], ((pixels - mean) / std).permute(2, 0, 1), rtol=1e-5, atol=1e-5
    )
    with torch.inference_mode():
        found = twin(**inputs).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", ["siglip", "dinov2"])
def test_stock_transformers_sees_what_another_towers_training_saw(
    runs: Runs, photo: Path, tower: str
) -> None:
    run = runs.train(tower, tower=tower)
    export = runs.export(run, "hf")
    check_processor(run, export, photo)
    assert answer(run, photo) == answer(export, photo)


def test_stock_transformers_computes_a_lora_run(runs: Runs, adapted: Path, photo: Path) -> None:
    export = runs.export(adapted, "hf", "--shard_size=20KB")
    check_processor(adapted, export, photo)
    assert answer(adapted, photo) == answer(export, photo)
    assert open_assistant(adapted).model.config.lora  # the run itself still has adapters


def answer(model: Path, photo: Path) -> str:
    decoding = pipelines.generate.Decoding(8)
    return open_assistant(model).answer([Question.of("What?", photo.read_bytes())], decoding)[0]


def test_every_form_of_a_lora_run_has_the_same_weights(runs: Runs, adapted: Path) -> None:
    ours = load_trained(adapted).model
    merged = {name: weight.make() for name, weight in plain_weights(ours).items()}
    other = replace(ours.config, lora=None, seed=99)
    llava, folder = build_model(other), build_model(other)
    load_llava(runs.export(adapted, "llava", "--files=bin", "--shard_size=20KB"), llava)
    parts = ["projector", "language", "vision"]  # its tower was random, so that it is there
    assert load_llava(runs.export(adapted, "peft"), folder) == parts
    half = read_hf(runs.export(replace_name(adapted), "hf", "--dtype=bfloat16")).state_dict()
    for name, value in merged.items():
        assert torch.equal(value, llava.state_dict()[name]), name
        assert torch.equal(value, folder.state_dict()[name]), name
        assert torch.equal(value.to(torch.bfloat16).float(), half[name]), name


def replace_name(run: Path) -> Path:
    """The same run by another name, so that its export gets a folder of its own."""
    link = run.with_name(f"{run.name}-again")
    link.symlink_to(run)
    return link


def test_peft_computes_a_lora_run_on_its_base(runs: Runs, adapted: Path) -> None:
    library: Any = peft
    folder = runs.folder / "for-peft"
    assert pipelines.export.main([str(adapted), "--to=peft", f"--output={folder}"]) == 0
    settings = library.PeftConfig.from_pretrained(folder)
    assert settings.base_model_name_or_path == str(runs.folder / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(settings.base_model_name_or_path)
    ids = torch.arange(1, 12)[None]
    ours: Any = load_trained(adapted).model
    before = base(ids).logits
    theirs = library.PeftModel.from_pretrained(base, folder).eval()(ids).logits
    torch.testing.assert_close(theirs, ours.language(ids).logits, rtol=1e-5, atol=1e-5)
    assert (theirs - before).abs().max() > 1e-3
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert settings["model_type"] == "llava_llama"


def test_a_lora_run_is_evaluated(runs: Runs, adapted: Path) -> None:
    trained = load_trained(adapted)
    test = open_test(runs.dataset("clip"), "view", trained)
    answers = answer_dataset(trained.model, test)
    assert len(answers) == len(test)


@pytest.mark.parametrize("form", ["llava", "hf", "peft", "projector"])
def test_training_starts_from_weights_of_others(runs: Runs, form: str, tmp_path: Path) -> None:
    """Adapters on top of a whole checkpoint, and a projector alone."""
    lora = LORA if form == "peft" else ""
    first = runs.folder / f"first-{bool(lora)}"
    if not first.exists():
        runs.train(first.name, lora=lora)
    written = tmp_path / "written"
    to = "llava" if form == "projector" else form
    assert pipelines.export.main([str(first), f"--to={to}", f"--output={written}"]) == 0
    start = written / "projector/mm_projector.bin" if form == "projector" else written
    flags = (f"--init_from={start}", "--max_steps=1", "--optim.lr=0.000000001")
    if form != "peft":  # an adapter wants its base
        flags = (*flags, "--model.seed=9")
    second = runs.train(f"second-{form}", lora=LORA, flags=flags)
    found = {n: w.make() for n, w in plain_weights(load_trained(second).model).items()}
    expected = {n: w.make() for n, w in plain_weights(load_trained(first).model).items()}
    for name, value in expected.items():
        if form != "projector" or name.startswith("projector"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_what_cannot_be_a_start_or_an_export_is_one_line(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.folder / "siglip"
    if not run.exists():
        runs.train("siglip", tower="siglip")
    said = one_line(
        pipelines.export.main, [str(run), "--to=llava", f"--output={tmp_path / 'a'}"], capsys
    )
    assert "vision.tower: siglip; LLaVA has CLIP towers only" in said
    assert not (tmp_path / "a").exists()
    export = tmp_path / "hf"
    assert pipelines.export.main([str(run), "--to=hf", f"--output={export}"]) == 0
    with pytest.raises(ModelError, match=r"expected the same model config"):
        runs.train("other", flags=(f"--init_from={export}",))
