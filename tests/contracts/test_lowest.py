"""What `make test-lowest` takes for the lower ends that pyproject.toml promises."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
BOUNDED = ("ray", "deepspeed", "torch", "transformers", "peft")


@pytest.fixture
def lowest(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import lowest  # pyright: ignore[reportMissingImports]

    yield lowest
    for name in ("lowest", "constraints"):
        sys.modules.pop(name, None)


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(t) for of in (project["dependencies"], *extras) for t in of]


def test_the_lower_end_of_every_requirement_is_read(lowest: Any) -> None:
    found = lowest.promised((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for wanted in requirements():
        lows = [one.version for one in wanted.specifier if one.operator in (">=", "==")]
        name = canonicalize_name(wanted.name)
        if lows:
            assert Version(found[name]) >= Version(lows[0]), wanted
    named = {canonicalize_name(wanted.name) for wanted in requirements()} - {"lapilli"}
    assert {*found} == named


@pytest.mark.parametrize(
    ("low", "resolved", "is_kept"),
    [
        ("1.2", "1.2.0", True), ("1.2", "1.2.3", True), ("5", "5.0.1", True),
        ("0.19.8", "0.19.8", True), ("2024.6", "2024.6.0", True), ("6", "6", True),
        ("1.2", "1.3.0", False), ("5", "5.29.5", False), ("2.0", "2.4.6", False),
        ("0.19.8", "0.19.9", False), ("1.2", "1.20.0", False),
    ],
)  # fmt: skip
def test_a_lower_end_that_cannot_be_had_is_named(
    low: str, resolved: str, is_kept: bool, lowest: Any
) -> None:
    lines = lowest.unkept({"some": low}, {"some": resolved, "other": "1"})
    assert lines == (
        []
        if is_kept
        else [f"some>={low} cannot be had, only {resolved}; raise it in pyproject.toml"]
    )


@pytest.mark.parametrize("name", BOUNDED)
def test_the_next_minor_release_of_what_has_private_names_in_use_is_kept_out(name: str) -> None:
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "constraints-cuda.txt").read_text()
    (pin,) = {line.split()[0] for line in pins.splitlines() if line.startswith(f"{name}==")}
    tested = Version(pin.partition("==")[2])
    following = Version(f"{tested.major}.{tested.minor + 1}")
    for wanted in requirements():
        if wanted.name == name:
            assert tested in wanted.specifier
            assert following not in wanted.specifier


def test_what_is_run_at_the_lowest_versions_is_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("LOWEST = ")]
    assert [name for name in line.split()[2:] if not (ROOT / name).exists()] == []
