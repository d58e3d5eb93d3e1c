"""What is odd in a mixture is told alike by `check`, the manifest and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.planning.plan import plan_build
from lapilli.data.shards.manifest import Manifest
from pipelines.check import main
from pipelines.reports.dataset_report import write_dataset_report
from pipelines.reports.describe import describe_dataset
from tests.data.chat_templates import MANNERS
from tests.data.test_images_whole import FLAT, SIDE_CHUNKS
from tests.factories import CLIP_MEAN, conversation, image_bytes, make_tokenizer

PNG = image_bytes("png", 50, 33)
FILES = {
    "ramp.png": FLAT["16 bits"],
    "float.tif": FLAT["float of 1"],
    "clear.png": FLAT["black on clear"],
    "side.png": PNG[:33] + SIDE_CHUNKS["zTXt"] + PNG[33:],
    "wide.png": image_bytes("png", 1400, 20),
}


def write_root(root: Path, records: list[Any]) -> Path:
    root.mkdir()
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    (root / "d.json").write_text(json.dumps(records))
    views = {"s": {"size": 24, "fill": list(CLIP_MEAN), "max_pixels": 1400 * 24}}
    recipe = {
        "sources": [{"name": "x", "annotations": "d.json"}],
        "views": views,
        "max_quarantined": 1.0,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def made(root: Path, output: Path, tokenizer: Path, **changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "root": str(root), "output": str(output), "sources": [SourceConfig("x", "d.json")],
        "tokenizer": str(tokenizer), "template": "v1", "max_quarantined": 1.0,
        "views": {"s": ImageSpec(24, CLIP_MEAN, max_pixels=1400 * 24)}, **changes,
    }  # fmt: skip
    config = BuildConfig(**settings)
    manifest = build(plan_build(config), runner=run_here).manifest
    write_dataset_report(output, config)
    return manifest


def test_pixels_that_are_lost_and_side_data_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "root", [conversation(name, name) for name in FILES])
    assert main([f"--config={root / 'recipe.yaml'}", f"--root={root}", "--decode"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "3 images flat_after_conversion" in text
    assert "1 images side_data_ignored" in text
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    out = tmp_path / "out"
    manifest = made(root, out, tokenizer)
    assert manifest.counts["kept"] == len(FILES)
    assert manifest.counts["image_notes"] == {"flat_after_conversion": 3, "side_data_ignored": 1}
    assert "flat_after_conversion" in (out / "report.html").read_text()
    assert "flat_after_conversion 3" in describe_dataset(out).facts["images"]
    spec = replace(ImageSpec(24, CLIP_MEAN), alpha="white", depth="scale")
    other = made(root, tmp_path / "other", tokenizer, views={"s": spec})
    assert other.counts["image_notes"] == {"side_data_ignored": 1}
    assert other.plan["views"] != manifest.plan["views"]
    assert "alpha" not in manifest.views["s"].spec
    assert other.views["s"].spec["alpha"] == "white"


def test_a_turn_that_a_chat_template_refuses_is_told_by_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ruled = conversation("ruled")
    ruled["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    root = write_root(tmp_path / "root", [conversation("a"), ruled, conversation("b")])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["chat_template"] = MANNERS["turns"].source
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    command = [f"--config={root / 'recipe.yaml'}", f"--root={root}", "--template=tokenizer"]
    with pytest.warns(UserWarning, match="its end marker"):
        assert main([*command, f"--tokenizer={tokenizer}"]) == 1
    detail = "the chat template refuses it: no system here"
    assert f"template_refuses 1, first x/ruled: {detail}" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="its end marker"):
        manifest = made(root, tmp_path / "out", tokenizer, template="tokenizer")
    assert manifest.counts["reasons"] == {"template_refuses": 1}
    (row,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert (row["record_id"], row["reason"], row["detail"]) == ("ruled", "template_refuses", detail)


def test_check_asks_for_the_tokenizer_of_a_chat_template(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root", [conversation("a")])
    command = [f"--config={root / 'recipe.yaml'}", f"--root={root}", "--template=tokenizer"]
    with pytest.raises(DataError, match=r"tokenizer: empty, and template tokenizer .* --tokenizer"):
        main(command)
