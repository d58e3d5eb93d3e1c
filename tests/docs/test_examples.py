"""The examples of `docs/examples.md` are those of `docs/examples/`, run, and print what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lapilli.data.config import MixtureConfig
from lapilli.data.images.view import ImageSpec
from lapilli.train.config import RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.run_folder.metrics_file import StepMetrics
from pipelines.cli.command import parse
from tests.docs.pages import DOCS, Block, blocks, sections
from tests.factories import CLIP_MEAN, build_dataset, make_mixture, make_tokenizer

PAGE = "examples.md"
FILES = sorted(path for path in (DOCS / "examples").iterdir() if path.is_file())


def shown() -> dict[str, list[Block]]:
    """The blocks of each section, by the name of the file that it shows."""
    found: dict[str, list[Block]] = {}
    for text in sections(PAGE, 2).values():
        of_section = blocks(text)
        found |= {block.title: of_section for block in of_section if block.title}
    return found


def test_the_page_shows_the_files_as_they_are() -> None:
    assert shown().keys() == {path.name for path in FILES}
    for path in FILES:
        (block,) = [one for one in shown()[path.name] if one.title == path.name]
        assert block.text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [path.name for path in FILES if path.suffix == ".py"], ids=lambda name: name[:-3]
)
def test_an_example_prints_what_the_page_says(name: str, tmp_path: Path) -> None:
    search = os.pathsep.join([str(DOCS / "examples"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(DOCS / "examples" / name)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": search.rstrip(os.pathsep)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (expected,) = [block.text for block in shown()[name] if block.language == "text"]
    if name == "torch_loop.py":  # a loss may differ in its last digits elsewhere
        said, told = (re.findall(r"[\d.]+", text) for text in (done.stdout, expected))
        assert said[0] == told[0]
        assert float(said[1]) == pytest.approx(float(told[1]), abs=0.5)
        assert float(said[2]) < 0.2
    else:
        assert done.stdout == expected


def test_three_changes_have_three_effects(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "raw", images=24)
    views = {"square64": ImageSpec(64, CLIP_MEAN)}
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    held_out = MixtureConfig(held_out=4)
    build_dataset(mixture, tmp_path / "dataset", tokenizer, views=views, mixture=held_out)
    before = run_of(tmp_path, "before")
    after = run_of(tmp_path, "after", DOCS / "examples" / "three_changes.yaml")
    rates = [[row.lr or 0.0 for row in rows] for rows in (before, after)]
    assert max(rates[0]) == pytest.approx(0.002)
    assert rates[0][-1] < 0.002
    assert rates[1][-1] == max(rates[1]) == pytest.approx(0.0005)
    assert trained(tmp_path / "before", "vision") > 0
    assert trained(tmp_path / "after", "vision") == 0
    assert [row.held_out_loss is not None for row in before] == [False] * 4
    assert [row.held_out_loss is not None for row in after] == [False, True, False, True]


def run_of(folder: Path, name: str, *layers: Path) -> list[StepMetrics]:
    """Four steps by the recipe and layers on it, on a CPU."""
    words = ["--config=own_data/tiny", *(f"--config={layer}" for layer in layers)]
    words += [f"--dataset={folder / 'dataset'}", f"--output={folder / name}", "--device=cpu"]
    words += ["--global_batch_size=4", "--micro_batch_size=4", "--max_steps=4"]
    return launch(preflight(parse(RunConfig, words, "")))


def trained(run: Path, part: str) -> int:
    """Numbers of a part that learn."""
    return json.loads((run / "facts.json").read_text())["parameters"][part][1]
