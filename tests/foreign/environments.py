"""Virtual environments of other programs, made from the package index when they are first needed.

`requirements/NAME.txt` lists one; a line `--no-deps PACKAGE` installs that package by itself. An
environment lies in `.venv-readers/`, or in `$LAPILLI_READERS`, under its name and the hash of that
file, so that a changed file makes a new one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["python_of", "run_in"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def python_of(name: str) -> Path:
    """The interpreter of an environment; it is made if it is not there.

    Raises:
        AssertionError: It cannot be installed; shows pip's last words.
    """
    requirements = HERE / "requirements" / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = Path(os.environ.get("LAPILLI_READERS", ROOT / ".venv-readers")) / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    alone: list[str] = []
    together: list[str] = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line.startswith("--no-deps "):
            alone.append(line.removeprefix("--no-deps "))
        elif line and not line.startswith("#"):
            together.append(line)
    for arguments in (together, ["--no-deps", *alone]):
        if arguments not in ([], ["--no-deps"]):
            done = subprocess.run(
                [str(python), "-m", "pip", "install", "--quiet", *arguments],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{requirements}: {done.stderr[-2000:]}"
    (folder / "complete").touch()
    return python


def run_in(name: str, *arguments: str | Path, **variables: str) -> str:
    """Run an environment's interpreter away from this project's code; what it printed.

    Raises:
        AssertionError: It failed; shows its last words.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python_of(name)), *map(str, arguments)],
        env={**kept, **quiet, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments[0]}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout
