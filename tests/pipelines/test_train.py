"""`python -m pipelines.train` and `evaluate`: the commands, and a user's mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import pipelines.evaluate
import pipelines.train
from lapilli.data.text.encode import load_tokenizer
from lapilli.model.vlm import build_model
from pipelines.cli.command import run
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.train.small_run import VIEW, small_dataset
from tests.train.tiny import model_config

RECIPE = """
view: VIEW
global_batch_size: 8
micro_batch_size: 4
num_workers: 1
device: cpu
optim: {lr: 0.01}
model:
  vision: {settings: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2,
    num_attention_heads: 2, image_size: 32, patch_size: 16}}
  language: {settings: {hidden_size: 24, intermediate_size: 32, num_hidden_layers: 2,
    num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 512}}
""".replace("VIEW", VIEW)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("train"), images=10, text_only=10)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def one_line(
    main: Callable[[Sequence[str]], int],
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The one line a mistake becomes; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(arguments))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if not line.startswith("Loading weights")]  # a progress bar
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


@pytest.mark.usefixtures("ray_local")
def test_train_then_evaluate_with_relative_paths(
    dataset: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").symlink_to(dataset)
    monkeypatch.chdir(tmp_path)  # workers are started in folders of their own
    arguments = [f"--config={recipe}", "--dataset=data", "--output=runs/first"]
    assert pipelines.train.main([*arguments, "--max_steps=3"]) == 0
    answers = tmp_path / "answers.jsonl"
    arguments = ["--run=runs/first", "--dataset=data", f"--view={VIEW}"]
    assert pipelines.evaluate.main([*arguments, "--output=answers.jsonl"]) == 0
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    first = next(row for row in rows if row["sample_id"] == "made_up/text-0")
    assert "What colour is the" in first["question"]
    assert first["expected"].startswith("The ")


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset=nowhere"], "nowhere: no dataset"),
        (["--view=clip"], "view: 'clip' is not in"),
        (["--view=crop24"], "images of 24 px, the tower takes 32"),
        (["--no_such_key=1"], "no_such_key"),
        (["--global_batch_size=many"], "global_batch_size"),
        (["--optim.lr=fast"], "optim.lr"),
        (
            ["--global_batch_size=64", "--micro_batch_size=8"],
            "20 samples are fewer than one global batch of 64",
        ),
        (["--global_batch_size=6"], "6 is no multiple of num_workers x micro_batch_size = 1 x 4"),
        (["--max_length=3"], "max_length: 3"),
        (["--model.language.settings.vocab_size=100"], "the language model knows 100"),
        (["--model.projector=thin"], "'thin' is unknown"),
        (["--num_workers=64", "--global_batch_size=256"], "num_workers: 64"),
        (["--device=cuda"], "no GPU is visible"),
        (["--precision=bf16", "--zero_stage=0"], "zero_stage: 0 with precision bf16"),
        (["--max_steps=-1"], "max_steps: -1"),
        (["--optim.betas=[0.9,1.0]"], "optim.betas"),
        (["--model.vision.settings.hiden_size=9"], "vision.settings: 'hiden_size' is unknown"),
        (["--model.language.settings.vocabsize=9"], "language.settings: 'vocabsize' is unknown"),
        (["--model.vision.settings.num_attention_heads=3"], "vision.settings"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    flags: list[str],
    words: str,
    dataset: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    arguments = [f"--config={recipe}", f"--dataset={dataset}", f"--output={output}", *flags]
    assert words in one_line(pipelines.train.main, arguments, capsys)
    assert not output.exists()


@pytest.mark.usefixtures("ray_local")
def test_a_tokenizer_that_is_not_the_language_models_own_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = model_config()
    config.language.settings.update(vocab_size=512)
    weights = tmp_path / "language"
    build_model(config).language.save_pretrained(weights)
    load_tokenizer(make_tokenizer(tmp_path / "one", vocab_size=300)).save_pretrained(weights)
    mixture = make_mixture(tmp_path / "raw")
    other = make_tokenizer(tmp_path / "other", vocab_size=290)
    build_dataset(mixture, tmp_path / "dataset", other)
    arguments = [
        f"--config={recipe}",
        f"--dataset={tmp_path / 'dataset'}",
        f"--output={tmp_path / 'run'}",
        f"--model.language.pretrained={weights}",
    ]
    line = one_line(pipelines.train.main, arguments, capsys)
    assert "tokenizer: " in line
    assert f"preprocess with --tokenizer {weights}" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--run=nowhere"], "nowhere: no such folder; expected a run"),
        (["--batch_of=3"], "batch_of"),
        (["--output=no/such/folder/answers.jsonl"], "is in no folder"),
    ],
)
def test_evaluate_names_a_mistake(
    flags: list[str], words: str, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run=nowhere", f"--dataset={dataset}", f"--view={VIEW}", *flags]
    assert words in one_line(pipelines.evaluate.main, arguments, capsys)
