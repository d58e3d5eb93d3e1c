"""A trainer's flags to a data recipe and a training recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.cli.command import UsageError
from pipelines.launch_scripts.flag_table import Flag, llava_flags
from pipelines.launch_scripts.shell import Launch

__all__ = ["Recipes", "map_launch"]

PROCESSES = 8  # of LLaVA's own scripts, which use every GPU of one machine
BASES = {f"liuhaotian/llava-v1.5-{size}": f"lmsys/vicuna-{size}-v1.5" for size in ("7b", "13b")}
STAGES = {"zero3_offload": (3, True), "zero3": (3, False), "zero2": (2, False)}
LOGGERS = ("tensorboard", "wandb", "mlflow")


@dataclass
class Recipes:
    """What the flags come to.

    Attributes:
        train: Settings of a run, nested as in a recipe.
        data: Settings of a build.
        output: The run's folder.
        start: A published model whose folder the user has to give as `init_from`.
        rows: Per flag of the script its name, its value, and what becomes of it.
    """

    train: dict[str, Any] = field(default_factory=dict[str, Any])
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    output: str = ""
    start: str = ""
    rows: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])


@dataclass(frozen=True)
class Given:
    """The flags' values, LLaVA's defaults where the script gives none, and where it was started."""

    values: Mapping[str, Any]
    processes: int
    folder: Path

    def __getitem__(self, name: str) -> Any:
        """The value of a flag."""
        return self.values[name]

    def place(self, name: str) -> str:
        """A path of the script as it is from elsewhere; a name of the hub as it is."""
        is_path = name.startswith(("./", "../", "/")) or (self.folder / name).exists()
        return (self.folder / name).absolute().as_posix() if is_path else name


def map_launch(launch: Launch, folder: Path, *, processes: int = 0) -> Recipes:
    """The recipes that train as a script's command does.

    Args:
        launch: The command.
        folder: Where the script is started; a DeepSpeed file is looked for there.
        processes: Processes where the script does not say; 0 takes 8.

    Raises:
        UsageError: An unknown flag, a value of another type, or one that is not supported.
    """
    table = llava_flags().flags
    for name in launch.flags:
        if name not in table:
            raise UsageError(
                f"--{name}: no flag of LLaVA's trainer; remove it, or correct its name"
            )
    values = {
        name: flag.read(launch.flags[name]) if name in launch.flags else flag.default
        for name, flag in table.items()
    }
    given = Given(values, launch.processes or processes or PROCESSES, folder)
    made = Recipes(output=str(values["output_dir"] or ""))
    for name, flag in table.items():
        value = flag.setting(values[name])
        if flag.how or value is None:
            continue
        for recipe, setting in ((made.train, flag.train), (made.data, flag.data)):
            if setting:
                _put(recipe, setting, value)
    for compute in (_model, _optim, _run, _data):
        compute(given, made)
    made.rows = [(name, text, _fate(table[name])) for name, text in launch.flags.items()]
    return made


def _fate(flag: Flag) -> str:
    """What becomes of a flag whose value is supported."""
    if setting := flag.train or flag.data:
        return f"{setting} ({flag.how})" if flag.how else setting
    if flag.implied:
        return f"implied: {flag.implied}"
    return f"not needed: {flag.ignored}" if flag.ignored else "this value changes nothing"


def _put(recipe: dict[str, Any], setting: str, value: Any) -> None:
    *groups, key = setting.split(".")
    for group in groups:
        recipe = recipe.setdefault(group, {})
    recipe[key] = value


def _model(given: Given, made: Recipes) -> None:
    name = given["model_name_or_path"]
    _put(made.train, "model.language.pretrained", given.place(BASES.get(str(name), str(name))))
    _put(made.train, "model.language.allow_pickle", True)
    if given["pretrain_mm_mlp_adapter"]:
        projector = given.folder / given["pretrain_mm_mlp_adapter"]
        made.train["init_from"] = projector.absolute().as_posix()
    if name in BASES:
        made.start = name
    elif "llava" in name.lower():
        raise UsageError(
            f"--model_name_or_path: {name!r} is a LLaVA model and not one of {', '.join(BASES)}; "
            "give its language model here, and the folder with train --init_from"
        )
    if (tower := given["vision_tower"]) is None:
        raise UsageError("--vision_tower: left out, which trains on text alone; expected a tower")
    _put(made.train, "model.vision.tower", "siglip" if "siglip" in tower else "clip")
    _put(made.train, "model.vision.pretrained", given.place(tower))
    _put(made.train, "model.vision.allow_pickle", True)
    alone = given["tune_mm_mlp_adapter"]
    if alone and given["lora_enable"]:
        raise UsageError(
            "--tune_mm_mlp_adapter: True with --lora_enable True trains no adapter; leave one out"
        )
    parts = ["projector"] if alone else ["projector", "language"]
    if given["freeze_mm_mlp_adapter"]:
        parts.remove("projector")
    if not parts:
        raise UsageError("--freeze_mm_mlp_adapter: with nothing else that learns; leave it out")
    _put(made.train, "model.trainable", parts)
    if given["lora_enable"]:
        names = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        lora = {ours: given[theirs] for ours, theirs in names.items()}
        lora |= {"target": r"language\..*", "bias": given["lora_bias"]}
        _put(made.train, "model.lora", lora)
    elif given["bits"] == 4:
        raise UsageError("--bits: 4 without --lora_enable True; 4-bit weights learn by adapters")


def _optim(given: Given, made: Recipes) -> None:
    _put(made.train, "optim.betas", [given["adam_beta1"], given["adam_beta2"]])
    if given["mm_projector_lr"] is not None:
        _put(made.train, "optim.lr_by_part", {"projector": given["mm_projector_lr"]})
    if given["bf16"] and given["fp16"]:
        raise UsageError("--fp16: True with --bf16 True; expected one of them")
    made.train["precision"] = "bf16" if given["bf16"] else "fp16" if given["fp16"] else "fp32"
    _put(made.train, "model.dtype", "bf16" if given["bf16"] else "fp32")


def _run(given: Given, made: Recipes) -> None:
    made.train |= {"max_length": given["model_max_length"], "truncate": True}
    made.train["max_steps"] = max(0, given["max_steps"])
    made.train["num_workers"] = given.processes
    share = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    made.train["global_batch_size"] = share * given.processes
    if given["evaluation_strategy"] not in ("no", "steps"):
        value = given["evaluation_strategy"]
        raise UsageError(f"--evaluation_strategy: {value!r} is not supported; expected no or steps")
    if given["evaluation_strategy"] == "steps":
        every = given["eval_steps"] or 500
        _put(made.train, "validation.every", every)
    asked = given["report_to"].split(",")
    unknown = [one for one in asked if one not in (*LOGGERS, "all", "none")]
    if unknown:
        raise UsageError(
            f"--report_to: {unknown[0]!r} is not supported; expected of {', '.join(LOGGERS)}"
        )
    if loggers := [one for one in LOGGERS if one in asked]:
        made.train["loggers"] = loggers
    stage, offloads = _zero(given)
    made.train["zero_stage"] = stage
    if offloads:
        _put(made.train, "offload.to", "cpu")


def _zero(given: Given) -> tuple[int, bool]:
    """ZeRO stage and offload, of the file or by its name."""
    if not (name := given["deepspeed"]):
        return (2 if given["bf16"] or given["fp16"] else 0), False
    path = given.folder / name
    if not path.is_file():
        if (found := STAGES.get(Path(name).stem)) is None:
            raise UsageError(
                f"--deepspeed: {path} is not there; expected the file, or one called "
                f"{', '.join(STAGES)}.json"
            )
        return found
    try:
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
        offload = zero.get("offload_optimizer", {}).get("device", "none")
        return int(zero.get("stage", 0)), offload != "none"
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"--deepspeed: {path} is no DeepSpeed config ({error})") from None


def _data(given: Given, made: Recipes) -> None:
    for name in ("data_path", "image_folder"):
        if not given[name]:
            raise UsageError(f"--{name}: left out; expected a path")
    if given["mm_use_im_start_end"]:
        if given["version"] not in ("v1", "vicuna_v1"):
            raise UsageError("--mm_use_im_start_end: True is supported with --version v1 alone")
        made.data["template"] = str(
            Path(__file__).parents[1] / "recipes" / "llava15" / "template_im_start_end.yaml"
        )
    aspects = {"pad": "pad", "square": "crop"}
    if (aspect := aspects.get(given["image_aspect_ratio"], "")) == "":
        raise UsageError(
            f"--image_aspect_ratio: {given['image_aspect_ratio']!r} is not supported; expected pad "
            "or square"
        )
    tower = given["vision_tower"]
    size = next((n for n in (336, 384) if str(n) in tower), 224)
    family = made.train["model"]["vision"]["tower"]
    view = f"{family}{size}_{aspect}"
    path = Path(given["data_path"])
    source = {"name": path.name.partition(".")[0], "annotations": path.as_posix()}
    source["images"] = given.place(given["image_folder"])
    made.data["sources"] = [source]
    made.data["tokenizer"] = made.train["model"]["language"]["pretrained"]
    made.data["views"] = {view: {"size": size, "fill": "mean", "tower": family, "aspect": aspect}}
    made.train["view"] = view
