"""Every training recipe starts: estimate, preflight and a step, with each way to train it.

The models are tiny ones of the families that a recipe names, the rest of a recipe is its own. A
step is taken where a cell differs in what a worker does: families, parts that learn, adapters,
4 bits, ZeRO stage. Recipes that differ in rates, batches or lengths alone share one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipelines.estimate
import pipelines.train
from lapilli.train.config import RunConfig
from lapilli.train.driver import devices
from lapilli.train.driver import preflight as preflight_module
from lapilli.train.driver.fake_model import Sketch
from lapilli.train.driver.memory_estimate import sketch_run
from lapilli.train.driver.preflight import preflight
from pipelines.cli.command import parse
from tests.pipelines.test_train import one_line
from tests.pipelines.tiny_recipes import (
    LANGUAGES,
    TOWERS,
    Material,
    make_material,
    training_recipes,
)

LORA = "--model.lora={target: 'language\\..*', rank: 4, alpha: 8, dropout: 0.05}"
WAYS: dict[str, tuple[str, ...]] = {
    "as written": (),
    "whole": ("--model.lora=null",),
    "lora": (LORA,),
    "qlora": (LORA, "--model.language.quantize=nf4"),
}
STAGES = (2, 3)
# Recipes that together have every pair of families and every set of parts that learn; the two
# marked by a star take a step in every cell.
STEPPED = (
    "llava15/pretrain", "llava15/finetune*", "basic_vlm/train", "gaudi_llava/finetune",
    "vlm_training/finetune_lora*", "tiny/finetune", "llava15/compat",
)  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("recipes"))


def refusal(recipe: str, way: str, stage: int | None) -> str:
    """What a cell that cannot be is told; empty for one that runs."""
    if way in ("lora", "qlora") and recipe in PROJECTOR_ALONE:
        return "lora: neither language nor vision is in trainable"
    if recipe == "gaudi_llava/pretrain" and stage in (0, 3):
        return f"communication.allgather_partitions: False with zero_stage {stage}"
    if way == "qlora" and recipe.startswith(("tiny/", "own_data/tiny")):
        return "language.quantize: nf4 without language.pretrained"
    if way == "qlora" and stage == 3:
        return "zero_stage: 3 with model.language.quantize nf4"
    if way == "lora" and recipe == "tiny/pretrain":
        return "lora.target: 'language\\\\..*' matches no layer"
    return ""


PROJECTOR_ALONE = {
    "llava15/pretrain",
    "gaudi_llava/pretrain",
    "visper_lm/pretrain",
    "visper_lm/pretrain+convnext",
    "visper_lm/pretrain+phi3",
    "vlm_training/pretrain",
}


def flags(way: str, stage: int | None) -> list[str]:
    return [*WAYS[way], *([f"--zero_stage={stage}"] if stage is not None else [])]


def cells(recipes: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """A recipe as it is written, and in every way at every stage."""
    crossed = [(way, stage) for way in WAYS if way != "as written" for stage in STAGES]
    return [(r, way, stage) for r in recipes for way, stage in [("as written", None), *crossed]]


def test_the_models_that_recipes_name_are_of_known_families() -> None:
    for recipe in training_recipes():
        Material(Path(), Path()).arguments(recipe, Path("out"))  # KeyError: add it to the tables
    assert {*TOWERS.values()} == {"clip", "clip_convnext", "dinov2", "siglip"}
    assert {*LANGUAGES.values()} == {"llama", "mistral", "phi", "phi3", "qwen"}


SEEN: set[str] = set()


def is_new(*facts: object) -> bool:
    """Whether nothing of these facts was looked at before."""
    known = repr(facts) in SEEN
    SEEN.add(repr(facts))
    return not known


@pytest.mark.parametrize("recipe", training_recipes())
def test_every_cell_passes_estimate_and_preflight_or_says_why_not(
    recipe: str,
    material: Material,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model once for the estimate, and for preflight at each stage with a micro-batch of 0.

    That follows from a model of fake tensors, whose numbers are those of the real one.
    """
    fake: list[dict[str, tuple[int, int]]] = []

    def sketched(config: RunConfig) -> Sketch:
        made = sketch_run(config)
        fake.append(made.parameters())
        return made

    monkeypatch.setattr(devices, "device_memory", lambda device: 10**10)  # as on a GPU
    monkeypatch.setattr(preflight_module, "sketch_run", sketched)
    for _, way, stage in cells([recipe]):
        output = tmp_path / f"{way} {stage}"
        arguments = material.arguments(recipe, output, *flags(way, stage))
        wanted = refusal(recipe, way, stage)
        if wanted:
            for verb in (pipelines.train, pipelines.estimate):
                assert wanted in one_line(verb.main, arguments, capsys)
        else:
            config = parse(RunConfig, arguments, "")
            if is_new("estimate", config.model):
                assert pipelines.estimate.main(arguments) == 0
                assert "ZeRO-3" in capsys.readouterr().out
            if is_new("preflight", config.model, config.zero_stage, config.precision):
                follows = config.sampler != "llava"  # to which the micro-batches belong
                ready = preflight(replace(config, micro_batch_size=0) if follows else config)
                assert ready.config.micro_batch_size == (4 if follows else 2)
                assert not follows or ready.parameters == fake[-1]
        assert not output.exists()


def stepped() -> list[tuple[str, str, int | None]]:
    """As written, and the starred ones in every cell that is not refused."""
    found: list[tuple[str, str, int | None]] = []
    for name in STEPPED:
        recipe = name.rstrip("*")
        found += [
            (recipe, way, stage)
            for _, way, stage in cells([recipe])
            if not refusal(recipe, way, stage)
            and (way != "as written" if name.endswith("*") else way == "as written")
        ]
    return found


@pytest.mark.parametrize(("recipe", "way", "stage"), stepped())
def test_a_step_is_taken(
    recipe: str, way: str, stage: int | None, material: Material, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = material.arguments(recipe, output, *flags(way, stage))
    assert pipelines.train.main(arguments) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]
    assert 0 < rows[0]["loss"] < 20
    assert rows[0]["grad_norm"] > 0
    facts: dict[str, Any] = json.loads((output / "facts.json").read_text())
    assert facts["attention"]["name"] == "lapilli"
    assert list((output / "checkpoints").glob("step-*/state.json"))


def test_a_whole_model_with_a_convnext_learns_at_zero_3(material: Material, tmp_path: Path) -> None:
    """As VisPer-LM's paper has VPT, with every weight partitioned."""
    whole = ["--model.trainable=[vision, projector, language]", "--zero_stage=3"]
    output = tmp_path / "run"
    words = material.arguments("visper_lm/finetune+phi3+convnext", output, *whole)
    assert pipelines.train.main(words) == 0
    (row,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert 0 < row["loss"] < 20
    assert all(norm > 0 for norm in row["grad_norm_by_part"].values())
    assert {"vision", "projector", "language"} <= {*row["grad_norm_by_part"]}


def test_a_family_without_sdpa_starts_with_eager_and_says_so(
    material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    sizes = '{"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "vocab_size": 512}'
    other_family = ["--model.language.model_type=codegen", f"--model.language.settings={sizes}"]
    arguments = material.arguments("tiny/pretrain", output, *other_family)
    for verb in (pipelines.estimate, pipelines.train):
        assert verb.main(arguments) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "attention: eager; codegen cannot be built with sdpa, only with eager" in said
    assert "fp32, eager attention" in said
    facts: dict[str, Any] = json.loads((output / "facts.json").read_text())
    assert facts["attention"]["name"] == "eager"
    other = [*arguments, f"--output={tmp_path / 'other'}", "--model.language.attention=sdpa"]
    refused = one_line(pipelines.train.main, other, capsys)
    assert "language.attention: 'sdpa' is nothing codegen supports; expected auto" in refused


@pytest.mark.parametrize("main", [pipelines.estimate.main, pipelines.train.main])
def test_settings_that_transformers_asserts_are_one_line(
    main: Callable[[Sequence[str]], int],
    material: Material,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Phi-3's own padding token is 32000."""
    arguments = material.arguments(
        "tiny/pretrain", tmp_path / "run", "--model.language.model_type=phi3"
    )
    said = one_line(main, arguments, capsys)
    assert "language.settings: pad_token_id 32000 is no row of vocab_size 512" in said
    assert not (tmp_path / "run").exists()
