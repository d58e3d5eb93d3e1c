"""Install the lowest versions that pyproject.toml allows into an environment of their own.

    python .ci/lowest.py .venv-lowest

uv resolves what is named in pyproject.toml, extras of `dev` included, to its lowest version, and
what that requires to its newest. A lower end that no resolution comes to is a promise that cannot
be kept, and ends this with an error; so does an index that does not offer a version any more.
torch is what PyPI has, which brings its CUDA packages.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from constraints import ROOT, entries, plain, version

__all__ = ["main", "promised", "unkept"]

EXTRA = "dev"
LOWER = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?(?:[\d.,<=]*?)(?:>=|==)([\d.]+)")


def promised(pyproject: str) -> dict[str, str]:
    """The lower ends by normalised name, the highest of those that a package has."""
    project = tomllib.loads(pyproject)["project"]
    texts = [*project["dependencies"]]
    texts += [text for extra in project["optional-dependencies"].values() for text in extra]
    found: dict[str, str] = {}
    for name, low in (match.groups() for match in map(LOWER.match, texts) if match):
        found[plain(name)] = max(low, found.get(plain(name), low), key=_numbers)
    return found


def unkept(lows: dict[str, str], resolved: dict[str, str]) -> list[str]:
    """A line for each lower end that is below what it was resolved to.

    `1.2` is kept by 1.2.3, and `1` by 1.0.3.
    """
    return [
        f"{name}>={low} cannot be had, only {resolved[name]}; raise it in pyproject.toml"
        for name, low in lows.items()
        if name in resolved and not _starts(_numbers(resolved[name]), _numbers(low))
    ]


def _starts(whole: tuple[int, ...], beginning: tuple[int, ...]) -> bool:
    count = max(2, len(beginning))
    return (*whole, 0, 0, 0)[:count] == (*beginning, 0)[:count]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def main() -> None:
    """Make the environment, or make it right if it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the environment")
    folder = parser.parse_args().folder.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        tools = Path(scratch) / "venv"
        venv.create(tools, with_pip=True)
        _run(tools / "bin/python", "-m", "pip", "install", "--quiet", "uv")
        uv = tools / "bin/uv"
        lowest = Path(scratch) / "lowest.txt"
        _run(
            uv, "pip", "compile", "--quiet", "--resolution", "lowest-direct", "--extra", EXTRA,
            "--no-annotate", "--no-header", "--python", sys.executable, "--output-file", lowest,
            "pyproject.toml",
        )  # fmt: skip
        pins = entries(lowest.read_text(encoding="utf-8"))
        resolved = {name: version(pin).partition("==")[2] for name, pin in pins.items()}
        lows = promised((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        if lines := unkept(lows, resolved):
            sys.exit("\n".join(lines))
        if not (folder / "bin/python").exists():
            venv.create(folder, symlinks=True)
        target = ("--python", folder / "bin/python")
        _run(uv, "pip", "sync", "--quiet", *target, lowest)
        _run(
            uv, "pip", "install", "--quiet", *target, "--no-deps", "--no-build-isolation", "-e", "."
        )
    sys.stdout.write(
        "".join(f"{name} {resolved[name]}\n" for name in sorted(lows.keys() & resolved.keys()))
    )


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
