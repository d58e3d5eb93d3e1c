"""From each seed's own folder tree to an answer: the verbs' commands, with tiny models.

The folders are as the systems' READMEs lay them out, the recipes the systems' own; the models are
tiny ones of the same families, and images small. VisPer-LM's way is that without its predictors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import pipelines.generate
import pipelines.preprocess
import pipelines.train
from lapilli.data.config import BuildConfig
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.settings import read_run_config
from pipelines.cli.command import parse
from tests.pipelines.test_seed_recipes import (
    RECIPES,
    allava_merged,
    basic_vlm,
    captions558k,
    icm,
    mix665k,
)
from tests.pipelines.tiny_recipes import SHAPES, SIDE, Material, make_material
from tests.pipelines.tiny_recipes import TINY_SIDE as CONVNEXT_SIDE

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    # phi-1.5's own tokenizer writes the marker as text too, and its users are told
    pytest.mark.filterwarnings("ignore:template phi_hf. its end marker:UserWarning"),
]
QUESTION = "What colour is the cat?"
# Of Llama 3, of Qwen as its system uses it, and of Phi-3.
MARKERS = ("<|eot_id|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


@dataclass(frozen=True)
class Stage:
    """One training and the data before it.

    Attributes:
        data: Recipe of the dataset.
        root: Folder below the system's own, which its README names.
        write: Writes what lies in there.
        train: Recipe of the training.
        image: An image of it, for the question at the end.
    """

    data: str
    root: str
    write: Callable[[Path], None]
    train: str
    image: str


CAPTIONS, COCO = "images/00001/1.jpg", "coco/train2017/1.jpg"
WAYS: dict[str, tuple[Stage, ...]] = {
    "vlm_training": (
        Stage("pretrain_data", "data/projector_training", captions558k, "pretrain", CAPTIONS),
        Stage(
            "finetune_data", "data/instruction_finetuning", mix665k("text_vqa"), "finetune_lora",
            COCO,
        ),
    ),
    "visper_lm": (
        Stage("pretrain_data", "datasets/LLaVA-Pretrain", captions558k, "pretrain", CAPTIONS),
        Stage("finetune_data", "datasets", mix665k("text_vqa"), "finetune", COCO),
    ),
    # Phi-3 and CLIP-ConvNeXt, by PT, VPT and IFT
    "visper_lm ": (
        Stage(
            "pretrain_data+phi3_data+convnext_pretrain_data", "datasets/LLaVA-Pretrain",
            captions558k, "pretrain+phi3+convnext", CAPTIONS,
        ),
        Stage(
            "vpt_merged_data+phi3_data+convnext_data", "datasets/allava", allava_merged,
            "vpt+phi3+convnext", "allava_laion/images/100277305.jpeg",
        ),
        Stage(
            "finetune_data+phi3_data+convnext_data", "datasets", mix665k("text_vqa"),
            "finetune+phi3+convnext", COCO,
        ),
    ),
    "gaudi_llava": (
        Stage(
            "pretrain_data", "pretraining_data/LLaVA-Pretrain", captions558k, "pretrain", CAPTIONS
        ),
        Stage("finetune_data", "finetuning_data", mix665k("textvqa"), "finetune", COCO),
    ),
    "basic_vlm": (Stage("data", "data", basic_vlm, "train", "train2017/1.jpg"),),
    "icm_instruct": (
        Stage("csft_data", "playground/data", icm, "csft", "sexy_check_all/1.jpg"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("models"))


def with_markers(material: Material, folder: Path) -> Path:
    """The tiny tokenizer with the end markers of the systems' templates."""
    tokenizer: Any = AutoTokenizer.from_pretrained(material.models.parent / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKERS]})
    tokenizer.save_pretrained(folder)
    return folder


def build(system: str, stage: Stage, folder: Path, material: Material) -> Path:
    """`preprocess`, with the tiny tokenizer and images of the tiny tower's size."""
    root, output = folder / stage.root, folder / "datasets" / stage.data
    stage.write(root)
    side = CONVNEXT_SIDE if "convnext" in stage.data else SIDE
    recipes = [f"--config={RECIPES / system / name}.yaml" for name in stage.data.split("+")]
    flags = [*recipes, f"--root={root}", f"--output={output}"]
    flags.append(f"--tokenizer={with_markers(material, folder / 'tokenizer')}")
    config = parse(BuildConfig, flags, "")
    (view,) = config.views
    flags += [f"--views.{view}.size={side}", "--num_workers=1"]
    if config.mixture.held_out:  # 5,000 are more than there are here
        flags.append("--mixture.held_out=1")
    if config.targets:  # a teacher of a few lines, whose targets are the tiny model's
        tiny = {"teacher": "tests.teaching:blocks", "size": side, "num_gpus": 0}
        made = {task: tiny | {"rows": r, "width": w} for task, (r, w) in SHAPES.items()}
        flags.append(f"--targets={json.dumps(made)}")
    assert pipelines.preprocess.main(flags) == 0
    return output


@pytest.mark.parametrize("system", WAYS)
def test_a_seeds_folder_tree_becomes_an_answer(
    system: str, tmp_path: Path, material: Material, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Path | None = None
    ways, system = WAYS[system], system.strip()
    for stage in ways:
        dataset = build(system, stage, tmp_path, material)
        start = [f"--init_from={run}"] if run else []
        run = tmp_path / "runs" / stage.train
        made = Material(dataset, material.models)
        flags = ["--max_length=512", "--global_batch_size=1", "--micro_batch_size=1", *start]
        assert pipelines.train.main(made.arguments(f"{system}/{stage.train}", run, *flags)) == 0
        assert [row.step for row in read_metrics(run)] == [0]
    assert run is not None
    last = ways[-1]
    assert read_run_config(run).dataset == str(tmp_path / "datasets" / last.data)
    capsys.readouterr()
    image = tmp_path / last.root / last.image
    asked = [str(run), f"--image={image}", f"--question={QUESTION}", "--device=cpu"]
    asked.append("--allow_pickle")  # CLIP-L is on the hub as a .bin only: the recipes allow it
    assert pipelines.generate.main([*asked, "--decoding.max_new_tokens=8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].strip()
