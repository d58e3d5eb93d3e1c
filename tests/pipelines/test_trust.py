"""Code runs because of a command or a recipe that the user names, and not of a folder's own files.

Each folder here asks for code that leaves a file behind when it is run.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipelines.chat
import pipelines.evaluate
import pipelines.export
import pipelines.generate
import pipelines.repair
import pipelines.replay
import pipelines.report
import pipelines.show
import pipelines.train
from lapilli.data.errors import DataError
from lapilli.data.registry import load_named
from lapilli.data.sources import SOURCES, Source
from lapilli.data.trust import Trust
from lapilli.model.errors import ModelError
from lapilli.model.registry import load_builder
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.run_folder.settings import read_run_config
from lapilli.train.worker.compatibility import build_start
from pipelines.cli.command import run
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.pipelines.test_train import RECIPE
from tests.train.small_run import VIEW

MARK = "the code was run"
LEAVES = f"import os, pathlib\npathlib.Path(os.environ['LEFT_BY_CODE']).write_text({MARK!r})\n"
REMOTE = (
    LEAVES
    + "from transformers import PretrainedConfig\n"
    + "class Config(PretrainedConfig):\n    model_type = 'planted'\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a run of one step on it, which was kept for a replay."""
    folder = tmp_path_factory.mktemp("made")
    mixture = make_mixture(folder / "raw", images=6, text_only=2)
    build_dataset(mixture, folder / "data", make_tokenizer(folder / "tokenizer"))
    (folder / "run.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [f"--config={folder / 'run.yaml'}", f"--dataset={folder / 'data'}"]
    flags = ["--launcher=process", f"--output={folder / 'run'}", "--max_steps=1"]
    assert pipelines.train.main([*arguments, *flags]) == 0
    kept = folder / "run" / "replay" / "step-00000000"
    kept.mkdir(parents=True)
    step = {"step": 0, "loss": 1.0, "grad_norm": 1.0, "global_tokens": 1}
    (kept / "step.json").write_text(json.dumps({**step, "sample_indices": [], "sample_ids": []}))
    return folder


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What planted code writes; the working folder is another one, and empty."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("LEFT_BY_CODE", str(tmp_path / "left"))
    return tmp_path / "left"


def planted_run(made: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the run whose own settings were changed."""
    shutil.copytree(made / "run", folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["model"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_remote_code(made: Path, folder: Path) -> Path:
    """A run whose language model comes with code of its own."""
    weights = folder.with_name("weights")
    weights.mkdir()
    described = {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Config"}}
    (weights / "config.json").write_text(json.dumps(described))
    (weights / "planted.py").write_text(REMOTE)

    def change(model: dict[str, Any]) -> None:
        model["language"] |= {"pretrained": str(weights), "trust_remote_code": True}

    return planted_run(made, folder, change)


def refused(
    main: Callable[[Sequence[str]], int],
    arguments: Sequence[object],
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(lambda: main([str(word) for word in arguments]))
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(said) == 1, said
    return said[0]


def verbs(made: Path, opened: Path, folder: Path) -> dict[str, tuple[Any, list[object]]]:
    """Every verb that builds a run's model, with its arguments."""
    return {
        "generate": (pipelines.generate.main, [opened, "--question=hi", "--device=cpu"]),
        "chat": (pipelines.chat.main, [opened, "--device=cpu", "--port=0"]),
        "evaluate": (
            pipelines.evaluate.main,
            [f"--run={opened}", f"--dataset={made / 'data'}", f"--view={VIEW}", "--device=cpu"],
        ),
        "export hf": (pipelines.export.main, [opened, "--to=hf", f"--output={folder / 'hf'}"]),
        "export llava": (pipelines.export.main, [opened, "--to=llava", f"--output={folder / 'l'}"]),
        "replay": (pipelines.replay.main, [f"{opened / 'replay' / 'step-00000000'}"]),
    }


VERBS = ["generate", "chat", "evaluate", "export hf", "export llava", "replay"]


@pytest.mark.parametrize("verb", VERBS)
def test_code_beside_weights_is_not_run_because_a_run_says_so(
    made: Path, tmp_path: Path, left: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = with_remote_code(made, tmp_path / "run")
    main, arguments = verbs(made, opened, tmp_path)[verb]
    said = refused(main, arguments, capsys)
    assert "model.language.trust_remote_code" in said
    assert str(tmp_path / "weights") in said
    assert said.endswith("pass --trust_remote_code")
    assert not left.exists()


def test_the_commands_flag_allows_it(
    made: Path, tmp_path: Path, left: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = with_remote_code(made, tmp_path / "run")
    main, arguments = verbs(made, opened, tmp_path)["generate"]
    said = refused(main, [*arguments, "--trust_remote_code"], capsys)
    assert "language.pretrained" in said  # the code was read; there are no weights beside it
    assert left.read_text() == MARK


@pytest.mark.parametrize("verb", VERBS)
def test_towers_and_projectors_of_its_own_are_not_imported(
    made: Path,
    tmp_path: Path,
    left: Path,
    verb: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted_parts.py").write_text(LEAVES + "def made(*sizes): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def change(model: dict[str, Any]) -> None:
        model["projector"] = "planted_parts:made"
        model["vision"] |= {"tower": "planted_parts:tower", "allow_pickle": True}
        model["language"]["attention"] = "somebody/kernel"

    opened = planted_run(made, tmp_path / "run", change)
    main, arguments = verbs(made, opened, tmp_path)[verb]
    said = refused(main, arguments, capsys)
    for asked in ("model.projector", "model.vision.tower", "somebody/kernel", "allow_pickle"):
        assert asked in said
    flags = "--trust_remote_code --allow_pickle --allow_code planted_parts:tower,planted_parts:made"
    assert said.endswith(f"pass {flags}")
    assert not left.exists()


def test_names_that_the_command_allows_are_imported_and_no_others(
    made: Path, tmp_path: Path, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    code = LEAVES + "def made(inputs, outputs):\n    from torch import nn\n"
    layer = "    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), "
    (tmp_path / "modules" / "planted_projector.py").write_text(
        f"{code}{layer}nn.Linear(outputs, outputs))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    name = "planted_projector:made"

    def change(model: dict[str, Any]) -> None:
        model["projector"] = name

    opened = planted_run(made, tmp_path / "run", change)
    with pytest.raises(TrainError, match=f"--allow_code {name}"):
        load_trained(opened, trust=Trust(code=frozenset({"planted_projector:other"})))
    assert not left.exists()
    assert load_trained(opened, trust=Trust(code=frozenset({name}))).step == 1
    assert left.read_text() == MARK


def test_a_start_from_somebody_elses_run_trusts_the_users_recipe_alone(
    made: Path, tmp_path: Path, left: Path
) -> None:
    opened = with_remote_code(made, tmp_path / "run")
    own = read_run_config(made / "run")
    mine = replace(own, init_from=str(opened), output=str(tmp_path / "mine"))
    _, start = build_start(mine)
    assert start is not None
    assert start.path.is_relative_to(opened)
    assert not left.exists()


def test_showing_a_run_runs_nothing_and_is_not_refused(
    made: Path, tmp_path: Path, left: Path
) -> None:
    opened = with_remote_code(made, tmp_path / "run")
    assert pipelines.show.main([str(opened)]) == 0
    assert pipelines.report.main([str(opened)]) == 0
    assert not left.exists()


# ---- datasets ----------------------------------------------------------------------------------


@pytest.fixture
def dataset(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset whose own settings name a reader, damaged so that a repair would use it."""
    folder = tmp_path / "data"
    shutil.copytree(made / "data", folder)
    config = json.loads((folder / "config.json").read_text())
    config["sources"][0]["format"] = "planted_reader:SOURCE"
    (folder / "config.json").write_text(json.dumps(config))
    next(folder.glob("images/*/*.arrow")).unlink()
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "planted_reader.py").write_text(LEAVES)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "planted_reader", raising=False)
    return folder


@pytest.mark.parametrize("verb", ["repair", "report", "webdataset"])
def test_a_datasets_reader_is_not_imported(
    dataset: Path, tmp_path: Path, left: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = {
        "repair": (pipelines.repair.main, [dataset]),
        "report": (pipelines.report.main, [dataset]),
        "webdataset": (
            pipelines.export.main,
            ["--to=webdataset", f"--dataset={dataset}", f"--output={tmp_path / 'tars'}"],
        ),
    }[verb]
    said = refused(main, arguments, capsys)
    assert "sources.format of source made_up asks for code of its own" in said
    assert said.endswith("pass --allow_code planted_reader:SOURCE")
    assert not left.exists()
    allowed = refused(main, [*arguments, "--allow_code=planted_reader:SOURCE"], capsys)
    if verb != "report":  # which has nothing to read of sources here
        assert "planted_reader:SOURCE" in allowed  # imported, and no reader
        assert left.exists()


def test_a_name_that_is_spelt_otherwise_is_no_flag(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(
        pipelines.generate.main, [made / "run", "--question=hi", "--allow_code=os.system"], capsys
    )
    assert said == "error: allow_code: 'os.system'; expected package.module:name, with a colon"


# ---- the working folder ------------------------------------------------------------------------


LOOK_UPS: list[tuple[Callable[[str], object], type[Exception]]] = [
    (lambda name: load_named(name, SOURCES, Source, what="format"), DataError),
    (lambda name: load_builder(name, {}, what="vision.tower"), ModelError),
]


@pytest.mark.parametrize(("look_up", "error"), LOOK_UPS)
@pytest.mark.parametrize("entry", ["", "here"])
def test_the_working_folder_is_no_import_path(
    look_up: Callable[[str], object],
    error: type[Exception],
    entry: str,
    left: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Path.cwd()
    name = f"planted_here_{error.__name__}_{entry}"
    (here / f"{name}.py").write_text(LEAVES + "def made(): ...\n")
    monkeypatch.syspath_prepend(str(here) if entry else "")  # as `python -m` and `-c` have it
    with pytest.raises(error, match="the working folder is not searched"):
        look_up(f"{name}:made")
    assert not left.exists()
    monkeypatch.setenv("PYTHONPATH", str(here))  # the command says so
    if error is DataError:
        with pytest.raises(DataError, match="expected a Source"):
            look_up(f"{name}:made")
    else:
        assert callable(look_up(f"{name}:made"))
    assert left.read_text() == MARK
