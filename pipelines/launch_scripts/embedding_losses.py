"""VisPer-LM's task tokens and embedding losses, as `model.aux` and a build's `targets`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lapilli.data.io.whole_file import read_whole
from pipelines.cli.command import UsageError

__all__ = ["aux_of_folder", "aux_settings", "target_settings"]

Value = TypeVar("Value")

LETTERS = {"d": "depth", "s": "seg", "g": "gen"}
TARGETS: dict[str, dict[str, Any]] = {
    "depth": {"teacher": "depth_anything_v2", "rows": 576, "width": 1024, "num_gpus": 1},
    "seg": {"teacher": "oneformer", "rows": 576, "width": 1536, "size": 768, "num_gpus": 1},
    "gen": {
        "teacher": "clip_image", "rows": 1, "width": 1024, "size": 224, "aspect": "crop",
        "storage": "bf16", "num_gpus": 1,
    },
}  # fmt: skip
TEACHERS = {"depth": "depth_estimator", "seg": "image_segmentor", "gen": "image_generator"}


def aux_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """`model.aux` of the pre-training's flags.

    Raises:
        UsageError: A mode of other tasks, or layers or weights that are not those of its tasks.
    """
    tasks = values["mode"].split("-")
    if unknown := [task for task in tasks if task not in TEACHERS]:
        raise UsageError(
            f"--mode: {values['mode']!r}: {unknown[0]!r} is no task; expected of "
            f"{', '.join(TEACHERS)}, joined by -"
        )
    layers = _by_task("layer_indices", values, lambda text: [int(n) for n in text.split("-")])
    weights = _by_task("loss_weights", values, float)
    return {
        "mode": values["mode"],
        "num_task_tokens": values["num_task_tokens"],
        "layers": {task: layers[task] for task in tasks},
        "weights": {task: weights[task] for task in tasks},
        "contrastive_weight": values["contrastive_loss_weight"] * values["use_contrastive"],
    }


def _by_task(
    flag: str, values: Mapping[str, Any], read: Callable[[str], Value]
) -> dict[str, Value]:
    """What `d18-20_s10-18_g12-20` or `d0.5_s0.5_g0.5` says of each task."""
    try:
        found = {LETTERS[one[0]]: read(one[1:]) for one in values[flag].split("_")}
        if missing := {*values["mode"].split("-")} - found.keys():
            raise ValueError(f"no {min(missing)}")
    except (KeyError, IndexError, ValueError) as error:
        example = "d18-20_s10-18_g12-20" if flag == "layer_indices" else "d0.5_s0.5_g0.5"
        raise UsageError(
            f"--{flag}: {values[flag]!r} ({error}); expected a letter and numbers for each task of "
            f"--mode {values['mode']}, as {example}"
        ) from None
    return found


def target_settings(mode: str, ours: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`targets` of a data recipe: the tasks' teachers, `ours` by the trainer's flags."""
    return {task: {**TARGETS[task], "pretrained": ours[TEACHERS[task]]} for task in mode.split("-")}


def aux_of_folder(folder: Path) -> dict[str, Any]:
    """The task tokens of a model in a folder, which the later stages keep and predict nothing by.

    Raises:
        UsageError: A `config.json` that cannot be read, or one without their number.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config: Any = json.loads(read_whole(path))
        if not config.get("aux_mode"):
            return {}
        return {
            "mode": str(config["aux_mode"]),
            "num_task_tokens": int(config["num_task_tokens"]),
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"--model_name_or_path: {path} is no VisPer-LM's config ({error})"
        ) from None
