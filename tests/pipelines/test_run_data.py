"""A run is its own: asked, exported and started from without its dataset, and compared with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

import pipelines.evaluate
import pipelines.export
from lapilli.data.dataset.tokenizer_copy import write_copy
from lapilli.data.errors import DataError
from lapilli.data.record import TextPart, Turn
from lapilli.data.text.encode import load_tokenizer, tokenizer_facts
from lapilli.model.interop.hf import read_facts
from lapilli.model.vlm import build_model
from lapilli.train.checkpoint.find import find_checkpoints
from lapilli.train.config import CheckpointConfig, RunConfig, ValidationConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import finished_steps, preflight
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import open_assistant
from lapilli.train.run_folder.dataset_files import keep_data, read_data
from tests.factories import Mixture, build_dataset, make_mixture, make_tokenizer
from tests.train.small_run import VIEW, small_run

TURNS = (Turn("user", (TextPart("What colour is the goat?"),)),)
SYSTEM = "You are a pirate."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run_data")


@pytest.fixture(scope="module")
def mixture(folder: Path) -> Mixture:
    return make_mixture(folder / "raw", images=4, text_only=6)


def template(path: Path, system: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'name: mine\nbase: v1\nbefore_user: "Q: "\nsystem: "{system}"\n')
    return path


@pytest.fixture(scope="module")
def dataset(folder: Path, mixture: Mixture) -> Path:
    tokenizer = make_tokenizer(folder / "tokenizer")
    wording = template(folder / "mine.yaml", "You are polite.")
    build_dataset(mixture, folder / "dataset", tokenizer, template=str(wording))
    return folder / "dataset"


def settings(dataset: Path, output: Path, **values: Any) -> RunConfig:
    values = {"num_workers": 1, "launcher": "process", "epochs": 1, "max_steps": 2, **values}
    return small_run(dataset, output, **values)


@pytest.fixture(scope="module")
def finished(folder: Path, dataset: Path) -> RunConfig:
    config = settings(dataset, folder / "run", checkpoint=CheckpointConfig(archive_every=1))
    launch(preflight(config))
    return config


@pytest.fixture
def alone(finished: RunConfig, tmp_path: Path) -> Path:
    """A copy of the run whose dataset is nowhere."""
    run = Path(shutil.copytree(finished.output, tmp_path / "alone"))
    path = run / "config.json"
    path.write_text(path.read_text().replace(finished.dataset, str(tmp_path / "gone")))
    return run


@pytest.fixture(scope="module")
def asked(finished: RunConfig) -> list[int]:
    return open_assistant(Path(finished.output)).prompt(TURNS).tolist()


def test_a_run_and_a_copied_milestone_are_asked_without_their_dataset(
    alone: Path, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    milestone = shutil.copytree(alone / "milestones" / "step-00000001", tmp_path / "milestone")
    monkeypatch.chdir("/")
    for path in (alone, milestone):
        assistant = open_assistant(path)
        assert assistant.prompt(TURNS).tolist() == asked
        assert assistant.template.system == "You are polite."
        assert assistant.spec.size == 32


def test_an_export_is_of_what_was_trained_and_not_of_an_edited_file(
    alone: Path, folder: Path, tmp_path: Path
) -> None:
    template(folder / "mine.yaml", SYSTEM)
    assert pipelines.export.main([str(alone), "--to=hf", f"--output={tmp_path / 'hf'}"]) == 0
    facts = read_facts(tmp_path / "hf")
    assert facts["template"]["system"] == "You are polite."
    assert pipelines.export.main([str(alone), "--to=llava", f"--output={tmp_path / 'llava'}"]) == 0
    written, own = (load_tokenizer(path) for path in (tmp_path / "llava", folder / "tokenizer"))
    assert tokenizer_facts(written).fingerprint == tokenizer_facts(own).fingerprint


def test_another_run_starts_from_one_without_its_dataset(
    alone: Path, dataset: Path, tmp_path: Path
) -> None:
    ready = preflight(settings(dataset, tmp_path / "next", init_from=str(alone)))
    assert ready.start == 0


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("template.json", replaced("You are polite.", SYSTEM)),
        ("template.json", lambda text: "[]"),
        ("template.json", replaced('"system"', '"sistem"')),
        ("view.json", replaced('"pad"', '"crop"')),
        ("view.json", lambda text: text[:10]),
        ("tokenizer/tokenizer_config.json", replaced('"eos_token": "</s>"', '"eos_token": "<s>"')),
        ("tokenizer/tokenizer.json", lambda text: text + "\n"),
        ("facts.json", replaced('"eos_id": 2', '"eos_id": 1')),
    ],
)
def test_an_edited_file_of_a_run_is_named(
    alone: Path, dataset: Path, name: str, change: Callable[[str], str]
) -> None:
    edit(alone / "data" / name, change)
    for ask in (
        lambda: open_assistant(alone),
        lambda: pipelines.evaluate.main([f"--run={alone}", f"--dataset={dataset}"]),
        lambda: pipelines.export.main([str(alone), "--to=hf", f"--output={alone / 'hf'}"]),
    ):
        with pytest.raises(TrainError) as caught:
            ask()
        line = str(caught.value)
        assert str(alone / "data") in line
        assert name in line or "sistem" in line
        assert "bring" in line
        assert "\n" not in line
    assert not (alone / "hf").exists()


@pytest.mark.parametrize("name", ["template.json", "tokenizer/tokenizer.json", "tokenizer"])
def test_a_missing_file_of_a_run_is_named(alone: Path, name: str) -> None:
    path = alone / "data" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(TrainError, match=name) as caught:
        open_assistant(alone)
    assert "\n" not in str(caught.value)


def test_a_run_from_before_is_read_from_its_dataset_or_says_where_that_is_missing(
    finished: RunConfig, alone: Path, tmp_path: Path, asked: list[int]
) -> None:
    run = Path(shutil.copytree(finished.output, tmp_path / "before"))
    shutil.rmtree(run / "data")
    assert open_assistant(run).prompt(TURNS).tolist() == asked
    shutil.rmtree(alone / "data")
    with pytest.raises(TrainError, match=r"no data/.*gone: no dataset.*bring the dataset back"):
        open_assistant(alone)
    assert finished_steps(replace(finished, output=str(run))) == 2
    assert (run / "data" / "template.json").exists()


def test_a_finished_run_given_again_with_a_changed_dataset_says_so(
    finished: RunConfig, mixture: Mixture, folder: Path, tmp_path: Path
) -> None:
    build_dataset(mixture, tmp_path / "other", folder / "tokenizer")
    changed = replace(finished, dataset=str(tmp_path / "other"))
    before = sorted(Path(finished.output).rglob("*"))
    for check in (finished_steps, preflight):
        with pytest.raises(TrainError, match=r"saved with another dataset \(fingerprint .*, now"):
            check(changed)
    assert finished_steps(finished) == 2
    assert sorted(Path(finished.output).rglob("*")) == before


def test_a_resumed_run_keeps_what_it_has_and_names_what_was_edited(
    finished: RunConfig, dataset: Path, alone: Path
) -> None:
    before = {p: p.read_bytes() for p in (alone / "data").rglob("*") if p.is_file()}
    keep_data(alone, dataset, VIEW, anew=False)
    assert {p: p.read_bytes() for p in (alone / "data").rglob("*") if p.is_file()} == before
    edit(alone / "data" / "template.json", replaced("You are polite.", SYSTEM))
    with pytest.raises(TrainError, match=r"template\.json: not the template"):
        keep_data(alone, dataset, VIEW, anew=False)
    keep_data(alone, dataset, VIEW, anew=True)
    found = find_checkpoints(Path(finished.output))[-1].state.data
    assert read_data(alone, found).template.system == "You are polite."


def test_templates_of_one_name_are_told_apart(
    finished: RunConfig, mixture: Mixture, folder: Path, tmp_path: Path
) -> None:
    wording = template(tmp_path / "templates" / "mine.yaml", SYSTEM)
    other = tmp_path / "pirates"
    build_dataset(mixture, other, folder / "tokenizer", template=str(wording))
    apart = (
        r"template: .*pirates was made with mine \(fingerprint .*\), the training data with mine"
    )
    with pytest.raises(TrainError, match=apart):
        pipelines.evaluate.main(
            [f"--run={finished.output}", f"--dataset={other}", f"--view={VIEW}"]
        )
    measured = settings(
        Path(finished.dataset),
        tmp_path / "run",
        validation=ValidationConfig(every=1, dataset=str(other)),
    )
    with pytest.raises(TrainError, match=apart):
        preflight(measured)
    told: list[str] = []
    preflight(settings(other, tmp_path / "run", init_from=finished.output), told.append)
    assert [line for line in told if "another template named mine" in line]


def test_a_start_with_a_touched_copy_of_the_tokenizer_is_refused(
    dataset: Path, tmp_path: Path
) -> None:
    touched = Path(shutil.copytree(dataset, tmp_path / "touched"))
    make_tokenizer(tmp_path / "small", vocab_size=300)
    shutil.copytree(tmp_path / "small", touched / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer that the dataset"):
        preflight(settings(touched, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- the language model's own tokenizer --------------------------------------------------------


@pytest.fixture
def weights(finished: RunConfig, tmp_path: Path) -> Path:
    language = build_model(finished.model).language
    language.save_pretrained(tmp_path / "language")
    return tmp_path / "language"


def with_language(config: RunConfig, weights: Path, output: Path) -> RunConfig:
    language = replace(config.model.language, pretrained=str(weights), settings={})
    model = replace(config.model, language=language)
    return replace(
        config,
        model=model,
        output=str(output),
        checkpoint=replace(config.checkpoint, archive_every=0),
    )


def test_weights_without_a_tokenizer_are_said(
    finished: RunConfig, weights: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    preflight(with_language(finished, weights, tmp_path / "run"), told.append)
    assert [line for line in told if f"tokenizer: {weights} holds weights alone" in line]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_tokenizer_that_cannot_be_loaded_is_no_pass(
    finished: RunConfig, weights: Path, tmp_path: Path, name: str
) -> None:
    (weights / name).write_bytes(b"\xff not a tokenizer")
    with pytest.raises(
        TrainError, match=r"cannot be compared .*(get it again|could not be loaded)"
    ) as caught:
        preflight(with_language(finished, weights, tmp_path / "run"))
    assert str(weights) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_language_models_own_tokenizer_passes_in_silence(
    finished: RunConfig, weights: Path, folder: Path, tmp_path: Path
) -> None:
    write_copy(load_tokenizer(folder / "tokenizer"), tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", weights, dirs_exist_ok=True)
    told: list[str] = []
    preflight(with_language(finished, weights, tmp_path / "run"), told.append)
    assert not [line for line in told if "tokenizer" in line]


def test_a_mirror_has_what_the_run_keeps_and_gives_it_back(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("file", auto_mkdir=True)
    monkeypatch.setattr("lapilli.data.io.remote_path.open_storage", lambda scheme: files)
    store = tmp_path / "store"
    config = settings(
        dataset,
        tmp_path / "run",
        checkpoint=CheckpointConfig(archive_every=2, upload=f"file://{store}"),
    )
    launch(preflight(config))
    kept = contents(tmp_path / "run" / "data")
    assert "template.json" in kept
    assert contents(store / "data") == kept
    assert contents(store / "milestones" / "step-00000002" / "data") == kept
    preflight(replace(config, output=str(tmp_path / "again")))
    assert contents(tmp_path / "again" / "data") == kept


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
