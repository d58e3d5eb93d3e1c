"""`show`: what a dataset and a run are, told from their folders; conversations as trained."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lapilli.data.building.driver import BuildReport
from lapilli.data.io.printable import bytes_text
from lapilli.data.text.token_text import Piece
from pipelines.cli import command
from pipelines.cli.command import run
from pipelines.cli.conversation import print_transcript
from pipelines.reports.describe import describe_dataset, describe_run
from pipelines.reports.ticks import duration_text
from pipelines.show import main
from tests.browser import Chromium
from tests.factories import Mixture, build_dataset, make_mixture, make_tokenizer
from tests.train.small_run import small_run


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return make_mixture(tmp_path_factory.mktemp("raw"), images=12, defects=True)


@pytest.fixture(scope="module")
def built(mixture: Mixture, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildReport]:
    folder = tmp_path_factory.mktemp("show")
    tokenizer = make_tokenizer(folder / "tokenizer")
    return folder / "dataset", build_dataset(mixture, folder / "dataset", tokenizer)


@pytest.fixture
def unfinished(built: tuple[Path, BuildReport], tmp_path: Path) -> Path:
    """A run that was stopped after 3 of 14 steps, its last line cut short."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(small_run(built[0], folder))))
    facts = {
        "total_steps": 14,
        "samples": 50,
        "too_long": 2,
        "device": "cpu",
        "image_tokens": 4,
        "parameters": {"vision": [1000, 0], "language": [2000, 2000], "projector": [30, 30]},
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    row = {"samples": 8, "trained_tokens": 40, "seconds": 0.5, "wait_seconds": 0.1}
    rows = [{"step": step, "loss": 6.0 - step, **row} for step in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 3, "lo')
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_a_datasets_counts_are_those_of_the_mixture(
    mixture: Mixture, built: tuple[Path, BuildReport]
) -> None:
    verdicts = Counter(mixture.expected.values())
    kept = verdicts.pop(None)
    described = describe_dataset(built[0])
    read = len(mixture.expected)
    share = f"{(read - kept) / read:.1%}"
    told = (f"{read} read", f"{kept} kept", f"{read - kept} quarantined ({share})")
    assert described.facts["records"] == told
    reasons = {f"{reason} {count}" for reason, count in verdicts.items()}
    assert set(described.facts["quarantined"]) == reasons
    (source,) = described.sources
    assert (source.name, source.read, source.kept) == ("made_up", read, kept)
    assert set(source.reasons) == reasons
    size = sum(file.stat().st_size for file in (built[0] / "images/pad32").glob("*.arrow"))
    assert bytes_text(size) in described.facts["view pad32"]
    assert "resizer pillow" in described.facts["view crop24"][-1]


def test_the_table_fits_a_terminal_of_80_columns(
    built: tuple[Path, BuildReport],
    unfinished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command.console, "width", 80)
    out = printed(capsys, built[0], unfinished, unfinished)
    assert max(map(len, out.splitlines())) <= 80
    for words in ("pad32", "template", "versions", "schema 7", "not finished", "3 of 14 steps"):
        assert words in out


def test_an_unfinished_run_says_how_far_it_came(unfinished: Path) -> None:
    facts = describe_run(unfinished).facts
    assert facts["state"][:2] == ("not finished", "3 of 14 steps (21.4%)")
    assert facts["loss"] == ("6.0000 at step 1", "4.0000 at step 3")
    assert facts["speed"] == ("16.0 samples/s", "2 s of steps", "20.0% waiting for data")
    assert facts["parameters"] == (
        "vision 1,000 frozen",
        "projector 30 trained",
        "language 2,000 trained",
    )
    assert facts["global batch"] == ("8 samples", "2 workers x 2 x 2")
    assert facts["checkpoints"] == ("none",)
    (unfinished / "mistake.txt").write_text("loss nan;\nlower lr")
    assert describe_run(unfinished).facts["state"] == (
        "stopped",
        "3 of 14 steps",
        "loss nan; lower lr",
    )
    (unfinished / "metrics.jsonl").unlink()
    (unfinished / "mistake.txt").unlink()
    assert describe_run(unfinished).facts["state"] == ("not a step done",)


def answers_of(mixture: Mixture) -> dict[str, list[str]]:
    records = json.loads((mixture.root / "mixture.json").read_text(encoding="utf-8"))
    return {
        f"made_up/{record['id']}": [
            said["value"] for said in record["conversations"] if said["from"] == "gpt"
        ]
        for record in records
        if isinstance(record, dict) and str(record.get("id", "")).startswith(("image-", "text-"))
    }


def test_samples_show_each_answer_in_brackets(
    mixture: Mixture,
    built: tuple[Path, BuildReport],
    unfinished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = answers_of(mixture)
    for folder, image in ((built[0], "<image 32 px>"), (unfinished, "<image 4 tokens>")):
        out = printed(capsys, folder, "--samples=1000")
        blocks = re.findall(r"^(made_up/\S+): .*, (\d) images?\n(.*(?:\n.+)*)", out, re.MULTILINE)
        compared = 0
        for name, images, text in blocks:
            assert text.count(image) == int(images)
            if name in answers:
                assert re.findall(r"\[\[ (.*?)</s>\]\]", text) == answers[name]
                compared += 1
        assert compared == len(answers) == 16


def rendered(pieces: list[Piece], *, tokens: bool = False, **options: Any) -> str:
    file = io.StringIO()
    print_transcript(pieces, tokens=tokens, console=Console(file=file, width=40, **options))
    return file.getvalue()


def test_colour_where_there_is_colour_and_brackets_elsewhere() -> None:
    pieces = [Piece("Why?", "text", False, (1,)), Piece(" So", "text", True, (2,))]
    assert rendered(pieces) == "Why?[[ So]]\n"
    assert rendered(pieces, force_terminal=True, no_color=True) == "Why?[[ So]]\n"
    coloured = rendered(pieces, force_terminal=True, color_system="standard")
    assert coloured == "Why?\x1b[1;32m So\x1b[0m\n"


def test_tokens_are_parted_by_bars_or_underlines() -> None:
    said = [("Wh", False), ("y?", False), (" S", True), ("o", True)]
    pieces = [Piece(text, "text", trained, (i,)) for i, (text, trained) in enumerate(said)]
    assert rendered(pieces, tokens=True) == "Wh|y?[[ S|o]]\n"
    coloured = rendered(pieces, tokens=True, force_terminal=True, color_system="standard")
    assert coloured == "Wh\x1b[4my?\x1b[0m\x1b[1;32m S\x1b[0m\x1b[1;4;32mo\x1b[0m\n"


def test_nothing_of_a_long_text_is_cut_in_a_file() -> None:
    text = "word " * 500 + "x" * 500
    assert rendered([Piece(text, "text", False, (1,))]) == text + "\n"


def test_a_text_cannot_steer_the_terminal() -> None:
    text = "\x1b[2J\x07a\r\nb\u202e [red]c[/red]"
    out = rendered([Piece(text, "text", True, (1,))], force_terminal=True, no_color=True)
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out  # noqa: PT018
    assert r"\x1b[2J\x07a\r↵" "\n" r"b\u202e" in out
    assert "[red]c[/red]" in out


def test_the_page_is_fit_to_be_read(
    built: tuple[Path, BuildReport],
    unfinished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    chromium: Chromium,
) -> None:
    page = tmp_path / "show.html"
    printed(capsys, built[0], unfinished, "--samples=4", "--tokens", f"--html={page}")
    assert chromium.problems(page) == []


def test_the_page_marks_what_is_trained(
    built: tuple[Path, BuildReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "show.html"
    printed(capsys, built[0], "--samples=3", f"--html={page}")
    text = page.read_text(encoding="utf-8")
    assert text.count('<figure class="transcript card">') == 3
    assert text.count('<mark class="special">&lt;/s&gt;</mark>') >= 3
    assert "data:image/png;base64," in text


def test_a_users_mistake_is_one_line(
    built: tuple[Path, BuildReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "plan.json").write_text("{}")
    other = tmp_path / "[bold]other"
    other.mkdir()
    (other / "config.json").write_text("[1]")
    for arguments, words in (
        ([tmp_path / "nowhere"], "no such folder; expected the --output of"),
        ([other], "[bold]other: neither a dataset nor a run"),
        ([begun], "an unfinished build: run the same preprocess again"),
        ([built[0], "--samples=-1"], "samples: -1; expected 0 or more"),
        ([built[0], "--samples=1", "--view=big"], "view: 'big' is not in"),
        ([], "folders"),
        ([built[0], "--nothing"], "--nothing"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(lambda told=arguments: main([str(argument) for argument in told]))
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), line
        assert words in line


def test_a_damaged_folder_is_one_line(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (unfinished / "metrics.jsonl").write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(SystemExit):
        run(lambda: main([str(unfinished)]))
    assert "metrics.jsonl: damaged" in capsys.readouterr().err


def test_it_can_be_piped_into_head(built: tuple[Path, BuildReport]) -> None:
    ended = subprocess.run(
        f"{sys.executable} -m pipelines.show {built[0]} --samples 40 | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert "Traceback" not in ended.stderr


def test_numbers_are_told_in_words() -> None:
    assert [bytes_text(n) for n in (0, 999, 1000, 17_154, 189_300_000_000, 2e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "17.2 kB",
        "189.3 GB",
        "2000.0 TB",
    ]
    assert [duration_text(s) for s in (12, 210, 7600, 400_000)] == [
        "12 s",
        "3.5 min",
        "2.1 h",
        "5 days",
    ]
