"""A teacher's actors on Ray: loaded once each, and killed without a loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import TargetConfig
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from tests.factories import build_config, make_mixture, make_tokenizer

TARGET = TargetConfig("tests.teaching:blocks", rows=16, width=6, size=32, batch_size=3)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("teacher", "loadings"),
    [("blocks", 2), ("dying", 3)],  # another actor stands in for the dead one
)
def test_actors_make_the_same_shards_and_load_their_teacher_once(
    tmp_path: Path, teacher: str, loadings: int
) -> None:
    mixture = make_mixture(tmp_path / "raw", images=24, text_only=2)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "notes"
    folder.mkdir()
    settings = {"folder": str(folder), "loadings": loadings}
    target = replace(TARGET, teacher=f"tests.teaching:{teacher}", settings=settings, num_workers=2)
    size = 3 * target.image_bytes
    changes = {"targets": {"blocks": target}, "shard_bytes": size}
    on_ray = build(plan_build(build_config(mixture, tmp_path / "ray", tokenizer, **changes)))
    assert len([*folder.glob("loaded-*")]) == loadings
    assert (folder / "died").exists() == (teacher == "dying")
    here = build(
        plan_build(build_config(mixture, tmp_path / "here", tokenizer, **changes)), runner=run_here
    )
    assert len(here.manifest.targets["blocks"].shards) == 8
    assert on_ray.manifest.targets == here.manifest.targets


@pytest.mark.usefixtures("ray_local")
def test_gpus_that_ray_does_not_have_are_one_line(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "raw", images=2, text_only=1)
    target = replace(TARGET, num_gpus=1.0, num_workers=2)
    config = build_config(
        mixture,
        tmp_path / "out",
        make_tokenizer(tmp_path / "tokenizer"),
        targets={"blocks": target},
    )
    said = (
        r"targets: num_workers of tests.teaching:blocks: 2; Ray has 0 GPUs; lower it or add nodes"
    )
    with pytest.raises(DataError, match=said):
        build(plan_build(config))
    assert not [*(tmp_path / "out").rglob("*.arrow")], "before any work"
