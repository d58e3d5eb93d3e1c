"""Virtual environments of other programs, made from the package index.

python -m pipelines.lmms_eval.environment

A file of requirements lists one, a package a line. Two lines are directives:

- `--no-deps PACKAGE` installs that package without what it depends on.
- `--share` makes an overlay: the environment also sees the packages of the environment that makes
  it (torch, numpy, safetensors, Pillow ...), behind its own. Everything listed is installed
  without dependencies, so that an overlay takes seconds and a few MB. This project's own packages
  stay invisible.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from lapilli.train.errors import TrainError
from pipelines.cli.command import run, say

__all__ = ["MAKE", "REQUIREMENTS", "environments", "interpreter", "main", "make_environment"]

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MAKE = "python -m pipelines.lmms_eval.environment"
COMPLETE = "complete"


def environments() -> Path:
    """Where they lie: `$LAPILLI_ENVIRONMENTS`, else `~/.cache/lapilli/environments`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("LAPILLI_ENVIRONMENTS") or home / "lapilli" / "environments")


def interpreter(requirements: Path, root: Path) -> Path | None:
    """The interpreter of an environment; None where it is not made.

    Args:
        requirements: Its file; another content is another environment.
        root: Folder of environments.
    """
    folder = _folder(requirements, root)
    return folder / "bin" / "python" if (folder / COMPLETE).is_file() else None


def make_environment(requirements: Path, root: Path) -> Path:
    """The interpreter of an environment; it is made if it is not there.

    Raises:
        TrainError: It cannot be installed; shows pip's last words.
    """
    if there := interpreter(requirements, root):
        return there
    folder = _folder(requirements, root)
    lines = _lines(requirements)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    alone = [line.removeprefix("--no-deps ") for line in lines if line.startswith("--no-deps ")]
    plain = [line for line in lines if not line.startswith("--")]
    if "--share" in lines:
        own = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        # a path in a .pth file goes behind the environment's own packages, and the .pth files
        # there, such as an editable install's, are not followed
        (own / "shared.pth").write_text("\n".join(_packages_here()) + "\n", encoding="utf-8")
        alone, plain = [*alone, *plain], []
    _install(python, plain)
    _install(python, alone, "--no-deps")
    (folder / COMPLETE).touch()
    return python


def _lines(requirements: Path) -> list[str]:
    text = requirements.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _folder(requirements: Path, root: Path) -> Path:
    """Its name and the hash of its contents, so that a changed file makes a new one."""
    shared = _packages_here() if "--share" in _lines(requirements) else []
    text = requirements.read_text(encoding="utf-8")
    digest = hashlib.sha256("\n".join([text, *shared]).encode()).hexdigest()[:12]
    is_named = requirements.stem == "requirements"
    name = requirements.parent.name.replace("_", "-") if is_named else requirements.stem
    return root / f"{name}-{digest}"


def _packages_here() -> list[str]:
    """The folders of packages of the environment that makes it."""
    paths = sysconfig.get_paths()
    return sorted({paths["purelib"], paths["platlib"]})


def _install(python: Path, packages: list[str], *options: str) -> None:
    if not packages:
        return
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-warn-conflicts", *options, *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        words = " ".join(" ".join(said).split())[-600:]
        raise TrainError(f"{python.parents[1].name} cannot be installed; pip says: {words}")


def main(argv: Sequence[str] | None = None) -> int:
    """Make lmms-eval's environment."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    say(f"lmms-eval: {make_environment(REQUIREMENTS, environments())}")
    return 0


if __name__ == "__main__":
    run(main)
