"""What several tests share. Nothing here hides a failure: no retries, no silenced warnings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.browser import Chromium, find_chromium
from tests.open_directory import is_open, open_directory

ROOT = Path(__file__).parents[1]
NOBODY = 65534

# Both are inherited by every process a test starts, Ray's workers too.
# A test that would download something fails at once, on every machine alike; set before anything
# imports huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# This checkout runs, even where another one or none is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*(str(ROOT / "packages" / package) for package in ("data", "model", "train")), str(ROOT)]
)

# Property tests take the same examples every time, and as long as they need: what passes on one
# machine passes on another. `pytest --hypothesis-profile random` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("random", deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray for the whole test run; never somebody else's."""
    import ray

    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Other people's photos, captions and tokenizers, kept beside the project and not in it."""
    folder = ROOT.parent / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: other people's photos, captions and tokenizers")
    return folder


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of 20 MB cannot be mounted here; it takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True)
def torchs_linear() -> Iterator[None]:
    """DeepSpeed's stage 3 replaces torch's `linear` in this process, for all tests that follow."""
    yield
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.nn.functional.linear = torch._C._nn.linear


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are for their owner alone."""
    with open_directory() as folder:
        yield folder


@contextmanager
def _as_nobody() -> Generator[None]:
    os.setresgid(NOBODY, NOBODY, 0)
    groups = os.getgroups()
    os.setgroups([])
    os.setresuid(NOBODY, NOBODY, 0)  # the saved id is the way back
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setgroups(groups)
        os.setresgid(0, 0, 0)


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """A context in which this process is a user without rights: what the kernel refuses is real."""
    if os.geteuid() != 0:
        pytest.skip("to become another user takes root")
    if not is_open(Path(sys.prefix)):  # packages are imported, and their versions read, when needed
        pytest.skip(f"{sys.prefix} may not be entered by every user, who would find no packages")
    return _as_nobody


@pytest.fixture(scope="session")
def chromium() -> Chromium:
    """What opens a page in headless Chromium."""
    pytest.importorskip(
        "playwright", reason="playwright (extra `dev`) is absent: it drives Chromium"
    )
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    return Chromium(path)
