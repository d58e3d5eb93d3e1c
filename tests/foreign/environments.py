"""Environments of other readers, in `.venv-readers/` or `$LAPILLI_READERS`.

`requirements/NAME.txt` lists one, in the form of `pipelines.lmms_eval.environment`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pipelines.lmms_eval.environment import make_environment

__all__ = ["HERE", "READERS", "ROOT", "SCRIPTS", "python_of", "run_in"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPTS = HERE / "scripts"
READERS = Path(os.environ.get("LAPILLI_READERS", ROOT / ".venv-readers"))


def python_of(name: str) -> Path:
    """The interpreter of an environment; it is made if it is not there.

    Raises:
        TrainError: It cannot be installed; shows pip's last words.
    """
    return make_environment(HERE / "requirements" / f"{name}.txt", READERS)


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
