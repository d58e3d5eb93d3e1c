"""The preprocess command: the same bytes with one worker and two, and mistakes as one line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lapilli.data.config import MixtureConfig
from pipelines.cli.command import run
from pipelines.preprocess import main, print_report
from tests.factories import CLIP_MEAN, Mixture, build_dataset, make_mixture, make_tokenizer

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Command:
    """A recipe and the flags that go with it, in a folder of its own."""

    folder: Path
    mixture: Mixture

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def flags(self, **changes: object) -> list[str]:
        """`--flag=value`, `changes` among them; None leaves a flag out."""
        flags: dict[str, object] = {
            "config": self.folder / "recipe.yaml",
            "root": self.mixture.root,
            "output": self.output,
            "tokenizer": self.folder / "tokenizer",
            "max_quarantined": 1.0,
            **changes,
        }
        return [f"--{name}={value}" for name, value in flags.items() if value is not None]


RECIPE = f"""
sources:
  - name: made_up
    annotations: mixture.json
    images: images
    aliases: {{spelt_so: spelt_otherwise}}
template: v1
views:
  pad32: {{size: 32, fill: {list(CLIP_MEAN)}, max_pixels: 10000000}}
  crop24: {{size: 24, fill: {list(CLIP_MEAN)}, aspect: crop, resizer: pillow, max_pixels: 99999}}
records_per_shard: 8
shard_bytes: {5 * 32 * 32 * 3}
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("preprocess")
    make_tokenizer(folder / "tokenizer")
    (folder / "recipe.yaml").write_text(RECIPE)
    return Command(folder, make_mixture(folder / "root", images=30, defects=True))


def hashes(output: Path) -> dict[str, str]:
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*.arrow"))
    }


# ---- the same bytes ----------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_local")
def test_one_worker_and_two_write_the_same_bytes_as_this_process(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, dict[str, str]] = {}
    for workers in (1, 2):
        output = command.folder / f"out{workers}"
        assert main(command.flags(output=output, num_workers=workers)) == 0
        found[f"{workers} workers"] = hashes(output)
    said = " ".join(capsys.readouterr().out.split())  # as wide as the terminal
    build_dataset(command.mixture, command.folder / "out0", command.folder / "tokenizer")
    found["this process"] = hashes(command.folder / "out0")
    assert len(found["this process"]) > 15
    assert found["1 workers"] == found["2 workers"] == found["this process"]
    total = len(command.mixture.expected)
    bad = sum(reason is not None for reason in command.mixture.expected.values())
    assert f"read {total} = kept {total - bad} + quarantined {bad} (" in said
    assert "repaired: alias 1, case 1, extension 1" in said


@pytest.mark.usefixtures("ray_local")
def test_a_second_run_reuses_every_shard(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    output = command.folder / "again"
    main(command.flags(output=output))
    before = hashes(output)
    victim = next((output / "images").rglob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-1])
    capsys.readouterr()
    main(command.flags(output=output))
    assert f"1 shards built, {len(before) - 3} reused" in capsys.readouterr().out
    assert hashes(output) == before


# ---- mistakes ----------------------------------------------------------------------------------


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def recipe_with(old: str, new: str) -> Callable[[Command], dict[str, object]]:
    """The recipe with one change."""

    def change(command: Command) -> dict[str, object]:
        assert old in RECIPE
        name = hashlib.sha256(new.encode()).hexdigest()[:8]
        return {"config": write(command.folder / f"{name}.yaml", RECIPE.replace(old, new))}

    return change


def annotation_file(content: str) -> Callable[[Command], dict[str, object]]:
    """A root whose annotation file is this."""

    def change(command: Command) -> dict[str, object]:
        name = hashlib.sha256(content.encode()).hexdigest()[:8]
        root = command.folder / f"root_{name}"
        write(root / "mixture.json", content)
        (root / "images").mkdir(exist_ok=True)
        return {"root": root}

    return change


MISTAKES: dict[str, tuple[Callable[[Command], dict[str, object]], list[str]]] = {
    "missing root": (lambda _: {"root": "/nowhere"}, ["/nowhere does not exist", "--root"]),
    "root is empty": (
        lambda c: {"root": write(c.folder / "empty" / "x", "").parent},
        ["empty/images does not exist", "check --root"],
    ),
    "no annotations": (
        recipe_with("mixture.json", "lost.json"),
        ["lost.json: No such file", "check --root"],
    ),
    "web page for JSON": (
        annotation_file("<!DOCTYPE html>"),
        ["mixture.json", "web page: download the raw file"],
    ),
    "truncated JSON": (
        annotation_file('[{"id": "a", "conversations": []}, {"id'),
        ["mixture.json is no valid JSON after 1 records", "download or write it again"],
    ),
    "empty array": (annotation_file("[]"), ["mixture.json holds no record", "check the file"]),
    "nothing kept": (
        annotation_file(json.dumps([{"id": "only"}])),
        ["1 of 1 records quarantined, nothing is kept", "first made_up/only", "fix the input"],
    ),
    "over max_quarantined": (
        lambda _: {"max_quarantined": 0.01},
        ["over max_quarantined 0.01", "schema 7", "raise --max_quarantined"],
    ),
    "default max_quarantined": (
        lambda _: {"max_quarantined": None},
        ["over max_quarantined 0.01", "raise --max_quarantined"],
    ),
    "share in percent": (
        lambda _: {"max_quarantined": 30},
        ["max_quarantined: 30", "a share from 0 to 1"],
    ),
    "unknown tokenizer folder": (
        lambda _: {"tokenizer": "/nowhere/tok"},
        ["/nowhere/tok does not exist", "check --tokenizer"],
    ),
    "unknown tokenizer name": (
        lambda _: {"tokenizer": "nobody/nothing"},
        ["tokenizer 'nobody/nothing' could not be loaded", "give a folder"],
    ),
    "folder without tokenizer": (
        lambda c: {"tokenizer": c.mixture.root},
        ["holds no tokenizer", "tokenizer.json"],
    ),
    "unknown template": (
        lambda _: {"template": "v7"},
        ["template 'v7' is unknown", "plain, qwen_vl"],
    ),
    "unknown recipe key": (
        recipe_with("records_per_shard:", "records_per_shart:"),
        ["records_per_shart"],
    ),
    "unknown key in a view": (recipe_with("size: 32", "sise: 32"), ["sise"]),
    "wrong type": (recipe_with("records_per_shard: 8", "records_per_shard: many"), ["many"]),
    "wrong type in a view": (recipe_with("size: 32", "size: big"), ["big"]),
    "wrong choice": (recipe_with("aspect: crop", "aspect: cut"), ["cut"]),
    "unknown flag": (lambda _: {"tokeniser": "x"}, ["tokeniser"]),
    "no recipe": (lambda _: {"config": "/nowhere.yaml"}, ["/nowhere.yaml"]),
    "nothing to read": (lambda _: {"config": None}, ["sources"]),
    "output is a file": (
        lambda c: {"output": write(c.folder / "a_file", "precious")},
        ["a_file is a file", "choose another --output"],
    ),
    "output holds something": (
        lambda c: {"output": write(c.folder / "full" / "thesis", "precious").parent},
        ["full is not empty and no dataset", "choose another --output"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    command: Command, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, parts = MISTAKES[name]
    flags = command.flags(**change(command))
    files = {path for path in command.folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        run(lambda: main(flags))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert not command.output.exists()
    assert {path for path in command.folder.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("name", ["missing root", "unknown recipe key"])
def test_from_outside_a_mistake_is_exit_code_2(command: Command, name: str) -> None:
    change, parts = MISTAKES[name]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.preprocess", *command.flags(**change(command))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in parts)
    assert not command.output.exists()


# ---- what is told ------------------------------------------------------------------------------


def test_a_blend_is_told_with_its_true_shares(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = MixtureConfig(epochs={"made_up": 0.5}, held_out=4)
    tokenizer = command.folder / "tokenizer"
    report = build_dataset(command.mixture, tmp_path / "out", tokenizer, mixture=settings)
    print_report(report)
    facts = report.manifest.mixture["sources"]["made_up"]
    told = capsys.readouterr().out
    assert f"an epoch: {facts['records']} records, {facts['tokens']} tokens, 4 held out" in told
    assert f"made_up: 100.00% of the records, {facts['records']} records (0.5" in told
    whole = build_dataset(command.mixture, tmp_path / "whole", tokenizer)
    print_report(whole)
    assert "an epoch" not in capsys.readouterr().out
