"""`lapilli VERB --help` is short, names every setting or its group, and loads no model code."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import fields

import pytest

from pipelines.cli.help_text import SETTINGS, described, short_help
from pipelines.cli.main import VERBS

MOST_LINES = 90
HEAVY = ["torch", "transformers", "ray", "deepspeed"]
PROBE = """
import json, sys
from pipelines.cli.main import main
sys.argv = ["lapilli", *sys.argv[1:]]
main()
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_setting_or_its_group_is_named_with_what_it_means(verb: str) -> None:
    text = short_help(verb, VERBS[verb])
    module, name = SETTINGS[verb]
    kind = getattr(importlib.import_module(module), name)
    flags = {line.split()[0].removesuffix(".*") for line in text.splitlines() if "  --" in line}
    assert flags == {f"--{one.name}" for one in fields(kind)} | {"--config"}
    assert described(kind).keys() == {one.name for one in fields(kind)}
    assert len(text.splitlines()) <= MOST_LINES
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_required_settings_come_first() -> None:
    lines = short_help("train", VERBS["train"]).splitlines()
    assert lines[0].startswith("usage: lapilli train [--config RECIPE] --dataset ... --output ...")
    at = lines.index("required, in the recipe or as flags:")
    assert at < lines.index("settings:") < lines.index("groups:")


@pytest.mark.parametrize("verb", ["train", "chat", "preprocess"])
def test_help_loads_nothing_heavy(verb: str) -> None:
    command = [sys.executable, "-c", PROBE, verb, "--help"]
    output = subprocess.check_output(command, text=True)
    loaded = json.loads(output.splitlines()[-1])
    assert [name for name in HEAVY if name in loaded] == []


def test_all_settings_are_one_flag_away() -> None:
    command = [sys.executable, "-m", "pipelines.cli.main", "train", "--help_all"]
    output = subprocess.check_output(command, text=True)
    assert "--model.vision.tower TOWER" in output
    assert "--optim.lr_by_part" in output
