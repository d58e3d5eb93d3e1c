"""Cards of exports and datasets as the hub's own library reads them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard

from lapilli.data.dataset.verify import verify_dataset
from lapilli.data.shards.manifest import read_manifest
from lapilli.train.config import RunConfig
from pipelines.cli.command import parse
from pipelines.reports.cards import CARD, base_models, dataset_card, write_dataset_card
from tests.fake_hub import fake_hub
from tests.pipelines.test_export_runs import LORA, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def run(runs: Runs) -> Path:
    return runs.train("carded", lora=LORA)


@pytest.fixture(scope="module")
def exports(runs: Runs, run: Path) -> dict[str, Path]:
    return {form: runs.export(run, form) for form in ("hf", "llava", "peft")}


@pytest.mark.parametrize(
    ("form", "library", "words"),
    [
        ("hf", "transformers", "AutoModelForImageTextToText"),
        ("llava", None, "load_pretrained_model"),
        ("peft", "peft", "PeftModel.from_pretrained"),
    ],
)
def test_an_export_has_a_card(
    runs: Runs,
    exports: dict[str, Path],
    form: str,
    library: str | None,
    words: str,
    tmp_path: Path,
) -> None:
    card = ModelCard.load(exports[form] / CARD)
    data = card.data.to_dict()
    assert data.get("library_name") == library
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["tags"] == ["lapilli", "llava", "lora"]
    assert words in card.text
    dataset = runs.dataset("clip")
    assert read_manifest(dataset).fingerprint in card.text
    for name in read_manifest(dataset).mixture["sources"]:
        assert f"| {name} | " in card.text
    assert str(runs.folder) not in card.content  # nobody's folders are published
    recipe = card.text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    words_of = [f"--config={tmp_path / 'recipe.yaml'}", "--dataset=d", "--output=o"]
    again = parse(RunConfig, words_of, "")
    assert again.model.lora is not None
    assert again.global_batch_size == yaml.safe_load(recipe)["global_batch_size"]


def test_a_dataset_has_a_card_that_is_its_owners_once_changed(runs: Runs) -> None:
    dataset = runs.dataset("clip")
    path = dataset / CARD
    assert write_dataset_card(dataset) == path
    card = DatasetCard.load(path)
    data = card.data.to_dict()
    assert data["task_categories"] == ["image-text-to-text"]
    assert data["size_categories"] == ["n<1K"]
    manifest = read_manifest(dataset)
    assert manifest.fingerprint in card.text
    assert f"| {manifest.counts['read']:,} | {manifest.counts['kept']:,} |" in card.text
    assert verify_dataset(dataset).foreign == []
    assert write_dataset_card(dataset) == path
    path.write_text("# Mine\n")
    assert write_dataset_card(dataset) is None
    assert path.read_text() == "# Mine\n"
    path.write_text(dataset_card(dataset))


def test_the_hubs_own_names_are_the_base() -> None:
    words = ["--config=llava15/finetune", "--dataset=d", "--output=o"]
    config = parse(RunConfig, words, "")
    assert base_models(config) == ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"]


def test_the_documented_commands_publish_both(
    runs: Runs, exports: dict[str, Path], tmp_path: Path
) -> None:
    """`hf upload` as docs/answers.md has it, against a hub of this machine."""
    page = (Path(__file__).parents[2] / "docs/answers.md").read_text(encoding="utf-8")
    commands = re.findall(r"^hf upload .+$", page, re.MULTILINE)
    assert len(commands) == 2
    shutil.copytree(exports["hf"], tmp_path / "exports/first")
    shutil.copytree(runs.dataset("clip"), tmp_path / "datasets/finetune")
    write_dataset_card(tmp_path / "datasets/finetune")
    with fake_hub() as hub:
        mine = {
            "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        for command in commands:
            program, *words = command.replace("OWNER", "me").split()
            own = Path(sys.executable).with_name(program)  # of this environment, active or not
            done = subprocess.run(
                [str(own), *words], cwd=tmp_path, env=os.environ | mine,
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    for repo, folder in (("models/me/first", "exports/first"),
                         ("datasets/me/finetune", "datasets/finetune")):  # fmt: skip
        place = tmp_path / folder
        written = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
        assert {path for name, path in hub.files if name == repo} == written
        assert all(hub.files[repo, path] == (place / path).read_bytes() for path in written)
    assert hub.cards.keys() == {"model", "dataset"}
