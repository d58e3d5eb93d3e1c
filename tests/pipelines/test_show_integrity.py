"""`verify`, `repair` and `report`, as they are typed."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from lapilli.data.building.repair import repair_dataset
from lapilli.data.building.runners import run_here
from lapilli.data.dataset.verify import verify_dataset
from pipelines import repair, report, verify
from pipelines.cli.command import run
from tests.factories import build_dataset, make_mixture, make_tokenizer

SHARD = "images/pad32/00001-*.arrow"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    mixture = make_mixture(folder / "root", defects=True)
    build_dataset(mixture, folder / "out", make_tokenizer(folder / "tokenizer"))
    return folder


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy with a cut shard and a stranger in it."""
    copy = shutil.copytree(made / "out", tmp_path / "out")
    shard = next(copy.glob(SHARD))
    shard.write_bytes(shard.read_bytes()[:-1])
    (copy / "notes.txt").write_text("mine")
    return copy


def test_a_whole_dataset_is_said_to_be_whole(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(made / "out")]) == 0
    assert f"{made / 'out'}: whole (" in capsys.readouterr().out


def test_damage_is_named_with_exit_code_1_and_mended(
    damaged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify.main([str(damaged)]) == 1
    out = capsys.readouterr().out
    assert "1 file damaged" in out
    name = next(damaged.glob(SHARD)).relative_to(damaged)
    assert f"  {name}: cut short\n" in out
    assert "  notes.txt: foreign" in out
    assert f"lapilli repair {damaged}" in out
    monkeypatch.setattr(repair, "repair_dataset", partial(repair_dataset, runner=run_here))
    assert repair.main([str(damaged)]) == 0
    out = capsys.readouterr().out
    assert "1 shard made again" in out
    assert ": whole (" in out
    assert verify_dataset(damaged).is_whole


def test_the_report_is_written_and_is_no_stranger(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(made / "out")]) == 0
    assert (made / "out" / "report.html").is_file()
    assert "report.html" in capsys.readouterr().out
    assert verify_dataset(made / "out").foreign == []


def test_a_users_mistake_is_one_line(
    made: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, arguments, words in (
        (verify.main, [tmp_path / "nowhere"], "no such folder"),
        (verify.main, [made / "out", f"--root={made}"], "--root"),
        (report.main, [tmp_path / "nowhere"], "nowhere"),
        (repair.main, [damaged, f"--root={tmp_path / 'gone'}"], "does not exist; pass --root"),
    ):
        typed = [str(argument) for argument in arguments]
        with pytest.raises(SystemExit) as ended:
            run(partial(main, typed))
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line
