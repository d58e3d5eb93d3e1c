"""The doctor: what it makes of made-up findings, and the real command on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.cli.control_groups import cgroup_limits
from pipelines.doctor import Library, Row

ROOT = Path(__file__).parents[2]
GIB = 2**30
WELL = Library("ray[data]", ">=2.60", "2.60.0", "2.60.0")


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.doctor"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("version", "error", "state", "said"),
    [
        ("2.60.0", "", "ok", "2.60.0"),
        ("2.60.0+cpu", "", "ok", "2.60.0+cpu"),
        ("2.61.0", "", "note", "2.60.0 is tested"),
        ("2.9.0", "", "missing", ">=2.60 is needed"),
        (None, "", "missing", "not installed"),
        ("2.60.0", "OSError: libx.so", "missing", "does not import: OSError: libx.so"),
    ],
)
def test_a_library(version: str | None, error: str, state: str, said: str) -> None:
    (row,) = doctor.library_rows([Library(WELL.name, WELL.wanted, WELL.tested, version, error)])
    assert (row.what, row.state) == ("ray", state)
    assert said in row.found
    assert (row.remedy == "") == (state == "ok")
    assert doctor.exit_code([row]) == (state == "missing")


def test_libraries_as_tested_share_a_row() -> None:
    rows = doctor.library_rows([Library(name, ">=1", "1.0", "1.0") for name in ("a", "b", "torch")])
    assert rows == [Row("torch", "1.0"), Row("libraries", "2 as tested: a, b")]


def test_libraries_that_fail_alike_are_mended_by_the_first() -> None:
    broken = [Library(name, ">=1", "1.0", "1.0", "OSError: libx.so") for name in ("torch", "peft")]
    first, second = doctor.library_rows(broken)
    assert first.remedy.endswith("-r constraints-cuda.txt --force-reinstall")
    assert second == Row("peft", "1.0 does not import, as torch", "missing")


def test_every_dependency_has_a_tested_version() -> None:
    found = doctor.read_requirements(ROOT)
    (wanted,) = [wanted for name, wanted, _ in found if name == "ray[data]"]
    assert f'"ray[data]{wanted}"' in (ROOT / "pyproject.toml").read_text()
    assert [name for name, _, tested in found if not tested] == []


def test_a_broken_import_is_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "brokenlib.py").write_text("print('noise')\nraise OSError('first\\nlast line')\n")
    info = tmp_path / "brokenlib-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenlib\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor.find_library("brokenlib", ">=1", "1.0")
    assert found == Library("brokenlib", ">=1", "1.0", "1.0", "OSError: last line")
    assert capsys.readouterr().out == ""


def test_the_longest_folder_that_is_well_is_the_longest_a_socket_binds() -> None:
    def state(length: int) -> str:
        return doctor.socket_row({"TMPDIR": "/" + "x" * (length - 1)}).state

    longest = next(n for n in range(1, 200) if state(n + 1) == "missing")
    assert state(longest) == "ok"
    path = "/" + "x" * (longest - 1) + "/" + doctor.SESSION
    for name, is_too_long in ((path, False), (path + "x", True)):
        with socket.socket(socket.AF_UNIX) as each, pytest.raises(OSError) as raised:  # noqa: PT011
            each.bind(name)  # the folder is not there: the kernel is asked only if the name fits
        assert ("too long" in str(raised.value)) == is_too_long


def test_ray_takes_its_own_temporary_folder_first() -> None:
    assert doctor.socket_row({"TMPDIR": "/x" * 60}).remedy == "export RAY_TMPDIR=/tmp"
    assert doctor.socket_row({"TMPDIR": "/x" * 60, "RAY_TMPDIR": "/tmp"}).state == "ok"


@pytest.mark.parametrize(
    ("row", "state"),
    [
        (doctor.python_row((3, 10, 9)), "missing"),
        (doctor.python_row((3, 11, 0)), "ok"),
        (doctor.cores_row(8, 8, None), "ok"),
        (doctor.cores_row(8, 8, 1.5), "note"),
        (doctor.cores_row(8, 1, None), "note"),
        (doctor.memory_row(24 * GIB, 20 * GIB, None), "ok"),
        (doctor.memory_row(24 * GIB, 20 * GIB, 2 * GIB), "note"),
        (doctor.disk_row("here", 50 * GIB), "ok"),
        (doctor.disk_row("here", 1000), "missing"),
        (doctor.shm_row(64 * 2**20, 24 * GIB), "note"),
        (doctor.shm_row(12 * GIB, 24 * GIB), "ok"),
        (doctor.simd_row({"sse", "avx2"}), "ok"),
        (doctor.simd_row({"sse"}), "note"),
    ],
)
def test_a_machine(row: Row, state: str) -> None:
    assert row.state == state, row


FOUND = {"Gaudi": "1.24.1.17", "torch": "2.11.0+hpu", "Python": "3.12.3", "ubuntu": "24.04"}


@pytest.mark.parametrize(
    ("devices", "changed", "state", "said"),
    [
        (8, {}, "ok", "8 devices, Gaudi 1.24.1.17, torch 2.11.0+hpu"),
        (0, {"Gaudi": None}, "ok", "none"),
        (8, {"Gaudi": None}, "note", "8 devices; Gaudi none, 1.24.1 is pinned"),
        (8, {"Gaudi": "1.24.10"}, "note", "Gaudi 1.24.10, 1.24.1 is pinned"),
        (8, {"torch": "2.13.0", "Python": "3.10.12"}, "note", "torch 2.13.0, 2.11 is pinned; Pyth"),
        (8, {"ubuntu": None}, "note", "ubuntu none, 24.04 is pinned"),
    ],
)
def test_gaudis_versions(devices: int, changed: dict[str, str], state: str, said: str) -> None:
    row = doctor.hpu_row(devices, FOUND | changed)
    assert row.state == state
    assert row.found.startswith(said) or said in row.found
    assert row.remedy == (f"docker pull {doctor.IMAGE}" if state == "note" else "")


def test_gaudis_page_has_the_doctors_pins() -> None:
    page = (ROOT / "pipelines/cluster/GAUDI.md").read_text(encoding="utf-8")
    assert page.count(doctor.IMAGE) == 2
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    pins = {cell[0].partition(",")[0]: cell[1] for cell in cells if len(cell) == 2}
    assert pins["Gaudi software"] == doctor.GAUDI["Gaudi"]
    assert pins["torch"].startswith(doctor.GAUDI["torch"])
    assert pins["Python"] == doctor.GAUDI["Python"]
    assert pins["system"] == f"ubuntu {doctor.GAUDI['ubuntu']}"


def test_limits_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "pod" / "box"
    own.mkdir(parents=True)
    (own / "cpu.max").write_text("max 100000\n")
    (own.parent / "cpu.max").write_text("150000 100000\n")
    (own / "memory.max").write_text("4294967296\n")
    assert cgroup_limits(tmp_path, "0::/pod/box\n") == (1.5, 4 * GIB)
    for folder, name, text in (
        ("cpu", "cpu.cfs_quota_us", "200000"),
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("memory", "memory.limit_in_bytes", "1024"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    assert cgroup_limits(tmp_path, "2:cpu:/\n1:memory:/gone\n") == (2.0, 1024)
    assert cgroup_limits(tmp_path, "1:pids:/\n") == (None, None)


def test_the_command_here() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    names = [line.split("  ")[0].strip() for line in done.stdout.splitlines()]
    for name in ("cores", "SIMD", "memory", "disk", "/dev/shm", "Ray's sockets", "Python", "torch",
                 "deepspeed", "ray", "images", "torch build", "GPUs", "HPUs", "triton", "merge",
                 "C compiler", "Chromium", "[quickstart]"):  # fmt: skip
        assert name in names, done.stdout
    assert max(map(len, done.stdout.split("To fix it")[0].splitlines())) <= 80


def test_the_command_where_torch_is_broken_and_the_folder_is_long(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = run_doctor(PYTHONPATH=path, RAY_TMPDIR="/x" * 40)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    said = " ".join(done.stdout.split())
    assert "does not import: ImportError: libcudart.so.13: cannot open" in said
    assert "Ray's sockets: export RAY_TMPDIR=/tmp" in said
