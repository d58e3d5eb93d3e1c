"""What LLaMA-Factory's and ms-swift's settings come to in LLaVA's flags."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapilli.data.io.whole_file import read_whole
from pipelines.cli.command import UsageError
from pipelines.launch_scripts.shell import LIST

__all__ = ["in_llavas_flags"]

PARTS = {
    "vision": ("freeze_vision_tower", "freeze_vit"),
    "projector": ("freeze_multi_modal_projector", "freeze_aligner"),
    "language": ("freeze_language_model", "freeze_llm"),
}
FORMS = {
    ("sharegpt", "from"): "llava",
    ("sharegpt", "role"): "messages",
    ("openai", "role"): "messages",
}


def in_llavas_flags(values: Mapping[str, Any], folder: Path, processes: int) -> dict[str, Any]:
    """What a framework's values are to LLaVA's trainer; empty for values of another trainer.

    Args:
        values: By its own names, and by LLaVA's where a flag is the same.
        folder: Where it is started.
        processes: All that it starts.

    Raises:
        UsageError: Nothing that learns, or data that is not read.
    """
    if "finetuning_type" in values:
        return _llama_factory(values, folder)
    return _ms_swift(values, folder, processes) if "tuner_type" in values else {}


def _llama_factory(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    adapted = values["finetuning_type"] == "lora"
    parts = _parts(values, 0)
    if adapted and "projector" in parts:
        parts.remove("projector")  # its adapters are never on the projector
    names = [] if values["lora_target"] == "all" else values["lora_target"].split(",")
    return {
        **_tuning(parts, names, adapted=adapted),
        "lora_alpha": values["lora_alpha"] or 2 * values["lora_r"],
        "bits": values["quantization_bit"] or 16,
        "evaluation_strategy": values["evaluation_strategy"] if values["val_size"] else "no",
        "sources": _listed_sources(values, folder),
    }


def _ms_swift(values: Mapping[str, Any], folder: Path, processes: int) -> dict[str, Any]:
    kind = values["train_type"] or values["tuner_type"]
    # lora_llm gives the language model adapters, and trains the others whole, frozen or not
    parts = [*PARTS] if kind == "lora_llm" else _parts(values, 1)
    adapted = kind != "full"
    chosen = values["target_modules"]
    names = [] if chosen == "all-linear" else re.split(r"[\s,]+", chosen)
    made = _tuning(parts, names, adapted=adapted)
    if kind == "lora_llm":
        made |= {"target_modules": r"language\..*", "lora_dropout": 0.0, "lora_bias": "none"}
    elif adapted:
        made["lora_projector"] = "projector" in parts
    dtype = values["torch_dtype"]
    precision = {name: values[name] for name in ("bf16", "fp16")}
    if precision["bf16"] is None and precision["fp16"] is None:
        precision = {"bf16": dtype == "bfloat16", "fp16": dtype != "bfloat16"}
    share = values["per_device_train_batch_size"] * processes
    if share < 1:
        raise UsageError(f"--per_device_train_batch_size: {share}; expected at least 1")
    steps = values["gradient_accumulation_steps"] or max(1, math.ceil(16 / share))
    return {
        **made,
        **{name: bool(value) for name, value in precision.items()},
        "model_name_or_path": values["model"],
        "gradient_accumulation_steps": steps,
        "learning_rate": values["learning_rate"] or (1e-4 if adapted else 1e-5),
        "mm_vision_lr": _rate(values, "vit_lr", "vision" in parts, kind),
        "mm_projector_lr": _rate(
            {"aligner_lr": values["mm_projector_lr"]}, "aligner_lr", "projector" in parts, kind
        ),
        "bits": values["quant_bits"] or 16,
        "evaluation_strategy": values["evaluation_strategy"]
        if values["split_dataset_ratio"]
        else "no",
        "eval_steps": values["eval_steps"] or values["save_steps"],
        "report_to": values["report_to"].replace(LIST, ","),
        "sources": _named_sources(values["dataset"], folder),
    }


def _rate(values: Mapping[str, Any], flag: str, learns: bool, kind: str) -> float | None:
    """A part's own rate; None for one that is frozen."""
    if learns and kind == "lora" and values[flag] is not None:
        raise UsageError(
            f"--{flag}: {values[flag]} with adapters on several parts, which have one rate; leave "
            "it out, or set optim.lr_by_part.adapters"
        )
    return values[flag] if learns else None


def _parts(values: Mapping[str, Any], framework: int) -> list[str]:
    """The parts that are not frozen."""
    return [part for part, names in PARTS.items() if not values[names[framework]]]


def _tuning(parts: Sequence[str], names: Sequence[str], *, adapted: bool) -> dict[str, Any]:
    """The parts that learn, and the layers that have adapters: `names`, or all for none."""
    if not parts or (adapted and not {"vision", "language"} & {*parts}):
        raise UsageError(
            f"{' '.join(name for pair in PARTS.values() for name in pair)}: those that are set "
            "leave nothing that learns" + " by adapters" * adapted + "; set one of them false"
        )
    chosen = "|".join(re.escape(name.strip()) for name in names)
    if "vision" in parts:
        target = chosen or "all-linear"
    else:
        target = rf"language\..*\.({chosen})" if chosen else r"language\..*"
    return {"lora_enable": adapted, "parts": [*parts], "target_modules": target}


def _listed_sources(values: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Sources of LLaMA-Factory's `dataset_info.json`."""
    where = values["dataset_dir"]
    path = folder / where / "dataset_info.json"
    try:
        listed: Any = json.loads(read_whole(path))
        known: dict[str, Any] = dict(listed)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"--dataset_dir: {path} cannot be read ({error}); expected LLaMA-Factory's list of "
            "data sets below --folder"
        ) from None
    names = [name.strip() for name in re.split(rf"[,{LIST}]", values["dataset"] or "")]
    images = values["media_dir"] or where
    return [_listed(name, known.get(name), where, images) for name in names]


def _listed(name: str, row: Any, where: str, images: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"--dataset: {name!r} is not in dataset_info.json; expected a name there")
    found: dict[str, Any] = row
    if "file_name" not in found:
        raise UsageError(
            f"--dataset: {name!r} has no file_name in dataset_info.json; download it, and name its "
            "file there"
        )
    tags, form = found.get("tags"), str(found.get("formatting", "alpaca"))
    usual = "role" if form == "openai" else "from"
    role = str(tags.get("role_tag", usual) if isinstance(tags, dict) else usual)
    if (form, role) not in FORMS:
        raise UsageError(
            f"--dataset: {name!r} is in {form} form with speakers under {role!r}; expected "
            "sharegpt or openai, with from or role"
        )
    return {
        "name": name,
        "annotations": f"{where}/{found['file_name']}",
        "images": images,
        "format": FORMS[form, role],
    }


def _named_sources(names: str | None, folder: Path) -> list[dict[str, Any]]:
    """Sources of ms-swift's `dataset`."""
    if not names:
        raise UsageError("--dataset: left out; expected files in the messages form")
    return [_named(name, folder) for name in names.split(LIST)]


def _named(name: str, folder: Path) -> dict[str, Any]:
    path, sample = Path(name.partition("#")[0]), name.partition("#")[2]
    if path.suffix not in (".json", ".jsonl") and not (folder / path).is_file():
        raise UsageError(
            f"--dataset: {name!r} is no .json or .jsonl file; download it, and name its file"
        )
    if sample:
        raise UsageError(
            f"--dataset: {name!r}: a sample of {sample} is not drawn; leave it out for all "
            "records, or set mixture.counts"
        )
    return {
        "name": path.name.partition(".")[0],
        "annotations": path.as_posix(),
        "format": "messages",
    }
