"""Hide installed packages from a Python process and its children, as if they were not installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["TRAINING", "hiding"]

TRAINING = ("torch", "deepspeed", "transformers", "peft", "accelerate")
# Python imports `sitecustomize` at the start of every process, Ray's workers too.
CODE = """
import importlib.machinery, sys
HIDDEN = {names!r}
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)
    @classmethod
    def find_distributions(cls, *given, **named):
        for found in super().find_distributions(*given, **named):
            if found.metadata["Name"] not in HIDDEN:
                yield found
sys.meta_path[:] = [
    Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
"""


def hiding(folder: Path, names: Sequence[str] = TRAINING) -> dict[str, str]:
    """The environment of a process that finds none of these packages.

    Args:
        folder: An empty one, for the code that hides them.
        names: The packages.
    """
    (folder / "sitecustomize.py").write_text(CODE.format(names=tuple(names)), encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
