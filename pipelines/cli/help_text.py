"""The short help of a verb, made from its settings without loading what the verb runs."""

from __future__ import annotations

import importlib
import re
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

__all__ = ["SETTINGS", "short_help"]

# The settings of each verb that reads recipes and flags: module and class.
SETTINGS = {
    "quickstart": ("pipelines.cli.settings", "QuickstartConfig"),
    "tokenizer": ("pipelines.tokenizer", "TokenizerConfig"),
    "preprocess": ("lapilli.data.config", "BuildConfig"),
    "estimate": ("lapilli.train.config", "RunConfig"),
    "train": ("lapilli.train.config", "RunConfig"),
    "evaluate": ("pipelines.cli.settings", "EvaluateConfig"),
    "probe": ("pipelines.cli.settings", "ProbeConfig"),
    "score": ("pipelines.cli.settings", "ScoreConfig"),
    "generate": ("pipelines.cli.settings", "GenerateConfig"),
    "serve": ("pipelines.cli.settings", "ServeConfig"),
    "chat": ("pipelines.cli.settings", "ServeConfig"),
    "reproduce": ("pipelines.reproduce", "ReproduceConfig"),
    "import-flags": ("pipelines.import_flags", "ImportConfig"),
    "export": ("pipelines.exports.config", "ExportConfig"),
}
WIDTH = 100
ATTRIBUTE = re.compile(r"^ {8}(\w+): (.+\n?(?: {12}.+\n?)*)", re.MULTILINE)


def short_help(verb: str, purpose: str) -> str:
    """Usage, required settings, the others, and groups of settings by name.

    Args:
        verb: One of `SETTINGS`.
        purpose: What the verb does, for the first paragraph.
    """
    module, name = SETTINGS[verb]
    kind = getattr(importlib.import_module(module), name)
    hints = get_type_hints(kind)
    told = described(kind)
    required: list[str] = []
    optional: list[str] = []
    groups: list[str] = []
    for one in fields(kind):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if is_dataclass(hints[one.name]):
            groups += _group(one.name, hints[one.name])
        elif default is MISSING:
            required += _setting(one.name, told.get(one.name, ""))
        else:
            optional += _setting(one.name, f"{told.get(one.name, '')} Default: {_shown(default)}.")
    needed = " ".join(line.split()[0] + " ..." for line in required if line.startswith("  --"))
    lines = [
        f"usage: lapilli {verb} [--config RECIPE] {needed} [--SETTING VALUE]".replace("  ", " ")
    ]
    lines += ["", f"{purpose[0].upper()}{purpose[1:]}.", ""]
    lines += _setting("config", "A recipe's path or name (llava15/finetune); several are layered.")
    lines += ["", "required, in the recipe or as flags:", *required] if required else []
    lines += ["", "settings:", *optional]
    lines += ["", "groups:", *groups] if groups else []
    return "\n".join([*lines, "", f"lapilli {verb} --help_all prints every setting and its type."])


def described(kind: type[Any]) -> dict[str, str]:
    """Descriptions of a dataclass's attributes, from its docstring and those of its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = (base.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(
            r"^ {8}(\w+): ((?:.+\n?(?: {12}.+\n?)*))", section, re.MULTILINE
        ):
            found[name] = " ".join(text.split())
    return found


def _setting(name: str, text: str) -> list[str]:
    first = f"  --{name}"
    body = textwrap.wrap(text, WIDTH - 24) or [""]
    if len(first) > 22:
        return [first, *(" " * 24 + line for line in body)]
    return [f"{first:<24}{body[0]}", *(" " * 24 + line for line in body[1:])]


def _group(name: str, kind: type[Any]) -> list[str]:
    """A group's purpose and the names of its settings; groups in it are named by their dots."""
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    hints = get_type_hints(kind)
    names = [f"{o.name}.*" if is_dataclass(hints[o.name]) else o.name for o in fields(kind)]
    return _setting(f"{name}.*", f"{summary} {', '.join(names)}")


def _shown(value: object) -> str:
    return "none" if value in ("", None, [], {}, ()) else str(value)
