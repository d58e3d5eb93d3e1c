"""A dataset hashed against its manifest and mended: what was broken is named and made again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lapilli.data.building.repair import repair_dataset
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.dataset.verify import Damage, verify_dataset
from lapilli.data.errors import DataError
from tests.factories import build_config, build_dataset, make_mixture, make_tokenizer

IMAGES = "images/pad32/00001-*.arrow"
TOKENS = "tokens/*/*.arrow"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildConfig]:
    folder = tmp_path_factory.mktemp("integrity")
    mixture = make_mixture(folder / "root", defects=True)
    build_dataset(mixture, folder / "out", make_tokenizer(folder / "tokenizer"))
    return folder, build_config(mixture, folder / "out", folder / "tokenizer")


@pytest.fixture
def copy(made: tuple[Path, BuildConfig], tmp_path: Path) -> Path:
    return shutil.copytree(made[0] / "out", tmp_path / "out")


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        (IMAGES, cut, "cut short"),
        (IMAGES, flip, "damaged"),
        (IMAGES, Path.unlink, "missing"),
        (TOKENS, flip, "damaged"),
        ("selection.arrow", flip, "damaged"),
        ("selection.arrow", Path.unlink, "missing"),
        ("quarantine.parquet", flip, "damaged"),
        ("quarantine.parquet", cut, "damaged"),
        ("quarantine.parquet", Path.unlink, "missing"),
        ("repairs.parquet", flip, "damaged"),
        ("repairs.parquet", Path.unlink, "missing"),
    ],
)
def test_what_is_damaged_is_named_and_mended_to_the_same_bytes(
    made: tuple[Path, BuildConfig],
    copy: Path,
    name: str,
    damage: Callable[[Path], None],
    problem: str,
) -> None:
    before = hashes(copy)
    assert verify_dataset(copy).is_whole
    victim = next(copy.glob(name))
    damage(victim)
    found = verify_dataset(copy)
    assert [(d.path, d.problem) for d in found.damaged] == [
        (str(victim.relative_to(copy)), problem)
    ]
    shards = repair_dataset(copy, made[1], runner=run_here)
    assert shards == (name in (IMAGES, TOKENS))
    assert verify_dataset(copy).is_whole
    after = hashes(copy)
    config = {"config.json"}  # it names the folder, which here is a copy
    assert {n: h for n, h in after.items() if n not in config} == {
        n: h for n, h in before.items() if n not in config
    }


def test_every_byte_is_hashed_and_strangers_are_named(copy: Path) -> None:
    (copy / "images" / "notes.txt").write_text("mine")
    steps: list[tuple[int, int]] = []
    found = verify_dataset(copy, lambda done, total: steps.append((done, total)))
    assert (found.damaged, found.foreign) == ([], ["images/notes.txt"])
    size = sum(file.stat().st_size for file in copy.rglob("*.arrow"))
    assert steps[0] == (0, size)
    assert steps[-1] == (size, size)
    assert found.bytes == size


def test_sources_that_have_changed_are_named_and_nothing_is_touched(
    copy: Path, tmp_path: Path, made: tuple[Path, BuildConfig]
) -> None:
    root = shutil.copytree(made[0] / "root", tmp_path / "root", symlinks=True)
    shard = next(copy.glob(IMAGES))
    shard.unlink()
    victim = next((root / "images" / "0").iterdir())
    victim.write_bytes(victim.read_bytes() + b"\0")
    before = hashes(copy)
    with pytest.raises(DataError, match="cannot be repaired: not as when it was built: images"):
        repair_dataset(copy, replace(made[1], root=str(root)), runner=run_here)
    assert hashes(copy) == before
    assert verify_dataset(copy).damaged == [Damage(str(shard.relative_to(copy)), "missing")]
