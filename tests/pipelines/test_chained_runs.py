"""Stages one after another through the commands: what they start from, and what changed below."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines.evaluate
import pipelines.export
import pipelines.train
from lapilli.model.vlm import build_model
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.run_folder.metrics_file import read_metrics
from tests.pipelines.test_train import RECIPE, one_line
from tests.train.saved import saved_weights
from tests.train.small_run import VIEW, small_dataset
from tests.train.tiny import model_config

ROWS = 512
LORA = ["--model.lora.rank=2", "--model.lora.alpha=4", "--model.lora.dropout=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a language model with weights, and a first run with adapters."""
    folder = tmp_path_factory.mktemp("chained")
    dataset = small_dataset(folder, images=10, text_only=6)
    model = model_config("language")
    model.language.settings.update(vocab_size=ROWS)
    build_model(model).language.save_pretrained(folder / "base")
    for file in (dataset / "tokenizer").iterdir():
        shutil.copy(file, folder / "base")
    (folder / "run.yaml").write_text(RECIPE + "launcher: process\n", encoding="utf-8")
    assert train(folder, "first", *LORA, "--max_steps=3") == 0
    return folder


def arguments(folder: Path, name: str, *flags: str) -> list[str]:
    return [
        f"--config={folder / 'run.yaml'}",
        f"--dataset={folder / 'dataset'}",
        f"--output={folder / name}",
        f"--model.language.pretrained={folder / 'base'}",
        "--model.language.settings={}",
        *flags,
    ]


def train(folder: Path, name: str, *flags: str) -> int:
    return pipelines.train.main(arguments(folder, name, *flags))


def words(capsys: pytest.CaptureFixture[str]) -> str:
    """All that was said; a terminal's width breaks lines."""
    return " ".join(" ".join(capsys.readouterr()).split())


def test_adapters_after_adapters_begin_where_the_first_ended(place: Path) -> None:
    start = [f"--init_from={place / 'first'}", "--max_steps=1"]
    others = {
        "alpha": [*LORA, "--model.lora.alpha=64"],
        "rank": [*LORA, "--model.lora.rank=5", "--model.lora.target=q_proj"],
        "whole": [],
        "rows": [*LORA, f"--model.language.vocab_size={ROWS + 8}"],
    }
    losses: dict[str, float] = {}
    for name, flags in others.items():
        assert train(place, name, *flags, *start) == 0
        losses[name] = read_metrics(place / name)[0].loss
    for name in ("alpha", "rank"):
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-6)
    assert losses["rows"] == pytest.approx(losses["whole"], rel=1e-2)  # eight more to choose from
    found = latest_checkpoint(place / "rows")
    assert found is not None
    rows = saved_weights(found.path)["language.added_rows.head"]
    mean = load_file(place / "base" / "model.safetensors")["lm_head.weight"].mean(0)
    assert rows.shape == (8, len(mean))
    assert (rows - mean).abs().max() > 1e-4  # each was the mean, and has learnt


def test_a_base_that_changed_below_a_run_is_refused_by_every_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    for name in ("dataset", "run.yaml"):
        (tmp_path / name).symlink_to(place / name)
    assert train(tmp_path, "run", *LORA, "--max_steps=2") == 0
    run = tmp_path / "run"
    asks = [f"--run={run}", f"--dataset={tmp_path / 'dataset'}", f"--view={VIEW}"]
    assert pipelines.evaluate.main(asks) == 0
    path = tmp_path / "base" / "model.safetensors"
    torch.manual_seed(1)
    moved = {key: v + 0.05 * torch.randn(v.shape) for key, v in load_file(path).items()}
    save_file(moved, path, metadata={"format": "pt"})
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    refused = (
        f"frozen weights: language.pretrained {tmp_path / 'base'} has changed since (language."
    )
    more = arguments(tmp_path, "run", *LORA, "--max_steps=4")
    second = arguments(tmp_path, "second", *LORA, f"--init_from={run}")
    for main, flags in (
        (pipelines.evaluate.main, asks),
        *(
            (pipelines.export.main, [str(run), f"--to={form}", f"--output={tmp_path / form}"])
            for form in ("hf", "llava", "peft")
        ),
        (pipelines.train.main, more),
        (pipelines.train.main, second),
    ):
        line = one_line(main, flags, capsys)
        assert refused in line, line
        assert str(run) in line
    assert not any((tmp_path / form).exists() for form in ("hf", "llava", "peft", "second"))
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == before


def test_more_epochs_are_said_and_the_run_is_finished_after_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place, "longer", "--epochs=1") == 0
    done = len(read_metrics(place / "longer"))
    capsys.readouterr()
    assert train(place, "longer", "--epochs=2") == 0
    said = words(capsys)
    assert f"epochs: 1 before, now 2: the {done} steps that are taken keep their learning" in said
    assert [row.step for row in read_metrics(place / "longer")] == list(range(2 * done))
    assert train(place, "longer", "--epochs=2") == 0
    assert f"already finished at step {2 * done}" in words(capsys)
    line = one_line(pipelines.train.main, arguments(place, "longer", "--epochs=1"), capsys)
    assert f"epochs: 1 makes {done} steps" in line
    assert json.loads((place / "longer" / "config.json").read_text())["epochs"] == 2
