"""Scripts of the other systems become the recipes that were written by hand for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapilli.data.config import BuildConfig
from lapilli.train.config import RunConfig
from pipelines.cli.command import UsageError, parse
from pipelines.cli.views import filled_views
from pipelines.import_flags import main
from pipelines.launch_scripts.flag_table import TRAINERS, flag_table, llava_flags
from pipelines.launch_scripts.mapping import Recipes, find_table, map_launch
from pipelines.launch_scripts.shell import Launch, parse_script
from tests.pipelines.llava_scripts import SCRIPTS, script
from tests.pipelines.published_scripts import SYSTEMS, VISPER_PT
from tests.pipelines.test_import_flags import run_config, settings_of

LLAMA = "--model.language.pretrained=meta-llama/Meta-Llama-3-8B-Instruct"
PICKLE = "--model.language.allow_pickle=true"
# Of the example's DeepSpeed files, which are not beside the script.
OVERLAP = "--communication.overlap_comm=null"
GATHER = "--communication.allgather_partitions=null"
# What a script says and the recipe, of which its README's table gives the reason, does not.
DIFFERENT: dict[str, list[str]] = {
    "visper_lm/pretrain": [],
    "visper_lm/finetune": [LLAMA],
    "visper_lm/vpt": [LLAMA],
    "gaudi_llava/pretrain": ["--memory=auto", "--max_shapes=16", OVERLAP, GATHER],
    "gaudi_llava/finetune": ["--memory=auto", OVERLAP],
    "gaudi_llava/finetune_lora": ["--memory=auto", OVERLAP],
    "icm_instruct/csft": [],
    "basic_vlm/train": ["--view=siglip384_stretch"],
}


def imported(name: str, folder: Path, **more: Any) -> Recipes:
    published = SYSTEMS[name]
    start = folder / published.flags.get("model_name_or_path", "")
    if published.trainer == "visper_lm":  # the stage before has left its tokens there
        start.mkdir(parents=True)
        (start / "config.json").write_text('{"aux_mode": "gen-depth-seg", "num_task_tokens": 8}')
    launch = parse_script(script(published.flags, published.launcher), {})
    assert find_table(launch) is flag_table(published.trainer)
    return map_launch(launch, folder, **more)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_flag_is_told_and_the_recipes_parse(name: str, tmp_path: Path) -> None:
    made = imported(name, tmp_path)
    assert {row[0] for row in made.rows} >= SYSTEMS[name].flags.keys()
    assert all(fate for _, _, fate in made.rows)
    run = run_config(made, tmp_path)
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(made.data))
    build = parse(BuildConfig, [f"--config={path}", "--root=in", "--output=out"], "")
    assert run.view in build.views
    assert run.num_workers == {"gaudi_llava": 4, "basic_vlm": 1}.get(name.partition("/")[0], 8)


@pytest.mark.parametrize("name", DIFFERENT)
def test_it_trains_as_the_recipe_that_was_written_by_hand(name: str, tmp_path: Path) -> None:
    made = run_config(imported(name, tmp_path), tmp_path)
    flags = [*DIFFERENT[name], "--truncate=true", "--remainder=pad", PICKLE]
    flags.append(f"--init_from={made.init_from}")
    flags += [f"--model.vision.allow_pickle={str(made.model.vision.allow_pickle).lower()}"]
    flags += [f"--device={made.device}", f"--loggers=[{','.join(made.loggers)}]"]
    if not name.startswith("basic_vlm"):  # the only one that its code fixes
        flags.append(f"--model.language.pretrained={made.model.language.pretrained}")
    recipe = [f"--config={name}", "--dataset=d", "--output=r"]
    assert made == parse(RunConfig, [*recipe, *flags], "")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("visper_lm/pretrain", "pretrain_data"), ("visper_lm/finetune", "finetune_data"),
        ("gaudi_llava/pretrain", "pretrain_data"), ("gaudi_llava/finetune", "finetune_data"),
        ("icm_instruct/csft", "csft_data"), ("basic_vlm/train", "prepared_data"),
    ],
)  # fmt: skip
def test_texts_and_pixels_are_those_of_the_recipe(name: str, recipe: str, tmp_path: Path) -> None:
    made = imported(name, tmp_path)
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(made.data))
    folder = name.partition("/")[0]
    ours, by_hand = (
        parse(BuildConfig, [f"--config={config}", "--root=in", "--output=out"], "")
        for config in (path, f"{folder}/{recipe}")
    )
    assert ours.template == by_hand.template
    assert [*filled_views(ours.views).values()] == [*filled_views(by_hand.views).values()]
    assert ours.sources[0].format == by_hand.sources[0].format
    assert ours.targets == by_hand.targets
    if name == "basic_vlm/train":
        assert ours.tokenizer == by_hand.tokenizer


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_flag_has_one_fate_and_its_setting_exists(trainer: str) -> None:
    for flag in flag_table(trainer).flags.values():
        fates = (
            flag.train, flag.data, flag.implied, flag.ignored, flag.unsupported, flag.same_as
        )  # fmt: skip
        assert sum(map(bool, fates)) == 1, flag.name
        assert not flag.same_as or flag.same_as in llava_flags().flags, flag.name
        assert not flag.train or flag.train in settings_of(RunConfig), flag.name
        assert not flag.data or flag.data in settings_of(BuildConfig), flag.name
        assert not flag.accepts or flag.default in flag.accepts, flag.name


def test_llavas_own_scripts_are_llavas() -> None:
    for flags in SCRIPTS.values():
        assert find_table(Launch(flags, 0, "deepspeed llava/train/train_mem.py")) is llava_flags()


def test_what_is_not_supported_is_named_and_may_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "finetune.sh"
    flags = SYSTEMS["visper_lm/finetune"].flags | {"attn_mask_type": "full"}
    path.write_text(script(flags, SYSTEMS["visper_lm/finetune"].launcher))
    command = [str(path), f"--output={tmp_path / 'out'}"]
    with pytest.raises(UsageError, match=r"--attn_mask_type: 'full' is not supported \(another"):
        main(command)
    with pytest.raises(UsageError, match="leave_out: 'bits'; expected of "):
        main([*command, "--leave_out=[bits]"])
    assert main([*command, "--leave_out=[attn_mask_type]"]) == 0
    assert "left out: not supported (another mask" in capsys.readouterr().out


def test_embedding_losses_follow_their_flags(tmp_path: Path) -> None:
    program = "ola_vlm/train/ola_vlm_train_mem.py"
    flags = VISPER_PT | {
        "mode": "seg-depth", "layer_indices": "d18_s10-12-14", "loss_weights": "d0.25_s1_g3",
        "use_contrastive": "False", "freeze_task_token": "True", "num_task_tokens": "4",
        "image_segmentor": "mine/oneformer",
    }  # fmt: skip
    made = map_launch(Launch(flags, 8, program), tmp_path)
    aux = run_config(made, tmp_path).model.aux
    assert (aux.mode, aux.num_task_tokens, aux.contrastive_weight) == ("seg-depth", 4, 0.0)
    assert aux.layers == {"seg": (10, 12, 14), "depth": (18,)}
    assert aux.weights == {"seg": 1.0, "depth": 0.25}
    assert made.train["model"]["trainable"] == ["projector", "predictors"]
    assert [*made.data["targets"]] == ["seg", "depth"]
    assert made.data["targets"]["seg"]["pretrained"] == "mine/oneformer"


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("mode", "gen-sketch", "--mode: 'gen-sketch': 'sketch' is no task; expected of depth"),
        ("layer_indices", "d18_s10", "--layer_indices: 'd18_s10' \\(no gen\\); expected a letter"),
        ("layer_indices", "d1-x_s1_g1", "--layer_indices: .* as d18-20_s10-18_g12-20"),
        ("loss_weights", "q0.5", "--loss_weights: 'q0.5' .* as d0.5_s0.5_g0.5"),
        ("seg_head_dim_head", "64", "--seg_head_dim_head: 64 is not supported"),
        ("depth_estimator", "mine.pth", "--depth_estimator: 'mine.pth' is not supported"),
    ],
)
def test_an_embedding_loss_that_is_not_theirs_is_one_line(
    flag: str, value: str, words: str, tmp_path: Path
) -> None:
    launch = Launch(VISPER_PT | {flag: value}, 8, "ola_vlm/train/ola_vlm_train_mem.py")
    with pytest.raises(UsageError, match=words) as found:
        map_launch(launch, tmp_path)
    assert "\n" not in str(found.value)


def test_a_folder_that_is_no_visper_lm_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text('{"aux_mode": "gen"}')
    flags = SYSTEMS["visper_lm/finetune"].flags | {"model_name_or_path": "start"}
    with pytest.raises(UsageError, match="is no VisPer-LM's config"):
        map_launch(Launch(flags, 8, "ola_vlm/train/train_mem.py"), tmp_path)


def test_what_trains_follows_the_towers_flags(tmp_path: Path) -> None:
    flags = SYSTEMS["visper_lm/finetune"].flags
    for extra, parts in (
        ({"unfreeze_mm_vision_tower": "True"}, ["vision", "projector"]),
        ({"unfreeze_whole_model": "True"}, ["vision", "projector", "language"]),
    ):
        launch = Launch({**flags, **extra, "mm_vision_lr": "2e-6"}, 8, "ola_vlm/train/x.py")
        made = map_launch(launch, tmp_path)
        assert made.train["model"]["trainable"] == parts
        assert made.train["optim"]["lr_by_part"] == {"vision": 2e-6}


def test_a_convnext_is_the_one_of_the_recipes(tmp_path: Path) -> None:
    tower = "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-res768"
    flags = VISPER_PT | {"vision_tower": tower, "image_aspect_ratio": "pad"}
    made = map_launch(Launch(flags, 8, "ola_vlm/train/ola_vlm_train_mem.py"), tmp_path)
    recipe = ["--config=visper_lm/pretrain", "--config=visper_lm/convnext"]
    words = [*recipe, "--dataset=d", "--output=r", "--model.vision.allow_pickle=true"]
    by_hand = parse(RunConfig, words, "")
    assert run_config(made, tmp_path).model.vision == by_hand.model.vision
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(made.data))
    data = ["--config=visper_lm/finetune_data", "--config=visper_lm/convnext_data"]
    ours, layered = (
        parse(BuildConfig, [*recipes, "--root=in", "--output=out"], "")
        for recipes in ([f"--config={path}"], data)
    )
    assert [*filled_views(ours.views).values()] == [*filled_views(layered.views).values()]


@pytest.mark.parametrize(
    ("tower", "words"),
    [
        ("laion/CLIP-convnext_base-res768", "expected one of CLIP-convnext_large, CLIP-conv"),
        ("laion/CLIP-convnext_xxlarge-res768-interp144", "rows of several stages or resized"),
    ],
)
def test_another_convnext_is_one_line(tower: str, words: str, tmp_path: Path) -> None:
    launch = Launch(VISPER_PT | {"vision_tower": tower}, 8, "ola_vlm/train/ola_vlm_train_mem.py")
    with pytest.raises(UsageError, match=words):
        map_launch(launch, tmp_path)
    with pytest.raises(UsageError, match="expected a ViT"):
        map_launch(Launch(SCRIPTS["v1_5/finetune"] | {"vision_tower": tower}, 8), tmp_path)


ZERO = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}


def test_a_deepspeed_file_decides_schedule_offload_and_sizes(tmp_path: Path) -> None:
    zero = {**ZERO, "overlap_comm": False, "reduce_bucket_size": 5e8}
    config = {
        "zero_optimization": zero, "scheduler": {"type": "WarmupDecayLR"},
        "bf16": {"enabled": True}, "gradient_accumulation_steps": 1, "train_batch_size": "auto",
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(config))
    made = map_launch(Launch(SCRIPTS["v1_5/finetune"] | {"deepspeed": "ds.json"}, 8), tmp_path)
    run = run_config(made, tmp_path)
    assert (run.zero_stage, run.offload.to, run.offload.nvme_path) == (3, "nvme", "/local")
    assert (run.optim.schedule, run.communication.reduce_bucket_size) == ("linear", 500_000_000)
    assert run.communication.overlap_comm is False


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4 with --gradient_acc"),
        ({"bf16": {"enabled": False}}, "bf16.enabled False with --bf16 True"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer 'Lamb' is not supported"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler 'OneCycle' is not supported"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"compression_training": {}}, "section 'compression_training' is not supported"),
        ([1], "is no DeepSpeed config"),
        ({"zero_optimization": 3}, "is no DeepSpeed config"),
    ],
)
def test_a_deepspeed_file_that_trains_otherwise_is_one_line(
    config: object, words: str, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(config))
    launch = Launch(SCRIPTS["v1_5/finetune"] | {"deepspeed": "ds.json"}, 8)
    with pytest.raises(UsageError, match=words) as found:
        map_launch(launch, tmp_path)
    assert "\n" not in str(found.value)


def test_accelerates_file_and_flags_are_read(tmp_path: Path) -> None:
    (tmp_path / "acc.yaml").write_text(
        "num_processes: 6\ndeepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}\n"
    )
    flags = {n: v for n, v in SCRIPTS["v1_5/finetune"].items() if n != "deepspeed"}
    text = script(flags, "accelerate launch --config_file acc.yaml --num_machines 2 train.py")
    made = map_launch(parse_script(text, {}), tmp_path).train
    assert (made["num_workers"], made["zero_stage"], made["offload"]) == (6, 3, {"to": "cpu"})
    text = script(flags, "accelerate launch --use_deepspeed --zero_stage 2 --gpu_ids 0,1 t.py")
    made = map_launch(parse_script(text, {}), tmp_path).train
    assert (made["num_workers"], made["zero_stage"]) == (2, 2)
    (tmp_path / "acc.yaml").write_text("distributed_type: FSDP\n")
    with pytest.raises(UsageError, match="FSDP is not supported"):
        map_launch(
            parse_script(script(flags, "accelerate launch --config_file acc.yaml t.py"), {}),
            tmp_path,
        )


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("deepspeed --include a:0,1@b:2 train.py", 3),
        ("deepspeed --include a:0,1@b:2,3 --num_nodes 2 train.py", 4),
        ("HABANA_VISIBLE_MODULES=0,1,2,3 python train.py", 4),
        ("python3 gaudi_spawn.py --world_size 4 --use_mpi train.py", 4),
    ],
)
def test_device_lists(launcher: str, processes: int) -> None:
    assert parse_script(script({"bf16": "True"}, launcher), {}).processes == processes
    with pytest.raises(UsageError, match="how many devices are left is not known"):
        parse_script(script({"bf16": "True"}, "deepspeed --exclude localhost:3 train.py"), {})


def test_a_llava_folder_is_model_and_start(tmp_path: Path) -> None:
    (tmp_path / "my-llava").mkdir()
    flags = SCRIPTS["v1_5/finetune_task"] | {"model_name_or_path": "my-llava"}
    made = map_launch(Launch(flags, 8), tmp_path)
    assert made.train["model"]["language"]["pretrained"] == str(tmp_path / "my-llava")
    assert made.data["tokenizer"] == str(tmp_path / "my-llava")


def test_an_unknown_trainer_is_one_line() -> None:
    with pytest.raises(UsageError, match="trainer: 'mine'; expected auto or one of llava, "):
        find_table(Launch({}, 0), "mine")
