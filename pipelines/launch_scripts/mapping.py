"""A trainer's flags to a data recipe and a training recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.cli.command import UsageError
from pipelines.launch_scripts.deepspeed_file import (
    ZeroSettings,
    launcher_settings,
    read_deepspeed,
)
from pipelines.launch_scripts.embedding_losses import (
    aux_of_folder,
    aux_settings,
    target_settings,
)
from pipelines.launch_scripts.flag_table import TRAINERS, Flag, FlagTable, flag_table, llava_flags
from pipelines.launch_scripts.frameworks import in_llavas_flags
from pipelines.launch_scripts.shell import LIST, Launch

__all__ = ["Recipes", "find_table", "map_launch"]

PROCESSES = 8  # of LLaVA's own scripts, which use every GPU of one machine
BASES = {f"liuhaotian/llava-v1.5-{size}": f"lmsys/vicuna-{size}-v1.5" for size in ("7b", "13b")}
CONVNEXTS = {  # the weights of a tower, by the start of VisPer-LM's name for it
    "CLIP-convnext_large": "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    "CLIP-convnext_xxlarge": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
}
FRAMEWORKS = ("llama_factory", "ms_swift")
ROWS = 32002  # of a Llama's or Vicuna's vocabulary with an image's start and end
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
    """The flags' values, the trainer's defaults where the script gives none, and the launcher's.

    Attributes:
        values: By LLaVA's names, and by the trainer's own where LLaVA has no such flag.
        ours: The same, as they are called here.
        processes: All that the launcher starts.
        launcher: The launcher's flags.
        environment: Variables that the script sets.
        folder: Where the script was started.
    """

    values: Mapping[str, Any]
    ours: Mapping[str, Any]
    processes: int
    launcher: Mapping[str, str]
    environment: Mapping[str, str]
    folder: Path

    def __getitem__(self, name: str) -> Any:
        """The value of a flag."""
        return self.values[name]

    def place(self, name: str) -> str:
        """A path of the script as it is from elsewhere; a name of the hub as it is."""
        is_path = name.startswith(("./", "../", "/")) or (self.folder / name).exists()
        return (self.folder / name).absolute().as_posix() if is_path else name


def find_table(launch: Launch, trainer: str = "auto") -> FlagTable:
    """The table of a command's trainer, by its file and its flags.

    Raises:
        UsageError: No such trainer.
    """
    if trainer not in ("auto", *TRAINERS):
        raise UsageError(f"trainer: {trainer!r}; expected auto or one of {', '.join(TRAINERS)}")
    if trainer != "auto":
        return flag_table(trainer)
    for name in reversed(TRAINERS):
        table = flag_table(name)
        if any(mark in launch.program or mark in launch.flags for mark in table.recognised_by):
            return table
    return llava_flags()


def map_launch(
    launch: Launch,
    folder: Path,
    *,
    processes: int = 0,
    trainer: str = "auto",
    leave_out: Collection[str] = (),
) -> Recipes:
    """The recipes that train as a script's command does.

    Args:
        launch: The command.
        folder: Where the script is started; a DeepSpeed file is looked for there.
        processes: Processes where the script does not say; 0 takes 8, and 1 of a framework's
            settings.
        trainer: A name of `TRAINERS`; `auto` finds it.
        leave_out: Flags that are not supported and may be left out of the recipe.

    Raises:
        UsageError: An unknown flag, a value of another type, or one that is not supported.
    """
    table = find_table(launch, trainer)
    _check_names(launch, table, leave_out)
    flags = {**llava_flags().flags, **table.flags}
    values: dict[str, Any] = {}
    for name, flag in flags.items():
        text = launch.flags.get(name) if not flag.is_fixed else None
        values[flag.same_as or name] = flag.default if text is None else flag.read(text)
    launcher = launcher_settings(launch.launcher, folder)
    usual = 1 if table in map(flag_table, FRAMEWORKS) else PROCESSES
    count = launch.processes or int(launcher.get("num_processes", 0)) or processes or usual
    for name, flag in table.flags.items():  # before what they come to, which names no flag
        if not flag.same_as and name not in leave_out:
            flag.setting(values[name])
    values |= in_llavas_flags(values, folder, count)
    ours = {
        name: flag.setting(values[name])
        for name, flag in flags.items()
        if not flag.same_as and not (name in leave_out and flag.unsupported)
    }
    given = Given(
        values=values, ours=ours, processes=count, launcher=launcher,
        environment=launch.environment, folder=folder,
    )  # fmt: skip
    made = Recipes(output=str(values["output_dir"] or ""))
    for name, value in ours.items():
        flag = flags[name]
        if flag.how or value is None:
            continue
        for recipe, setting in ((made.train, flag.train), (made.data, flag.data)):
            if setting:
                _put(recipe, setting, value)
    for compute in (_model, _optim, _run, _data):
        compute(given, made)
    fixed = {name: str(flag.default) for name, flag in table.flags.items() if flag.is_fixed}
    for name, text in {**launch.flags, **fixed}.items():
        text = text.replace(LIST, " ")
        made.rows.append((name, text, _fate(flags[name], flags, left_out=name in leave_out)))
    return made


def _check_names(launch: Launch, table: FlagTable, leave_out: Collection[str]) -> None:
    for name in launch.flags:
        if name not in table.flags or table.flags[name].is_fixed:
            raise UsageError(f"--{name}: no flag of {table.title}; remove it, or correct its name")
    refused = {name for name, flag in table.flags.items() if flag.unsupported}
    for name in leave_out:
        if name not in refused:
            raise UsageError(
                f"leave_out: {name!r}; expected of {', '.join(sorted(refused))}, the flags of "
                f"{table.title} that are not supported"
            )


def _fate(flag: Flag, flags: Mapping[str, Flag], *, left_out: bool) -> str:
    """What becomes of a flag."""
    if left_out:
        return f"left out: not supported ({flag.unsupported})"
    if flag.same_as:
        return _fate(flags[flag.same_as], flags, left_out=False)
    if setting := flag.train or flag.data:
        text = f"{setting} ({flag.how})" if flag.how else setting
        return f"{text}; differs: {flag.differs}" if flag.differs else text
    if flag.implied:
        return f"implied: {flag.implied}"
    return f"not needed: {flag.ignored}" if flag.ignored else "this value changes nothing"


def _put(recipe: dict[str, Any], setting: str, value: Any) -> None:
    *groups, key = setting.split(".")
    for group in groups:
        recipe = recipe.setdefault(group, {})
    recipe[key] = value


def _model(given: Given, made: Recipes) -> None:
    asked, name = given["model_name_or_path"], given.ours["model_name_or_path"]
    if "parts" in given.values:  # a framework's model is transformers' LLaVA
        name = given.ours.get("model", name)
        made.start = f"llava-hf/{asked.rpartition('/')[2]}"
    language = given.place(BASES.get(str(name), str(name)))
    _put(made.train, "model.language.pretrained", language)
    _put(made.train, "model.language.allow_pickle", True)
    if given["pretrain_mm_mlp_adapter"]:
        projector = given.folder / given["pretrain_mm_mlp_adapter"]
        made.train["init_from"] = projector.absolute().as_posix()
    if name in BASES:
        made.start = name
    elif "llava" in name.lower() and not Path(language).is_dir():
        raise UsageError(
            f"--model_name_or_path: {name!r} is a LLaVA model, no folder here and not one of "
            f"{', '.join(BASES)}; give its folder, or its language model here and the folder with "
            "train --init_from"
        )
    if (tower := given["vision_tower"]) is None:
        raise UsageError("--vision_tower: left out, which trains on text alone; expected a tower")
    if "convnext" in tower.lower():
        _put_convnext(given, made, tower)
    else:
        _put(made.train, "model.vision.tower", "siglip" if "siglip" in tower else "clip")
        _put(made.train, "model.vision.pretrained", given.place(tower))
    _put(made.train, "model.vision.allow_pickle", True)
    parts = _parts(given)
    _put(made.train, "model.trainable", parts)
    _put_quantize(given, made, learns_whole="language" in parts and not given["lora_enable"])
    if aux := aux_settings(given.values) if "mode" in given.values else _aux_before(given):
        _put(made.train, "model.aux", aux)
    if given["lora_enable"]:
        names = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        lora = {ours: given[theirs] for ours, theirs in names.items()}
        layers = str(given.values.get("target_modules", ""))
        lora |= {"target": layers or r"language\..*", "bias": given["lora_bias"]}
        if given.values.get("lora_projector"):
            lora["projector"] = True
        _put(made.train, "model.lora", lora)
    if given["mm_use_im_start_end"]:
        _put_added_rows(given, made, learn="language" not in parts)


def _put_convnext(given: Given, made: Recipes, tower: str) -> None:
    """A ConvNeXt by VisPer-LM's name for it, which ends with the side of its images.

    Source: `extract_res_interp` of its `clip_convnext_encoder.py` (commit 4f4a87d).
    """
    if "freeze_task_token" not in given.values:
        raise UsageError(f"--vision_tower: {tower!r} is not supported; expected a ViT")
    name = tower.rpartition("/")[2]
    known = next((weights for start, weights in CONVNEXTS.items() if name.startswith(start)), None)
    if known is None:
        raise UsageError(f"--vision_tower: {tower!r}; expected one of {', '.join(CONVNEXTS)}")
    if "multi-stage" in name or "-interp" in name:
        raise UsageError(
            f"--vision_tower: {tower!r} is not supported (rows of several stages or resized ones)"
        )
    side = re.search(r"-res(\d+)", name)
    _put(made.train, "model.vision.tower", "clip_convnext")
    _put(made.train, "model.vision.pretrained", known)
    _put(made.train, "model.vision.image_size", int(side[1]) if side else 768)
    _put(made.train, "model.vision.vision_feature_layer", -1)


def _aux_before(given: Given) -> dict[str, Any]:
    """The task tokens of the model that is trained on; none by a trainer that has none."""
    has_tokens = "freeze_task_token" in given.values
    return aux_of_folder(given.folder / given["model_name_or_path"]) if has_tokens else {}


def _put_quantize(given: Given, made: Recipes, *, learns_whole: bool) -> None:
    bits = given["bits"]
    if bits != 16 and learns_whole:
        raise UsageError(
            f"--bits: {bits} without --lora_enable True; quantised weights learn by adapters"
        )
    kind = given.ours["quant_type"] if bits == 4 else given.ours["bits"]
    _put(made.train, "model.language.quantize", kind)
    if bits == 4:
        _put(made.train, "model.language.double_quant", given["double_quant"])


def _put_added_rows(given: Given, made: Recipes, *, learn: bool) -> None:
    """Rows for an image's start and end, which LLaVA adds to the tokenizer."""
    name = str(given["model_name_or_path"])
    if not any(family in name.lower() for family in ("vicuna", "llama-2", "llava-v1.5")):
        raise UsageError(
            f"--mm_use_im_start_end: True with --model_name_or_path {name!r}, whose vocabulary is "
            "not known here; supported with Vicuna and Llama 2"
        )
    _put(made.train, "model.language.vocab_size", ROWS)
    if learn:
        _put(made.train, "model.language.train_added_rows", True)


def _parts(given: Given) -> list[str]:
    """The parts that learn."""
    if parts := given.values.get("parts"):
        return parts
    alone = given["tune_mm_mlp_adapter"]
    if alone and given["lora_enable"]:
        raise UsageError(
            "--tune_mm_mlp_adapter: True with --lora_enable True trains no adapter; leave one out"
        )
    parts = ["projector"] if alone else ["projector", "language"]
    if "mode" in given.values:
        tokens = [] if given["freeze_task_token"] else ["task_tokens"]
        parts += [*tokens, "predictors"]
    if given.values.get("unfreeze_mm_vision_tower"):
        parts = ["vision", "projector"]
    if given.values.get("unfreeze_whole_model"):
        return ["vision", "projector", "language"]
    if given["freeze_mm_mlp_adapter"]:
        parts.remove("projector")
    if not parts:
        raise UsageError("--freeze_mm_mlp_adapter: with nothing else that learns; leave it out")
    return parts


def _optim(given: Given, made: Recipes) -> None:
    _put(made.train, "optim.lr", given["learning_rate"])
    _put(made.train, "optim.betas", [given["adam_beta1"], given["adam_beta2"]])
    rates = {
        part: given.values.get(name)
        for part, name in (("projector", "mm_projector_lr"), ("vision", "mm_vision_lr"))
    }
    if given_rates := {part: rate for part, rate in rates.items() if rate is not None}:
        _put(made.train, "optim.lr_by_part", given_rates)
    if given["bf16"] and given["fp16"]:
        raise UsageError("--fp16: True with --bf16 True; expected one of them")
    made.train["precision"] = "bf16" if given["bf16"] else "fp16" if given["fp16"] else "fp32"
    _put(made.train, "model.dtype", "bf16" if given["bf16"] else "fp32")


def _run(given: Given, made: Recipes) -> None:
    made.train["max_length"] = given["model_max_length"]
    made.train.setdefault("truncate", True)
    if given.values.get("neat_packing") or given.values.get("packing"):
        remainder = "drop" if given["dataloader_drop_last"] else "short"
        made.train |= {"pack": True, "sampler": "grouped", "remainder": remainder}
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
    if given.values.get("pad_max"):
        made.train["max_shapes"] = 1
    if given.values.get("use_habana"):
        made.train |= {"device": "hpu", "hpu": {"optimizer": "FusedAdamW"}}
        own = {name: text for name, text in given.environment.items() if "HPU_" in name}
        if own:
            _put(made.train, "hpu.environment", own)
    _put_zero(_zero(given), made)


def _put_zero(zero: ZeroSettings, made: Recipes) -> None:
    made.train["zero_stage"] = zero.stage
    if zero.offload != "none":
        _put(made.train, "offload.to", zero.offload)
    if zero.nvme_path:
        _put(made.train, "offload.nvme_path", zero.nvme_path)
    if zero.communication:
        made.train["communication"] = zero.communication
    if zero.schedule:
        _put(made.train, "optim.schedule", zero.schedule)
        why = f"optim.schedule: {zero.schedule}, which wins over --lr_scheduler_type"
        made.rows.append(("deepspeed", "(its scheduler)", why))


def _zero(given: Given) -> ZeroSettings:
    """ZeRO's settings of `--deepspeed`, else of the launcher."""
    launcher = given.launcher
    if name := given["deepspeed"] or launcher.get("deepspeed_config_file", ""):
        return read_deepspeed(given.folder / name, given.values)
    if stage := launcher.get("zero_stage", ""):
        if not stage.isdecimal():
            raise UsageError(f"--zero_stage: {stage!r}; expected 0 to 3")
        offload = launcher.get("offload_optimizer_device", "none")
        return ZeroSettings(stage=int(stage), offload=offload)
    return ZeroSettings(stage=2 if given["bf16"] or given["fp16"] else 0)


def _data(given: Given, made: Recipes) -> None:
    made.data["sources"] = given.values.get("sources") or [_source(given)]
    if given["mm_use_im_start_end"]:
        if given["version"] not in ("v1", "vicuna_v1"):
            raise UsageError("--mm_use_im_start_end: True is supported with --version v1 alone")
        made.data["template"] = str(
            Path(__file__).parents[1] / "recipes" / "llava15" / "template_im_start_end.yaml"
        )
    aspect = given.ours["image_aspect_ratio"]
    tower = given["vision_tower"]
    vision = made.train["model"]["vision"]
    size = vision.get("image_size") or next((n for n in (336, 384) if str(n) in tower), 224)
    family = "clip" if vision["tower"] == "clip_convnext" else vision["tower"]  # of one mean
    view = f"{family}{size}_{aspect}"
    made.data["tokenizer"] = made.train["model"]["language"]["pretrained"]
    made.data["views"] = {view: {"size": size, "fill": "mean", "tower": family, "aspect": aspect}}
    made.train["view"] = view
    if "mode" in given.values:
        made.data["targets"] = target_settings(given["mode"], given.ours)


def _source(given: Given) -> dict[str, Any]:
    """The one source of a data recipe."""
    if pair := [given.values[n] for n in ("image_map", "captions_file") if n in given.values]:
        files = [given.place(name) for name in pair]
        return {
            "name": "basic_vlm", "format": "basic_vlm", "annotations": files, "captions": "one"
        }  # fmt: skip
    for name in ("data_path", "image_folder"):
        if not given[name]:
            raise UsageError(f"--{name}: left out; expected a path")
    path = Path(given["data_path"])
    return {
        "name": path.name.partition(".")[0],
        "annotations": path.as_posix(),
        "images": given.place(given["image_folder"]),
    }
