"""LLaVA's flags become settings that exist, and its scripts the recipes that train the same."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lapilli.data.config import BuildConfig
from lapilli.train.config import RunConfig
from pipelines.cli.command import UsageError, parse
from pipelines.import_flags import main
from pipelines.launch_scripts.flag_table import Flag, llava_flags
from pipelines.launch_scripts.mapping import Recipes, map_launch
from pipelines.launch_scripts.shell import Launch, parse_script
from tests.docs.flags_page import PATH, page
from tests.pipelines.llava_scripts import COMMIT, DEFAULTS, REPOSITORY, SCRIPTS, script

FLAGS = llava_flags().flags
VARIABLES = {"MODEL_VERSION": "vicuna-7b-v1.3", "PROMPT_VERSION": "v1"}
BASE = SCRIPTS["v1_5/finetune_lora"] | {"deepspeed": "zero2.json"}


def settings_of(kind: Any, prefix: str = "") -> set[str]:
    hints = get_type_hints(kind)
    found: set[str] = set()
    for one in fields(kind):
        found.add(prefix + one.name)
        for hint in (hints[one.name], *get_args(hints[one.name])):
            if is_dataclass(hint):
                found |= settings_of(hint, f"{prefix}{one.name}.")
    return found


def mapped(flags: dict[str, str], folder: Path = Path("nowhere"), **more: Any) -> Recipes:
    return map_launch(Launch(flags, 0), folder, **more)


def run_config(recipes: Recipes, folder: Path) -> RunConfig:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(recipes.train))
    return parse(RunConfig, [f"--config={path}", "--dataset=d", "--output=r"], "")


def test_the_table_is_of_that_commit_and_whole() -> None:
    table = llava_flags()
    assert (table.repository, table.commit) == (REPOSITORY, COMMIT)
    for group, defaults in DEFAULTS.items():
        found = {flag.name: flag.default for flag in FLAGS.values() if flag.of == group}
        assert found == defaults
    for name, flags in SCRIPTS.items():
        assert flags.keys() <= FLAGS.keys(), name


def test_transformers_defaults_are_transformers_own() -> None:
    """Flags that the installed version still has with the same meaning."""
    from transformers import TrainingArguments

    now = {one.name: one.default for one in fields(TrainingArguments)}
    same = {
        "max_steps", "gradient_accumulation_steps", "per_device_train_batch_size", "save_steps",
        "learning_rate", "weight_decay", "lr_scheduler_type", "adam_beta1", "adam_beta2",
        "adam_epsilon", "max_grad_norm", "seed", "bf16", "fp16",
        "num_train_epochs", "warmup_steps", "dataloader_drop_last",
    }  # fmt: skip
    assert {n: FLAGS[n].default for n in same} == {n: now[n] for n in same}


@pytest.mark.parametrize("flag", FLAGS.values(), ids=lambda flag: flag.name)
def test_a_flag_has_one_fate_and_its_setting_exists(flag: Flag) -> None:
    fates = (flag.train, flag.data, flag.implied, flag.ignored, flag.unsupported)
    assert sum(map(bool, fates)) == 1
    assert not flag.train or flag.train in settings_of(RunConfig)
    assert not flag.data or flag.data in settings_of(BuildConfig)
    flag.setting(flag.default)  # what a script leaves out is supported
    assert bool(flag.accepts) >= bool(flag.unsupported)


OTHER = {
    "version": "plain", "mm_projector_type": "mlp3x_gelu", "mm_vision_select_feature": "cls_patch",
    "vision_tower": "google/siglip-so400m-patch14-384", "image_aspect_ratio": "square",
    "bits": "4", "lora_bias": "all", "evaluation_strategy": "steps", "eval_steps": "7",
    "lr_scheduler_type": "linear", "report_to": "tensorboard", "deepspeed": "zero3_offload.json",
    "fp16": "True", "bf16": "False", "mm_use_im_start_end": "True", "quant_type": "fp4",
}  # fmt: skip


# Without these, another value is no recipe.
CONTEXT: dict[str, dict[str, str]] = {
    "fp16": {"bf16": "False"}, "eval_steps": {"evaluation_strategy": "steps"},
    "freeze_mm_mlp_adapter": {"lora_enable": "False"},
    "tune_mm_mlp_adapter": {"lora_enable": "False"}, "quant_type": {"bits": "4"},
    "double_quant": {"bits": "4"},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.train or flag.data])
def test_another_value_makes_another_recipe(name: str, tmp_path: Path) -> None:
    base = BASE | CONTEXT.get(name, {})
    flag = FLAGS[name]
    before = flag.read(base[name]) if name in base else flag.default
    kind = {"bool": bool, "int": int, "float": float}.get(flag.type, type(flag.default))
    if name in OTHER:
        other = OTHER[name]
    elif kind is bool:
        other = str(not before)
    elif kind in (int, float):
        other = str((before or 0) + 3) if kind is int else str((before or 0.0) / 2 + 0.1)
    else:
        other = "other/name"
    one, two = mapped(base), mapped({**base, name: other})
    assert (one.train, one.data, one.output) != (two.train, two.data, two.output)
    run_config(two, tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_published_script_becomes_recipes_that_parse(name: str, tmp_path: Path) -> None:
    made = mapped(parse_script(script(SCRIPTS[name]), VARIABLES).flags, tmp_path)
    run = run_config(made, tmp_path)
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(made.data))
    build = parse(BuildConfig, [f"--config={path}", "--root=in", "--output=out"], "")
    assert run.view in build.views
    assert len(made.rows) == len(SCRIPTS[name])
    assert run.num_workers == 8
    assert run.global_batch_size == (256 if name == "v1_5/pretrain" else 128)


@pytest.mark.parametrize("name", ["pretrain", "finetune", "finetune_lora"])
def test_it_trains_as_the_recipe_that_was_written_by_hand(name: str, tmp_path: Path) -> None:
    made = run_config(mapped(SCRIPTS[f"v1_5/{name}"], tmp_path), tmp_path)
    recipe = [f"--config=llava15/{name}", "--dataset=d", "--output=r"]
    language = "lmsys/vicuna-13b-v1.5"  # LLaVA's scripts are for 13B
    flags = [f"--model.language.pretrained={language}", "--truncate=true", "--remainder=pad"]
    flags += [f"--init_from={made.init_from}", "--loggers=[wandb]", "--checkpoint.keep_last=1"]
    flags += [f"--checkpoint.every={made.checkpoint.every}", "--max_length=2048"]
    flags += ["--group_by_modality_length=null"]
    assert made == parse(RunConfig, [*recipe, *flags], "")


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("deepspeed train.py", 0), ("deepspeed --num_gpus 4 train.py", 4),
        ("deepspeed --num_gpus=4 --num_nodes 2 train.py", 8),
        ("deepspeed --include localhost:1,2,5 --master_port 2 a/train.py", 3),
        ("torchrun --nproc_per_node=4 --master_port=25642 train.py", 4),
        ("torchrun --nnodes 2 --nproc-per-node 8 train.py", 16),
        ("CUDA_VISIBLE_DEVICES=0,3 torchrun train.py", 2),
        ("export CUDA_VISIBLE_DEVICES=0,3\npython train.py", 2),
        ("GPUS=2\naccelerate launch --num_processes ${GPUS:-4} --num_machines 1 train.py", 2),
        ("accelerate launch --num_processes ${GPUS:-4} train.py", 4),
        ("python -m torch.distributed.launch --nproc_per_node=8 --use_env train.py", 8),
        ("/opt/bin/python -u -m llava.train.train_mem", 0),
    ],
)  # fmt: skip
def test_launchers_and_their_processes(launcher: str, processes: int) -> None:
    found = parse_script(script({"bf16": "True"}, launcher), {})
    assert found == Launch({"bf16": "True"}, processes)


@given(
    st.dictionaries(
        st.sampled_from(sorted(FLAGS)),
        st.text("abcXYZ0129./_:- '#=", min_size=1).filter(lambda text: not text.startswith("-")),
        min_size=1,
    )
)
def test_values_come_back_as_they_were_quoted(flags: dict[str, str]) -> None:
    assert parse_script(script(flags), {}).flags == flags


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo hello\n", "0 commands begin with"),
        ("deepspeed a.py --bf16 True\ndeepspeed b.py --bf16 True\n", "2 commands begin with"),
        ("deepspeed train.py --version $WHICH\n", r"\$WHICH has no value in the script"),
        ("deepspeed train.py --output_dir $(date)\n", "is not executed"),
        ("deepspeed train.py --output_dir 'a\n", "cannot be parsed"),
        ("deepspeed train.py --bf16 True stray\n", "'stray' stands where a flag is expected"),
        ("deepspeed --num_gpus all train.py --bf16\n", "'all' processes; expected a whole number"),
        ("deepspeed --bf16 True\n", "names no file.py"),
        (script({**BASE, "learning_rat": "1"}), "--learning_rat: no flag of LLaVA's trainer"),
        (script({**BASE, "learning_rate": "fast"}), "--learning_rate: 'fast'; expected a number"),
        (script({**BASE, "lora_r": "1.5"}), "--lora_r: '1.5'; expected a whole number"),
        (script({**BASE, "bf16": "maybe"}), "--bf16: 'maybe'; expected True or False"),
        (script({**BASE, "bits": "3"}), "--bits: 3 is not supported; expected one of 16, 8, 4"),
        (script({**BASE, "quant_type": "int4"}), "'int4' is not supported; expected one of nf4"),
        (script({**BASE, "lora_enable": "False", "bits": "8"}), "8 without --lora_enable"),
        (
            script({**BASE, "mm_use_im_start_end": "True", "model_name_or_path": "mosaicml/mpt"}),
            "'mosaicml/mpt', whose vocabulary is not known",
        ),
        (script({**BASE, "version": "v0_mmtag"}), "--version: 'v0_mmtag' is not supported"),
        (script({**BASE, "image_aspect_ratio": "anyres"}), "'anyres' is not supported"),
        (script({**BASE, "mm_patch_merge_type": "spatial"}), "several crops an image"),
        (script({**BASE, "optim": "lion"}), "always so here: AdamW"),
        (script({**BASE, "fsdp": "full_shard"}), "FSDP; zero_stage 3 shards the same"),
        (script({**BASE, "deepspeed": "my.json"}), "my.json is not there"),
        (script({**BASE, "lora_enable": "False", "bits": "4"}), "4 without --lora_enable"),
        (script({**BASE, "report_to": "comet_ml"}), "'comet_ml' is not supported"),
        (script({**BASE, "tune_mm_mlp_adapter": "True"}), "True trains no adapter"),
        (script({**BASE, "freeze_backbone": "True"}), "below a head that learns"),
        (script({**BASE, "fp16": "True"}), "--fp16: True with --bf16 True"),
        (script({**BASE, "model_name_or_path": "my/llava"}), "'my/llava' is a LLaVA model"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_no_recipe(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "train.sh"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as found:
        main([str(path), f"--output={tmp_path / 'out'}", f"--folder={tmp_path}"])
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"bits": "16"}, ("none", True)), ({"bits": "8"}, ("int8", True)),
        ({"bits": "4"}, ("nf4", True)), ({"bits": "4", "quant_type": "fp4"}, ("fp4", True)),
        ({"bits": "4", "double_quant": "False"}, ("nf4", False)),
        ({"bits": "8", "quant_type": "fp4", "double_quant": "False"}, ("int8", True)),
    ],
)  # fmt: skip
def test_bits(flags: dict[str, str], expected: tuple[str, bool], tmp_path: Path) -> None:
    language = run_config(mapped(BASE | flags, tmp_path), tmp_path).model.language
    assert (language.quantize, language.double_quant) == expected


def test_an_images_start_and_end_learn_in_the_first_stage(tmp_path: Path) -> None:
    tokens = {"mm_use_im_start_end": "True"}
    stage_1 = SCRIPTS["v1_5/pretrain"] | tokens | {"version": "v1"}
    language = run_config(mapped(stage_1, tmp_path), tmp_path).model.language
    assert (language.vocab_size, language.train_added_rows) == (32002, True)
    for name in ("finetune", "finetune_lora"):
        made = mapped(SCRIPTS[f"v1_5/{name}"] | tokens, tmp_path)
        language = run_config(made, tmp_path).model.language
        assert (language.vocab_size, language.train_added_rows) == (32002, False)


def test_a_script_is_imported_with_its_deepspeed_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}'
    )
    path = tmp_path / "train.sh"
    path.write_text(script({**BASE, "deepspeed": "mine.json"}))
    output = tmp_path / "recipes"
    command = [str(path), f"--output={output}", f"--folder={tmp_path}", "--num_workers=2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"lapilli train --config {output}/train.yaml" in said
    assert said.count("  implied: ") == 1  # lazy_preprocess
    words = [f"--config={output / 'train.yaml'}", "--dataset=d", "--output=r"]
    run = parse(RunConfig, words, "")
    assert (run.zero_stage, run.offload.to, run.num_workers) == (3, "cpu", 2)
    assert run.init_from == str(tmp_path / BASE["pretrain_mm_mlp_adapter"])
    with pytest.raises(UsageError, match=r"data.yaml exists; remove it"):
        main(command)


def test_the_page_is_made_of_the_table() -> None:
    assert PATH.read_text(encoding="utf-8") == page(), "python -m tests.docs.flags_page"
