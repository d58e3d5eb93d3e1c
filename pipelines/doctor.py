"""Report what this machine has for lapilli, what is missing, and how to add it.

lapilli doctor [--cluster [--folder DIR] [--store ADDRESS]]

Exit code 0 if preprocessing, training and the quickstart can run here, 1 if something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.cli.control_groups import cgroup_limits, words_of

# Nothing heavy, and of ours what needs Python alone: this must run where any of it is broken.

__all__ = [
    "GAUDI", "IMAGE", "Library", "Row", "cores_row", "diagnose", "disk_row",
    "exit_code", "hpu_row", "library_rows", "memory_row", "python_row", "read_requirements",
    "shm_row", "simd_row", "socket_row",
]  # fmt: skip

ROOT = Path(__file__).parents[1]
GIB = 2**30
PIP = f"{Path(sys.executable).name} -m pip install --require-hashes --no-deps -r constraints.txt"
MODULES = {"pillow": "PIL", "protobuf": "google.protobuf", "pyyaml": "yaml"}  # else the name
BY_THEMSELVES = ("torch", "deepspeed", "ray")  # a row even where all is well
EXTRAS = {"quickstart": "easy_vqa", "cluster": "aiohttp_cors", "dev": "pytest"}  # what shows it
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIMD = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
SOCKET_BYTES = 107  # sun_path of unix(7) without its final zero
SESSION = f"ray-{os.getuid()}/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
# What pipelines/cluster/GAUDI.md names; the Gaudi software's is that of its plugin for torch.
GAUDI = {"Gaudi": "1.24.1", "torch": "2.11", "Python": "3.12", "ubuntu": "24.04"}
IMAGE = (
    f"vault.habana.ai/gaudi-docker/{GAUDI['Gaudi']}/ubuntu{GAUDI['ubuntu']}/habanalabs/"
    f"pytorch-installer-{GAUDI['torch']}.0:latest"
)
State = Literal["ok", "note", "missing"]
COLOURS = {"ok": "green", "note": "yellow", "missing": "bold red"}


@dataclass(frozen=True)
class Row:
    """One finding: `missing` stops the main job, `note` does not; the remedy is a command."""

    what: str
    found: str
    state: State = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Library:
    """A library that is needed, and what was found of it.

    Attributes:
        name: As pip knows it, with its extras.
        wanted: The range of pyproject.toml, such as `>=2.60`.
        tested: The version of constraints.txt.
        version: The installed one, or None.
        error: Last line of what importing it raised, or empty.
    """

    name: str
    wanted: str
    tested: str
    version: str | None
    error: str = ""


TRAINING = ("torch", "deepspeed", "peft")  # with none of them this is a node that makes datasets
NO_TRAINING = Row("[train]", "not installed", "note", "pip install 'lapilli[train]'")


# ---- decisions ---------------------------------------------------------------------------------


def exit_code(rows: Sequence[Row]) -> int:
    """1 if anything that the main job needs is missing."""
    return int(any(row.state == "missing" for row in rows))


def python_row(version: tuple[int, int, int]) -> Row:
    """Whether this Python is new enough."""
    found = ".".join(map(str, version))
    if version < (3, 11, 0):
        return Row(
            "Python",
            f"{found}; 3.11 or newer is needed",
            "missing",
            "make PYTHON=python3.11 install",
        )
    return Row("Python", found)


def cores_row(machine: int, affinity: int, quota: float | None) -> Row:
    """Cores that may be used: what the affinity leaves, and the control group's quota of them."""
    usable = min(affinity, quota) if quota else affinity
    found = f"{usable:g} of {machine}" if usable < machine else f"{machine}"
    if quota and quota < affinity:
        return Row(
            "cores",
            f"{found}; a control group's limit, which Ray may not see",
            "note",
            f"export OMP_NUM_THREADS={max(1, int(quota))}",
        )
    if usable < 2:
        return Row("cores", f"{found}; the quickstart is made for two", "note")
    return Row("cores", found)


def memory_row(machine: int, available: int, limit: int | None) -> Row:
    """Bytes of memory; below 4 GiB the quickstart is tight."""
    usable = min(machine, limit) if limit else machine
    found = f"{usable / GIB:.1f} GiB, {min(available, usable) / GIB:.1f} GiB free"
    if usable < machine:
        found += f" (a control group's limit; the machine has {machine / GIB:.1f})"
    if usable < 4 * GIB:
        return Row("memory", f"{found}; the quickstart wants 4 GiB", "note")
    return Row("memory", found)


def disk_row(folder: str, free: int) -> Row:
    """Bytes free where outputs go."""
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB:
        return Row("disk", f"{found}; 1 GiB is the least", "missing", f"df -h {folder}")
    return Row("disk", found)


def shm_row(size: int | None, memory: int) -> Row:
    """Ray wants its object store, 30% of the memory, in /dev/shm; else it takes a slow disk."""
    if size is None:
        return Row("/dev/shm", "none; Ray keeps objects in a file", "note")
    found = f"{size / GIB:.1f} GiB"
    wanted = 0.3 * memory
    if size < wanted:
        return Row(
            "/dev/shm",
            f"{found}; Ray uses a slow disk below {wanted / GIB:.1f} GiB",
            "note",
            f"docker run --shm-size={-int(-wanted // GIB)}g ...",
        )
    return Row("/dev/shm", found)


def simd_row(flags: set[str]) -> Row:
    """The instruction sets that matter here, out of the processor's flags."""
    found = [name for name in SIMD if name in flags]
    if not found:
        return Row("SIMD", "none known; decoding and CPU training are slow", "note")
    return Row("SIMD", ", ".join("neon" if name == "asimd" else name for name in found))


def socket_row(environment: Mapping[str, str]) -> Row:
    """Whether the sockets that Ray makes below its temporary folder have names short enough."""
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in environment), "")
    folder = environment.get(name, "/tmp")
    length = len(os.fsencode(f"{folder.rstrip('/')}/{SESSION}"))
    found = f"up to {length} of {SOCKET_BYTES} bytes"
    if length > SOCKET_BYTES:
        return Row(
            "Ray's sockets",
            f"{found}: {name} is too long, Ray cannot start",
            "missing",
            "export RAY_TMPDIR=/tmp",
        )
    return Row("Ray's sockets", f"{found}, below {folder}")


def hpu_row(devices: int, found: Mapping[str, str | None]) -> Row:
    """Gaudi's devices, and the versions that matter there beside `GAUDI`'s.

    Args:
        devices: Their number.
        found: Versions by `GAUDI`'s names; None for what is not there.
    """
    if not devices and found.get("Gaudi") is None:
        return Row("HPUs", "none")
    other = [
        f"{name} {version or 'none'}, {GAUDI[name]} is pinned"
        for name, version in found.items()
        if not f"{version}.".startswith(f"{GAUDI[name]}.")
    ]
    if other:
        return Row("HPUs", f"{devices} devices; {'; '.join(other)}", "note", f"docker pull {IMAGE}")
    return Row("HPUs", f"{devices} devices, {', '.join(f'{n} {v}' for n, v in found.items())}")


def library_rows(libraries: Sequence[Library]) -> list[Row]:
    """A row for each library that is not as tested, one for all the others together.

    Libraries that fail with one error fail for the first one's sake: only that one has a remedy.
    """
    rows: list[Row] = []
    culprits: dict[str, str] = {}
    for library in libraries:
        plain = _plain(library.name)
        culprit = culprits.setdefault(library.error, plain) if library.error else plain
        if culprit == plain:
            rows.append(library_row(library))
        else:
            rows.append(Row(plain, f"{library.version} does not import, as {culprit}", "missing"))
    shown = [row for row in rows if row.state != "ok" or row.what in BY_THEMSELVES]
    rest = [row.what for row in rows if row not in shown]
    if rest:
        shown.append(Row("libraries", f"{len(rest)} as tested: {', '.join(rest)}"))
    return shown


def library_row(library: Library) -> Row:
    """Missing, broken, outside the range, other than tested, or well."""
    plain = _plain(library.name)
    remedy = PIP.replace(".txt", "-cuda.txt") if plain == "torch" else PIP
    if library.version is None:
        return Row(plain, f"not installed; {library.tested} is tested", "missing", remedy)
    if library.error:
        remedy = f"{remedy} --force-reinstall"
        found = f"{library.version} does not import: {library.error}"
        return Row(plain, found, "missing", remedy)
    if not _in_range(library.version, library.wanted):
        return Row(plain, f"{library.version}; {library.wanted} is needed", "missing", remedy)
    # the local part (+cpu, +cu130) is the build's
    if library.tested and library.version.partition("+")[0] != library.tested:
        return Row(plain, f"{library.version}; {library.tested} is tested", "note", remedy)
    return Row(plain, library.version)


def _plain(name: str) -> str:
    return name.partition("[")[0]


def _in_range(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # then the comparison with the tested version has to do
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


# ---- findings ----------------------------------------------------------------------------------


def read_requirements(root: Path, *, training: bool = True) -> list[tuple[str, str, str]]:
    """Name with extras, range and tested version of each dependency.

    Args:
        root: The checkout.
        training: With those of training, else of preprocessing alone.
    """
    import tomllib  # missing in a Python that is too old, which must be reported

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    names = ("constraints.txt", "constraints-cuda.txt")
    text = "".join((root / name).read_text(encoding="utf-8") for name in names)
    pins: list[tuple[str, str]] = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    tested = {name.lower().replace("_", "-"): version for name, version in pins}
    found: list[tuple[str, str, str]] = []
    extras: dict[str, list[str]] = project["project"]["optional-dependencies"]
    chosen = ("data", "text", "gaudi", "train") if training else ("data",)
    lines = [line for extra in chosen for line in extras[extra] if not line.startswith("lapilli")]
    for line in [*project["project"]["dependencies"], *lines]:
        name, wanted = re.fullmatch(r"([\w.-]+(?:\[[^]]*])?)([^;]*).*", line).groups()  # type: ignore[union-attr]
        found.append((name, wanted.strip(), tested.get(_plain(name), "")))
    return found


def find_library(name: str, wanted: str, tested: str) -> Library:
    """The installed version of a library, and whether it imports."""
    plain = _plain(name)
    version = _version(plain)
    if plain == "pillow" and version is None:
        version = _version("pillow-simd")
    if version is None:
        return Library(name=name, wanted=wanted, tested=tested, version=None)
    _, error = attempt(lambda: importlib.import_module(MODULES.get(plain, plain)))
    return Library(name=name, wanted=wanted, tested=tested, version=version, error=error)


def attempt(probe: Callable[[], Any]) -> tuple[Any, str]:
    """What a probe returns, or None and the last line of what it raised; it prints nothing."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            return probe(), ""
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[-1]}".rstrip(": ")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_rows() -> Iterator[Row]:
    """Cores, instruction sets, memory, disks, sockets; Python last."""
    listing = Path("/proc/self/cgroup")
    text = listing.read_text() if listing.exists() else ""
    quota, limit = cgroup_limits(Path("/sys/fs/cgroup"), text)
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    yield cores_row(machine, affinity, quota)
    words = words_of(Path("/proc/cpuinfo"))
    yield simd_row(set(words) | ({"asimd"} if platform.machine() == "arm64" else set()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = words_of(Path("/proc/meminfo"))
    is_told = "MemAvailable:" in info
    available = int(info[info.index("MemAvailable:") + 1]) * 1024 if is_told else memory
    yield memory_row(memory, available, limit)
    yield disk_row(str(Path.cwd()), shutil.disk_usage(".").free)
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.exists() else None
    yield shm_row(size, min(memory, limit or memory))
    yield socket_row(os.environ)
    yield python_row(sys.version_info[:3])


def codecs_row() -> Row:
    """Decoder and resizer that `resizer: auto` takes here."""

    def probe() -> tuple[str, str]:
        from lapilli.data.images.codecs import replaced_simd, resolve_codecs

        return resolve_codecs("auto").describe(), replaced_simd()

    answer, error = attempt(probe)
    if error:
        return Row("images", error, "missing", PIP)
    found, replaced = answer
    if replaced:
        return Row("images", f"{found}; {replaced}", "note", "make simd")
    return Row("images", found)


def torch_rows() -> Iterator[Row]:
    """GPUs, torch's build, and the merge implementations."""

    def probe() -> tuple[str, list[str]]:
        import torch

        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{cuda}, {torch.get_num_threads()} threads", gpus

    def merges() -> str:
        from lapilli.model.merging import IMPLEMENTATIONS

        return ", ".join(IMPLEMENTATIONS)

    found, error = attempt(probe)
    build, gpus = found or ("", [])
    yield Row("torch build", error or build, "note" if error else "ok")
    if gpus:
        yield Row("GPUs", f"{len(gpus)}: {', '.join(dict.fromkeys(gpus))}")
    elif Path("/dev/nvidia0").exists():
        yield Row("GPUs", "there is one, but torch sees none", "note", "nvidia-smi")
    else:
        yield Row("GPUs", "none; training runs on the CPU")
    found, error = attempt(merges)
    yield Row("merge", error or found, "note" if error else "ok")


def optional_rows(*, trains: bool) -> Iterator[Row]:
    """Optional packages."""
    yield hpu_row(len([*Path("/dev/accel").glob("accel*[0-9]")]), gaudi_versions())
    triton = _version("triton")
    yield Row("triton", triton) if triton else _lacking("triton", "GPU kernels", PIP)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    yield (
        Row("C compiler", compiler)
        if compiler
        else _lacking("C compiler", "triton and DeepSpeed's operators", "apt-get install gcc")
    )
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    yield (
        Row("Chromium", browser)
        if browser
        else _lacking("Chromium", "tests of pages", "apt-get install chromium")
    )
    for extra, module in EXTRAS.items():
        if importlib.util.find_spec(module):
            yield Row(f"[{extra}]", "installed")
        else:
            needed = extra == "quickstart" and trains
            yield Row(f"[{extra}]", "not installed", "missing" if needed else "note", PIP)


def gaudi_versions() -> dict[str, str | None]:
    """What is found of `GAUDI`'s names."""
    system, _ = attempt(platform.freedesktop_os_release)
    is_ubuntu = system and system.get("ID") == "ubuntu"
    return {
        "Gaudi": _version("habana-torch-plugin"),
        "torch": _version("torch"),
        "Python": platform.python_version(),
        "ubuntu": system["VERSION_ID"] if is_ubuntu else None,
    }


def _lacking(what: str, needed_for: str, remedy: str) -> Row:
    return Row(what, f"none; for {needed_for}", "note", remedy)


def diagnose() -> list[Row]:
    """Every row, the machine's first; of a Python that is too old nothing else is asked."""
    machine = list(machine_rows())
    if machine[-1].state == "missing":
        return machine
    trains = any(_version(name) for name in TRAINING)
    needed = read_requirements(ROOT, training=trains)
    if _version("habana-torch-plugin"):  # whose torch is the image's own and has a row elsewhere
        needed = [one for one in needed if _plain(one[0]) != "torch"]
    libraries = [find_library(*requirement) for requirement in needed]
    return [
        *machine,
        *library_rows(libraries),
        codecs_row(),
        *(torch_rows() if trains else [NO_TRAINING]),
        *optional_rows(trains=trains),
    ]


# ---- printing ----------------------------------------------------------------------------------


def print_rows(rows: Sequence[Row]) -> None:
    """A table, or plain lines where rich does not import; then the commands, to be copied."""
    commands = [row for row in rows if row.remedy]
    table, error = attempt(
        lambda: importlib.import_module("pipelines.diagnosis.rows_table").rows_table(rows, COLOURS)
    )
    console, has_none = attempt(lambda: importlib.import_module("pipelines.cli.terminal").console)
    if error or has_none:
        for row in rows:
            print(f"{row.state:8}{row.what}: {row.found}")
    else:
        console.print(table)
    if commands:
        print("To fix it:")
    for row in commands:
        print(f"  {row.what}: {row.remedy}")
    if exit_code(rows):
        print("\nSomething that preprocessing, training or the quickstart needs is missing.")
    elif NO_TRAINING in rows:
        print("\nPreprocessing can run here. Training and the quickstart need the extra train.")
    else:
        print("\nPreprocessing, training and the quickstart can run here.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="lapilli doctor",
        description="What this machine has for lapilli, what is missing, how to add it.",
        epilog="Exit code 0: preprocessing, training and the quickstart can run. 1: they cannot.",
    )
    parser.add_argument("--cluster", action="store_true", help="probe each node of RAY_ADDRESS")
    parser.add_argument("--folder", default="", help="with --cluster: one that nodes should share")
    parser.add_argument("--store", default="", help="with --cluster: an address nodes should write")
    found = parser.parse_args(argv)
    if (found.folder or found.store) and not found.cluster:
        parser.error("--folder and --store go with --cluster")
    if found.cluster:
        nodes: Any = importlib.import_module("pipelines.diagnosis.nodes_table")
        command: Any = importlib.import_module("pipelines.cli.command")
        command.run(lambda: nodes.diagnose_cluster(found.folder, found.store))
    safe_output, _ = attempt(lambda: importlib.import_module("pipelines.cli.terminal").safe_output)
    with safe_output() if safe_output else contextlib.nullcontext():
        rows = diagnose()
        print_rows(rows)
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
