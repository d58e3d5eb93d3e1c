"""The check command: no recipe needed, every verdict, an exit code, rows for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.check import CheckConfig, find_published, main
from pipelines.cli.command import run
from tests.data.test_archives import write_zip
from tests.e2e.test_mini_mixture import RECIPES, STAGES, expected_verdicts
from tests.factories import conversation, image_bytes


def write_root(root: Path, *, captions: str | None = None, instructions: bool = True) -> Path:
    """A root as LLaVA's README lays it out; captions in a folder of their own or beside."""
    root.mkdir(parents=True)
    if instructions:
        put(root / "coco" / "train2017" / "1.jpg")
        records = [conversation("a", "coco/train2017/1.jpg"), conversation("b")]
        (root / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    if captions is not None:
        folder = root / captions
        put(folder / "images" / "00000" / "1.jpg")
        records = [conversation("c", "00000/1.jpg")]
        (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
    return root


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes("jpeg"))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("captions", "instructions", "sources"),
    [
        (None, True, {"llava_v1_5_mix665k"}),
        ("LLaVA-Pretrain", False, {"blip_laion_cc_sbu_558k"}),
        ("", False, {"blip_laion_cc_sbu_558k"}),
        ("LLaVA-Pretrain", True, {"llava_v1_5_mix665k", "blip_laion_cc_sbu_558k"}),
    ],
)
def test_without_a_recipe_it_finds_what_lies_in_the_root(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    captions: str | None,
    instructions: bool,
    sources: set[str],
) -> None:
    root = write_root(tmp_path / "root", captions=captions, instructions=instructions)
    found = find_published(CheckConfig(root=str(root)))
    assert {source.name for source in found.sources} == sources
    assert main([f"--root={root}", "--decode"]) == 0
    text = said(capsys)
    assert "0 with a problem" in text
    assert "a build of clip336_" in text
    assert all(name in text for name in sources)


def test_an_archive_unextracted_is_as_good_as_a_folder(tmp_path: Path) -> None:
    root = write_root(tmp_path / "root")
    shutil.rmtree(root / "coco" / "train2017")
    write_zip(root / "coco" / "train2017.zip", {"train2017/1.jpg": image_bytes("jpeg")})
    assert main([f"--root={root}", "--decode"]) == 0


def test_a_missing_archive_is_named_with_the_command_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "root")
    shutil.rmtree(root / "coco")
    assert main([f"--root={root}"]) == 1
    text = said(capsys)
    assert "image_missing 1, first llava_v1_5_mix665k/a" in text
    assert f"wget -c -O {root}/coco/train2017.zip http://images.cocodataset.org/" in text


def test_images_that_are_not_there_do_not_stop_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "LLaVA-Pretrain", captions="", instructions=False)
    shutil.rmtree(root / "images")
    assert main([f"--root={root}"]) == 1
    assert f"wget -c -O {root}/images.zip https://huggingface.co/" in said(capsys)


@pytest.mark.parametrize("stage", STAGES)
def test_every_verdict_of_the_planted_mixture(
    fixtures_dir: Path, tmp_path: Path, stage: str
) -> None:
    """The same as the build gives, without building: verdicts by id in the rows written."""
    output = tmp_path / "problems.parquet"
    expected = expected_verdicts(fixtures_dir, stage)
    bad = {name: reason for name, reason in expected.items() if reason is not None}
    code = main(
        [
            f"--config={RECIPES / STAGES[stage]}.yaml",
            f"--root={fixtures_dir / 'mini_mixture' / stage}",
            f"--output={output}",
            "--decode",
        ]
    )
    assert code == (1 if bad else 0)
    rows: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    assert {row["sample_id"].partition("/")[2]: row["reason"] for row in rows} == bad
    assert all(row["detail"] and json.loads(row["record"]) for row in rows)


MISTAKES = {
    "no root": (["--root=/nowhere"], "/nowhere does not exist"),
    "nothing in the root": ([], "wget -c"),
    "no such recipe": (["--config=/nowhere.yaml"], "/nowhere.yaml"),
    "broken file": (["--broken"], "no valid JSON"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags, words = MISTAKES[name]
    root = tmp_path / "root"
    root.mkdir()
    if "--broken" in flags:
        (root / "llava_v1_5_mix665k.json").write_text('[{"id": 1}, {')
        flags = []
    with pytest.raises(SystemExit) as caught:
        run(lambda: main([f"--root={root}", *flags]))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
