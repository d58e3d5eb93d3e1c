"""Settings of LLaMA-Factory and ms-swift become recipes, or one line that names what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lapilli.data.config import BuildConfig
from lapilli.train.config import RunConfig
from pipelines.check import main as check
from pipelines.cli.command import UsageError, parse
from pipelines.import_flags import main
from pipelines.launch_scripts.flag_table import flag_table
from tests.factories import image_bytes
from tests.pipelines.framework_settings import DEFAULTS, EXAMPLES, FACTORY, SWIFT
from tests.pipelines.llava_scripts import script

LLAVA = "llava-hf/llava-1.5-7b-hf"
SHAREGPT = {"messages": "messages", "images": "images"}
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
INFO = {
    "mllm_demo": {
        "file_name": "mllm_demo.json", "formatting": "sharegpt", "columns": SHAREGPT, "tags": ROLES
    },
    "chats": {"file_name": "chats.json", "formatting": "sharegpt"},
    "alpaca": {"file_name": "alpaca.json"},
    "far": {"hf_hub_url": "a/b", "formatting": "sharegpt"},
    "odd": {"file_name": "odd.json", "formatting": ["x"], "tags": 3},
    "number": 3,
}  # fmt: skip


def settings(name: str, **more: Any) -> dict[str, Any]:
    """An example's, of LLaVA and data that are here; None takes one out."""
    example = EXAMPLES[name]
    if example.trainer == "llama_factory":
        here = {
            "model_name_or_path": LLAVA, "template": "llava", "dataset": "mllm_demo",
            "max_samples": None,
        }  # fmt: skip
    else:
        here = {"model": LLAVA, "dataset": "data/train.jsonl"}
    found: dict[str, Any] = example.settings | here | more
    return {key: value for key, value in found.items() if value is not None}


def write_files(root: Path) -> None:
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "dataset_info.json").write_text(json.dumps(INFO))


def recipes(given: dict[str, Any], root: Path, *flags: str) -> tuple[RunConfig, BuildConfig]:
    """The recipes of a file of settings, as `train` and `preprocess` read them."""
    write_files(root)
    path = root / "settings.yaml"
    path.write_text(yaml.safe_dump(given))
    return imported(path, *flags)


def imported(path: Path, *flags: str) -> tuple[RunConfig, BuildConfig]:
    output = path.parent / "recipes"
    assert main([str(path), f"--output={output}", f"--folder={path.parent}", *flags]) == 0
    run = parse(RunConfig, [f"--config={output}/train.yaml", "--dataset=d", "--output=r"], "")
    return run, parse(BuildConfig, [f"--config={output}/data.yaml", "--root=i", "--output=o"], "")


@pytest.mark.parametrize("trainer", DEFAULTS)
def test_the_tables_are_of_those_commits(trainer: str) -> None:
    table = flag_table(trainer)
    assert (table.repository, table.commit) == {"llama_factory": FACTORY, "ms_swift": SWIFT}[
        trainer
    ]
    names = {flag.same_as or name: name for name, flag in table.flags.items()}
    assert {name: table.flags[names.get(name, name)].default for name in DEFAULTS[trainer]} == (
        DEFAULTS[trainer]
    )
    for name, example in EXAMPLES.items():
        if example.trainer == trainer:
            assert example.settings.keys() <= table.flags.keys(), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_published_example_says_what_has_no_counterpart(name: str, tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(EXAMPLES[name].settings))
    what = "max_samples: 1000" if name == "llava_lora" else "model(_name_or_path)?: 'Qwen/"
    with pytest.raises(UsageError, match=f"--{what}.* is not supported") as found:
        main([str(path), f"--output={tmp_path / 'out'}", f"--folder={tmp_path}"])
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_llama_factorys_llava(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, build = recipes(
        settings("llava_lora", max_samples=1000), tmp_path, "--leave_out=[max_samples]"
    )
    lora = run.model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.target) == (8, 16, 0.0, r"language\..*")
    assert run.model.trainable == ("language",)
    assert (run.micro_batch_size, run.global_batch_size, run.num_workers) == (1, 8, 1)
    assert (run.optim.lr, run.optim.schedule, run.optim.warmup_ratio) == (1e-4, "cosine", 0.1)
    assert (run.epochs, run.max_length, run.truncates, run.precision) == (3, 2048, True, "bf16")
    assert run.model.language.pretrained == build.tokenizer == "lmsys/vicuna-7b-v1.5"
    assert run.model.vision.vision_feature_layer == -2
    assert run.validation.every == 0
    assert (build.template, run.view) == ("v1", "clip336_crop")
    (source,) = build.sources
    assert (source.annotations, source.images) == ("data/mllm_demo.json", "data")
    assert source.format == "messages"
    said = capsys.readouterr().out
    assert f"hf download {LLAVA} --local-dir llava-1.5-7b-hf" in said
    assert "--init_from llava-1.5-7b-hf" in said
    assert "--max_samples 1000" in said
    assert "left out: not supported (the first records" in said


def test_llama_factorys_whole_model(tmp_path: Path) -> None:
    given = settings(
        "qwen3vl_full", val_size="0.1", eval_strategy="steps", eval_steps="50",
        freeze_multi_modal_projector="false", dataset="mllm_demo, chats", media_dir="media",
        neat_packing="true", enable_liger_kernel="true", report_to="wandb",
    )  # fmt: skip
    run, build = recipes(given, tmp_path, "--num_workers=4")
    assert (run.model.lora, run.model.trainable) == (None, ("projector", "language"))
    assert (run.zero_stage, run.num_workers, run.global_batch_size) == (3, 4, 8)
    assert (run.pack, run.sampler, run.loggers) == (True, "grouped", ("wandb",))
    assert run.model.kernels == "liger"
    assert (build.mixture.held_out, run.validation.every) == (0.1, 50)
    assert [one.format for one in build.sources] == ["messages", "llava"]
    assert {one.images for one in build.sources} == {"media"}


@pytest.mark.parametrize(
    ("more", "trainable", "target"),
    [
        ({}, ("language",), r"language\..*"),
        ({"lora_target": "q_proj,v_proj"}, ("language",), r"language\..*\.(q_proj|v_proj)"),
        ({"freeze_vision_tower": "false"}, ("vision", "language"), "all-linear"),
        (
            {"freeze_vision_tower": "false", "lora_target": "q_proj", "lora_alpha": "5"},
            ("vision", "language"), "q_proj",
        ),
    ],
)  # fmt: skip
def test_layers_with_adapters(
    more: dict[str, str], trainable: tuple[str, ...], target: str, tmp_path: Path
) -> None:
    run, _ = recipes(settings("llava_lora", **more), tmp_path)
    assert run.model.lora is not None
    assert (run.model.trainable, run.model.lora.target) == (trainable, target)
    assert run.model.lora.alpha == int(more.get("lora_alpha", 16))


def test_bits(tmp_path: Path) -> None:
    more = {"quantization_bit": "4", "quantization_type": "fp4", "double_quantization": "false"}
    language = recipes(settings("llava_lora", **more), tmp_path)[0].model.language
    assert (language.quantize, language.double_quant) == ("fp4", False)
    (tmp_path / "second").mkdir()
    language = recipes(settings("caption", quant_bits="8"), tmp_path / "second")[0].model.language
    assert language.quantize == "int8"


def test_ms_swifts_command(tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / "caption.sh"
    path.write_text(script(settings("caption"), f"{EXAMPLES['caption'].environment} swift sft"))
    run, build = imported(path)
    lora = run.model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.target) == (8, 32, 0.05, r"language\..*")
    assert (run.model.trainable, lora.projector) == (("language",), False)
    assert (run.global_batch_size, run.num_workers, run.precision) == (16, 1, "bf16")
    assert (run.max_length, run.truncates, run.checkpoint.every) == (2048, False, 100)
    assert (run.optim.weight_decay, run.optim.betas, run.optim.schedule) == (
        0.1, (0.9, 0.95), "cosine"
    )  # fmt: skip
    assert (build.mixture.held_out, run.validation.every) == (0.01, 100)
    assert run.loggers == ("tensorboard",)
    (source,) = build.sources
    assert (source.name, source.annotations, source.format) == (
        "train", "data/train.jsonl", "messages"
    )  # fmt: skip


def test_ms_swifts_towers_learn_at_their_own_rates(tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / "sft.sh"
    example = EXAMPLES["lora_llm_full_vit"]
    path.write_text(script(settings("lora_llm_full_vit"), f"{example.environment} swift sft"))
    run, _ = imported(path)
    assert run.model.trainable == ("vision", "projector", "language")
    assert run.model.lora is not None
    assert (run.model.lora.target, run.model.lora.dropout) == (r"language\..*", 0.0)
    assert run.optim.lr_by_part == {"vision": 1e-5, "projector": 1e-5}
    assert (run.num_workers, run.global_batch_size, run.zero_stage) == (4, 16, 2)


def test_ms_swifts_whole_model_and_what_is_left_out(tmp_path: Path) -> None:
    less = dict.fromkeys(("learning_rate", "gradient_accumulation_steps", "max_length"))
    more = {"torch_dtype": None, "truncation_strategy": "right", "deepspeed": "zero3_offload"}
    run, _ = recipes(settings("vit_gradient_checkpointing", **less, **more), tmp_path)
    assert (run.model.lora, run.model.trainable) == (None, ("vision", "projector", "language"))
    assert (run.optim.lr, run.global_batch_size, run.max_length) == (1e-5, 16, 4096)
    assert (run.precision, run.truncates, run.model.kernels) == ("fp16", True, "liger")
    assert (run.zero_stage, run.offload.to, run.optim.schedule) == (3, "cpu", "cosine")


def test_a_command_with_a_file_and_several_values(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings("caption", report_to=["wandb"])))
    path = tmp_path / "run.sh"
    path.write_text(
        "NPROC_PER_NODE=2 NNODES=2 swift sft sft.yaml --target_modules q_proj v_proj \\\n"
        "  --freeze_vit false --freeze_aligner false --dataset a.jsonl b.json --lora_rank=4\n"
    )
    run, build = imported(path)
    lora = run.model.lora
    assert lora is not None
    assert (lora.rank, lora.target, lora.projector) == (4, "q_proj|v_proj", True)
    assert (run.num_workers, run.global_batch_size, run.loggers) == (4, 64, ("wandb",))
    assert [one.name for one in build.sources] == ["a", "b"]


def test_what_its_template_writes_otherwise_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Template `llava` of its data/template.py at ff6d4d12: no prefix, `USER: {{content}} ...`."""
    recipes(settings("llava_lora"), tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "--template llava template; differs: it writes no <s> in front, no newline" in said


def test_llama_factorys_command(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "llava.yaml").write_text(yaml.safe_dump(settings("llava_lora")))
    path = tmp_path / "run.sh"
    path.write_text(
        "export CUDA_VISIBLE_DEVICES=0,1\nllamafactory-cli train llava.yaml learning_rate=5e-5\n"
    )
    run, _ = imported(path)
    assert (run.num_workers, run.optim.lr, run.global_batch_size) == (2, 5e-5, 16)


def test_their_data_is_read_as_the_recipe_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    (tmp_path / "data" / "1.jpg").write_bytes(image_bytes("jpeg"))
    spoken = [("<image>Who?", "A cat."), ("Where?", "Here.")]
    by_role = [
        {"role": role, "content": text}
        for pair in spoken
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    by_speaker = [
        {"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]}
        for one in by_role
    ]
    for name, key, turns in (
        ("mllm_demo", "messages", by_role), ("chats", "conversations", by_speaker)
    ):  # fmt: skip
        record = {key: turns, "images": ["1.jpg"]}
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([record] * 2))
    recipes(settings("llava_lora", dataset="mllm_demo,chats"), tmp_path)
    config = f"--config={tmp_path / 'recipes' / 'data.yaml'}"
    assert check([config, f"--root={tmp_path}", f"--output={tmp_path / 'checked'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 records" in said


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("llava_lora", {"learning_rate": "fast"}, "--learning_rate: 'fast'; expected a number"),
        ("llava_lora", {"num_train_epochs": 0.5}, "--num_train_epochs: '0.5'; expected a whole"),
        ("llava_lora", {"lora_rnk": 8}, "--lora_rnk: no flag of LLaMA-Factory"),
        ("llava_lora", {"stage": "dpo"}, "--stage: 'dpo' is not supported"),
        ("llava_lora", {"template": "qwen2_vl"}, "--template: 'qwen2_vl' is not supported"),
        ("llava_lora", {"quantization_bit": 3}, "--quantization_bit: 3 is not supported"),
        ("llava_lora", {"finetuning_type": "full", "quantization_bit": 4}, "learn by adapters"),
        ("llava_lora", {"freeze_language_model": True}, "nothing that learns by adapters"),
        ("llava_lora", {"dataset": "none"}, "--dataset: 'none' is not in dataset_info.json"),
        ("llava_lora", {"dataset": "alpaca"}, "'alpaca' is in alpaca form"),
        ("llava_lora", {"dataset": "odd"}, "'odd' is in .* form"),
        ("llava_lora", {"dataset": "number"}, "'number' is not in dataset_info.json"),
        ("llava_lora", {"dataset": "far"}, "'far' has no file_name"),
        ("llava_lora", {"dataset_dir": "else"}, "--dataset_dir: .*else.* cannot be read"),
        ("llava_lora", {"deepspeed": {"stage": 3}}, "deepspeed: .*; expected a value"),
        ("llava_lora", {"deepspeed": "mine.json"}, "mine.json is not there"),
        ("caption", {"tuner_type": "adalora"}, "--tuner_type: 'adalora' is not supported"),
        ("caption", {"truncation_strategy": "left"}, "'left' is not supported"),
        ("caption", {"dataset": "modelscope/coco"}, "'modelscope/coco' is no .json or .jsonl file"),
        ("caption", {"dataset": "a.jsonl#500"}, "a sample of 500 is not drawn"),
        ("caption", {"dataset": None}, "--dataset: left out"),
        ("caption", {"model": None}, "--model: None is not supported"),
        ("caption", {"eval_strategy": "epoch"}, "'epoch' is not supported"),
        ("caption", {"freeze_vit": False, "vit_lr": 1e-5}, "--vit_lr: 1e-05 with adapters"),
        ("caption", {"freeze_llm": True}, "nothing that learns by adapters"),
        (
            "caption",
            {"per_device_train_batch_size": 0, "gradient_accumulation_steps": None},
            "--per_device_train_batch_size: 0; expected at least 1",
        ),
        ("caption", {"system": "Be kind."}, "--system: 'Be kind.' is not supported"),
    ],
)
def test_a_wrong_value_is_one_line_and_no_recipe(
    name: str, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as found:
        recipes(settings(name, **more), tmp_path)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "recipes").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n", "settings of neither LLaMA-Factory nor ms-swift"),
        ("swift pt --model x\n", "swift pt: not supported; expected swift sft"),
        ("llamafactory-cli chat a.yaml\n", "expected llamafactory-cli train"),
        ("swift sft none.yaml\n", "none.yaml: cannot be read"),
        ("swift sft words.yaml\n", "words.yaml: no settings"),
        ("NPROC_PER_NODE=all swift sft --model x\n", "'all' processes or machines"),
        ("{a: [b: {c: d}\n", "0 commands begin with"),
    ],
)
def test_a_file_that_is_neither_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("only words\n")
    path = tmp_path / "given"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as found:
        main([str(path), f"--output={tmp_path / 'out'}", f"--folder={tmp_path}"])
    assert "\n" not in str(found.value)
