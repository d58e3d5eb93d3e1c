"""Virtual environments of other programs, made from the package index when they are first needed.

`requirements/NAME.txt` lists one, a package a line. Two lines are directives:

- `--no-deps PACKAGE` installs that package without what it depends on.
- `--share` makes an overlay: the environment also sees the packages of the environment that runs
  the tests (torch, numpy, safetensors, Pillow ...), behind its own. Everything listed is installed
  without dependencies, so that an overlay takes seconds and a few MB. This project's own packages
  stay invisible.

An environment lies in `.venv-readers/`, or in `$LAPILLI_READERS`, under its name and the hash of
its contents, so that a changed file makes a new one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["HERE", "ROOT", "SCRIPTS", "python_of", "run_in"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPTS = HERE / "scripts"


def python_of(name: str) -> Path:
    """The interpreter of an environment; it is made if it is not there.

    Raises:
        AssertionError: It cannot be installed; shows pip's last words.
    """
    requirements = HERE / "requirements" / f"{name}.txt"
    text = requirements.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    shared = _packages_here() if "--share" in lines else []
    digest = hashlib.sha256("\n".join([text, *shared]).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("LAPILLI_READERS", ROOT / ".venv-readers")) / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    alone = [line.removeprefix("--no-deps ") for line in lines if line.startswith("--no-deps ")]
    plain = [line for line in lines if not line.startswith("--")]
    if shared:
        own = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        # a path in a .pth file goes behind the environment's own packages, and the .pth files
        # there, such as an editable install's, are not followed
        (own / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
        alone, plain = [*alone, *plain], []
    _install(python, plain)
    _install(python, alone, "--no-deps")
    (folder / "complete").touch()
    return python


def _packages_here() -> list[str]:
    """The folders of packages of the environment that runs the tests."""
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
    assert done.returncode == 0, f"{packages}: {done.stderr[-2000:]}"


def run_in(name: str, *arguments: str | Path, **variables: str) -> str:
    """Run an environment's interpreter away from this project's code; what it printed.

    Raises:
        AssertionError: It failed; shows its last words.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python_of(name)), *map(str, arguments)],
        env={**kept, **quiet, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments[0]}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout
