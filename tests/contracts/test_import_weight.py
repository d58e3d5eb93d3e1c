"""What an import costs: the heavy libraries come when they are used, not before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import importlib, json, sys, time
started = time.perf_counter()
importlib.import_module(sys.argv[1])
print(json.dumps([time.perf_counter() - started, sorted(sys.modules)]))
"""


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("lapilli.data", ["torch", "ray", "transformers", "deepspeed", "lapilli.model"]),
        ("lapilli.model", ["torch", "ray", "transformers", "deepspeed", "lapilli.data"]),
        ("lapilli.model.vlm", ["ray", "transformers", "deepspeed", "lapilli.data"]),
        ("lapilli.train", ["torch", "ray", "transformers", "deepspeed"]),
        ("lapilli.train.driver.launching", ["ray", "transformers", "deepspeed"]),
        ("pipelines.check", ["torch", "ray", "transformers", "lapilli.model.vlm"]),
    ],
)
def test_import_loads_only_what_it_must(package: str, absent: list[str]) -> None:
    output = subprocess.check_output([sys.executable, "-c", PROBE, package], text=True)
    seconds, modules = json.loads(output.splitlines()[-1])
    print(f"import {package}: {seconds:.1f} s, {len(modules)} modules")
    assert package in modules
    assert [name for name in absent if name in modules] == []
