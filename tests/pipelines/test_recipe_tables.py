"""The recipes beside their seeds: values written down from the systems' scripts, and the tables.

Scripts: haotian-liu/LLaVA c121f04 `scripts/v1_5`; amirarsalan90/vlm_training 04bf9b7
`run_train_*.py`; intel-extension-for-transformers `multi_modal/scripts` at d7c179e8 (late);
xinyanghuang7/Basic-Vision-Language-Model 559d07c `train.sh`; zhaoyuzhi/ICM-Assistant c1a48fb
`training_scripts/llava/finetune_task.sh`. Batches are all devices' together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapilli.train.config import RunConfig
from pipelines.cli.command import parse

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
# Of LLaVA's stage 2 and all that copied it.
STAGE_2: dict[str, Any] = {
    "global_batch_size": 128, "micro_batch_size": 16, "epochs": 1, "optim.lr": 2e-5,
    "optim.schedule": "cosine", "optim.warmup_ratio": 0.03, "optim.weight_decay": 0.0,
    "max_length": 2048, "zero_stage": 3, "precision": "bf16", "checkpoint.every": 50000,
    "checkpoint.keep_last": 1, "sampler": "grouped",
}  # fmt: skip
LORA: dict[str, Any] = {
    "optim.lr": 2e-4, "optim.lr_by_part.projector": 2e-5, "model.lora.rank": 128,
    "model.lora.alpha": 256, "model.lora.dropout": 0.05,
}  # fmt: skip
PRETRAIN: dict[str, Any] = {
    **STAGE_2, "global_batch_size": 256, "micro_batch_size": 32, "optim.lr": 1e-3,
    "zero_stage": 2, "checkpoint.every": 24000, "sampler": "random",
}  # fmt: skip
GAUDI: dict[str, Any] = {
    "global_batch_size": 64, "micro_batch_size": 2, "num_workers": 4, "sampler": "random",
    "hpu.optimizer": "FusedAdamW", "hpu.lazy": "--use_lazy_mode", "max_shapes": "--pad_max True",
    "communication.overlap_comm": False,
}  # fmt: skip
GAUDI_STAGE_2: dict[str, Any] = GAUDI | {
    "hpu.environment.PT_HPU_MAX_COMPOUND_OP_SIZE": "10",
    "hpu.environment.DEEPSPEED_HPU_ZERO3_SYNC_MARK_STEP_REQUIRED": "1",
}
SCRIPTS: dict[str, dict[str, Any]] = {
    "llava15/pretrain": PRETRAIN,
    "llava15/finetune": STAGE_2,
    "llava15/finetune_lora": STAGE_2 | LORA,
    "gaudi_llava/pretrain": PRETRAIN | GAUDI | {"communication.allgather_partitions": False},
    "gaudi_llava/finetune": STAGE_2 | GAUDI_STAGE_2,
    "gaudi_llava/finetune_lora": STAGE_2 | LORA | GAUDI_STAGE_2,
    "icm_instruct/csft": STAGE_2 | {"model.language.pretrained": "liuhaotian/llava-v1.5-13b"},
    "icm_instruct/msft": STAGE_2 | {"model.language.pretrained": "liuhaotian/llava-v1.5-13b"},
    "vlm_training/pretrain": {
        "global_batch_size": 128, "micro_batch_size": 8, "optim.lr": 1e-4, "max_steps": 4000,
        "optim.schedule": "linear", "optim.warmup_ratio": 0.0, "precision": "fp32",
        "checkpoint.every": 1000, "checkpoint.keep_last": 4, "validation.every": 1000,
        "validation.samples": 5000,
    },
    "vlm_training/finetune_lora": {
        "global_batch_size": 8, "micro_batch_size": 8, "epochs": 1, "optim.lr": 1.4e-5,
        "optim.schedule": "linear", "optim.warmup_ratio": 0.0, "precision": "fp16",
        "checkpoint.every": 500, "checkpoint.keep_last": "all", "validation.every": 0,
        "model.lora.rank": 64, "model.lora.alpha": 16, "model.lora.dropout": 0.0,
        "model.lora.target": "all-linear", "model.lora.projector": True,
    },
    "basic_vlm/train": {
        "global_batch_size": 4, "micro_batch_size": 4, "epochs": 2, "optim.lr": 3e-5,
        "optim.lr_by_part.projector": 1e-4, "optim.schedule": "linear", "seed": 42,
        "checkpoint.every": 1000, "checkpoint.keep_last": 5, "model.lora.rank": 128,
        "model.lora.alpha": 32, "model.lora.dropout": 0.1, "model.projector_std": 0.01,
        "model.language.pretrained": "Qwen/Qwen-7B-Chat", "model.lora.target": "c_attn|w1|w2",
        "model.vision.norm": True, "model.vision.skip": 1, "model.vision.vision_feature_layer": -1,
        "model.vision.pretrained": "google/siglip-so400m-patch14-384",
    },
}  # fmt: skip
HEAD = "| recipe | setting | seed | script | ours | why |"


def value_of(recipe: str, setting: str) -> Any:
    """A recipe's value as `train` reads it."""
    arguments = [f"--config={RECIPES / recipe}.yaml", "--dataset=in", "--output=out"]
    found: Any = parse(RunConfig, arguments, "")
    for name in setting.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


def rows(folder: str) -> dict[tuple[str, str], dict[str, str]]:
    """A README's table by recipe and setting."""
    text = (RECIPES / folder / "README.md").read_text(encoding="utf-8")
    assert HEAD in text, f"{folder}/README.md: no table {HEAD}"
    lines = text.partition(HEAD)[2].lstrip("\n").partition("\n\n")[0].splitlines()[1:]
    names = [name.strip() for name in HEAD.strip("|").split("|")]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        cells = dict(zip(names, (c.strip() for c in line.strip("|").split("|")), strict=True))
        for recipe in re.findall(r"[\w]+", cells["recipe"]):
            found[f"{folder}/{recipe}", cells["setting"].strip("`")] = cells
    return found


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_a_value_is_the_scripts_or_its_difference_is_in_the_table(recipe: str) -> None:
    table = rows(recipe.partition("/")[0])
    for setting, script in SCRIPTS[recipe].items():
        ours = value_of(recipe, setting)
        if ours == script:
            continue
        row = table.get((recipe, setting))
        assert row is not None, f"{recipe} {setting}: {ours}, the script {script}: say why"
        assert (row["script"], row["ours"]) == (f"{script}", f"{ours}")
        assert row["why"]


@pytest.mark.parametrize("folder", sorted({recipe.partition("/")[0] for recipe in SCRIPTS}))
def test_a_tables_values_are_the_recipes_own(folder: str) -> None:
    found = rows(folder)
    assert found
    for (recipe, setting), row in found.items():
        assert (RECIPES / f"{recipe}.yaml").is_file()
        values = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
        if "model" in values and row["setting"] == f"`{setting}`":  # else it is no setting's name
            assert row["ours"] == f"{value_of(recipe, setting)}", (recipe, setting)
            script = SCRIPTS[recipe].get(setting)
            assert script is None or row["script"] == f"{script}", (recipe, setting)


def test_every_training_recipe_of_a_seed_is_compared() -> None:
    found = {
        path.relative_to(RECIPES).with_suffix("").as_posix()
        for path in RECIPES.glob("*/*.yaml")
        if "model" in yaml.safe_load(path.read_text(encoding="utf-8"))
    }
    # VisPer-LM's are not these systems' trainer, two folders are nobody's, layers have no model
    others = ("tiny/", "own_data/", "visper_lm/")
    assert {name for name in found if not name.startswith(others)} == {*SCRIPTS}
