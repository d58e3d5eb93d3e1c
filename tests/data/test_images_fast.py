"""How far mode `fast` is off is measured on a view's first images and stands in the manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.mounts import read_image
from lapilli.data.planning import describe_shards
from lapilli.data.planning.plan import plan_build
from tests.factories import CLIP_MEAN, build_config, image_bytes, make_mixture, make_tokenizer

FAST = ImageSpec(24, CLIP_MEAN, mode="fast", resizer="torch", max_pixels=10_000_000)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    mixture = make_mixture(tmp_path / "root", images=16, defects=True)
    for number, path in enumerate(sorted((tmp_path / "root" / "images").glob("*/*_jpeg.jpeg"))):
        path.write_bytes(image_bytes("jpeg", 160 + number, 90, seed=number))  # worth scaling
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    views = {"fast": FAST, "exact": replace(FAST, mode="exact")}
    return build_config(mixture, tmp_path / "out", tokenizer, views=views)


@pytest.mark.parametrize("compared", [7, 1000])
def test_the_error_is_that_of_the_first_images(
    config: Any, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe_shards, "COMPARED", compared)
    planned = plan_build(config)
    manifest = build(planned, runner=run_here).manifest
    tasks = [task for task in planned.image_tasks() if task.spec.mode == "fast"]
    places = [place for task in tasks for place in task.images][:compared]
    apart: list[Any] = []
    for place in places:
        data = read_image(Path(config.root), place)
        try:
            fast, exact = (prepare(data, replace(FAST, mode=mode)) for mode in ("fast", "exact"))
        except BadImage:  # planted defects
            continue
        apart.append(fast.astype(float) - exact)
    difference = np.stack(apart)
    facts = manifest.views["fast"].fast_error
    assert facts["worst"] == np.abs(difference).max() > 0
    assert facts["mean"] == pytest.approx(np.abs(difference).mean(), abs=1e-4)
    assert facts["psnr"] == pytest.approx(10 * np.log10(255**2 / (difference**2).mean()), abs=0.01)
    assert manifest.views["exact"].fast_error == {}
