"""What every pipeline shares: help, layered recipes, one-line mistakes, bugs that stay visible."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import pipelines.check
import pipelines.generate
import pipelines.preprocess
import pipelines.quickstart
import pipelines.show
import pipelines.train
from lapilli.data.errors import DataError
from lapilli.train.config import RunConfig
from pipelines.cli.command import parse, run, say
from pipelines.cli.settings import QuickstartConfig

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "tiny" / "pretrain.yaml"

DATA = RECIPE.with_name("pretrain_data.yaml")
RUN = f"--config={RECIPE}"
BUILD = [f"--config={DATA}", "--root=r"]


def test_help_tells_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pipelines.train.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--global_batch_size",
        "Samples in one optimizer step",
        "--optim.lr",
        "Peak learning",
    ):
        assert words in text


def test_a_command_without_arguments_takes_the_defaults() -> None:
    assert parse(QuickstartConfig, [], "") == QuickstartConfig()


def test_later_recipes_and_flags_win(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("epochs: 3\noptim: {lr: 0.5}\n", encoding="utf-8")
    paths = ["--dataset=d", "--output=o"]
    config = parse(RunConfig, [f"--config={RECIPE}", f"--config={layer}", *paths], "")
    assert (config.epochs, config.optim.lr, config.global_batch_size) == (3, 0.5, 32)
    flags = ["--epochs=4", "--optim.lr=0.25", *paths]
    config = parse(RunConfig, [f"--config={RECIPE}", f"--config={layer}", *flags], "")
    assert (config.epochs, config.optim.lr) == (4, 0.25)
    assert config.optim.betas == (0.9, 0.98)


def test_the_resolved_config_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipelines.train.main([f"--config={RECIPE}", "--dataset=d", "--output=o", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["vision"]["settings"]["image_size"] == 64


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise DataError("root: no such\nfolder")

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: root: no such folder\n"


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit):
        run(lambda: 0)
    line = warnings.formatwarning("template t:\nodd", UserWarning, "plan.py", 7)
    assert line == "warning: template t: odd\n"


def test_a_bug_keeps_its_traceback() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_brackets_in_a_path_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("dataset: /data/[bold]x")
    assert capsys.readouterr().out == "dataset: /data/[bold]x\n"


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [
        (pipelines.train.main, [RUN, "--dataset=d", "--output=o", "--offload.to=nvme",
            "--zero_stage=3", "--offload.nvme_path=ADDRESS"], "offload.nvme_path"),
        (pipelines.preprocess.main, [*BUILD, "--output=o", "--tokenizer=t",
            "--template=ADDRESS"], "template"),
        (pipelines.check.main, [*BUILD, "--output=ADDRESS"], "output"),
        (pipelines.check.main, ["ADDRESS"], "data"),
        (pipelines.check.main, [*BUILD, "--extra_roots=[a, ADDRESS]"], "extra_roots"),
        (pipelines.generate.main, ["r", "--questions=q", "--images=ADDRESS"], "images"),
        (pipelines.generate.main, ["r", "--question=q", "--image=ADDRESS"], "image"),
        (pipelines.generate.main, ["r", "--questions=q", "--output=ADDRESS"], "output"),
        (pipelines.quickstart.main, ["--output=ADDRESS"], "output"),
        (pipelines.show.main, ["a", "--html=ADDRESS"], "html"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("address", ["s3://bucket/a", "file:///a"])
def test_an_address_is_refused_where_a_path_is_expected(
    main: Callable[[list[str]], int],
    arguments: list[str],
    name: str,
    address: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(lambda: main([word.replace("ADDRESS", address) for word in arguments]))
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {name}: {address!r} is an address; expected a path of this mac")
    assert [*tmp_path.iterdir()] == []


def test_sigterm_is_told_as_ctrl_c_is(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stopped() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return 0

    try:
        with pytest.raises(SystemExit) as ended:
            run(stopped)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"
