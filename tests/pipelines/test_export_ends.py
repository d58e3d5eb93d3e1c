"""What ends an answer in every form of an export; what cannot be exported is not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, StopStringCriteria

import pipelines.preprocess
from lapilli.data.images.view import ImageSpec
from tests.factories import CLIP_MEAN, Mixture, build_dataset, make_mixture
from tests.made_tokenizers import made_tokenizer
from tests.pipelines.test_export_runs import Runs
from tests.pipelines.test_generate import one_line

RECIPE = """
sources:
  - {name: made_up, annotations: mixture.json, images: images}
views: {view: {size: 32, fill: [122, 116, 104]}}
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ends"))


@pytest.fixture(scope="module")
def mixture(runs: Runs) -> Mixture:
    return make_mixture(runs.folder / "root", images=8, text_only=4)


def tokenizer_folder(runs: Runs, has_specials: bool) -> Path:
    folder = runs.folder / f"tokenizer-{has_specials}"
    if not folder.exists():
        made_tokenizer("bytes", has_specials=has_specials).save_pretrained(folder)
    return folder


def dataset(runs: Runs, mixture: Mixture, template: str, has_specials: bool) -> Path:
    output = runs.folder / f"data-{template}-{has_specials}"
    view = ImageSpec(32, CLIP_MEAN)
    folder = tokenizer_folder(runs, has_specials)
    build_dataset(mixture, output, folder, views={"view": view}, template=template)
    return output


@pytest.mark.parametrize(
    ("template", "has_specials", "end"),
    [("v1", True, "</s>"), ("chatml", True, "<|im_end|>"), ("plain", True, "\n")],
)
def test_every_form_of_an_export_stops_at_the_same_ids(
    runs: Runs, mixture: Mixture, template: str, has_specials: bool, end: str
) -> None:
    """The trained end, a text of one token among them, and the tokenizer's own eos."""
    data = dataset(runs, mixture, template, has_specials)
    run = runs.train(template, flags=(f"--dataset={data}",))
    ends: dict[str, list[int]] = {}
    for form in ("hf", "llava"):
        text = (runs.export(run, form) / "generation_config.json").read_text()
        ends[form] = json.loads(text)["eos_token_id"]
    made: Any = AutoTokenizer.from_pretrained(tokenizer_folder(runs, has_specials))
    (trained,) = made(end, add_special_tokens=False)["input_ids"]
    assert ends["hf"] == ends["llava"] == [*dict.fromkeys([trained, made.eos_token_id])]


@pytest.mark.filterwarnings("ignore:template .* its end marker:UserWarning")
def test_an_end_of_several_tokens_is_a_note_with_what_stops_there(
    runs: Runs, mixture: Mixture, capsys: Capture
) -> None:
    data = dataset(runs, mixture, "phi_hf_masked", has_specials=False)
    run = runs.train("several", flags=(f"--dataset={data}",))
    capsys.readouterr()
    export = runs.export(run, "hf")
    said = " ".join(capsys.readouterr().out.split())
    note = "answers end with the text '<|im_end|>', which no single token is"
    advice = "call generate with stop_strings=['<|im_end|>'] and the processor's tokenizer"
    assert f"note: {note}; {advice}" in said
    assert advice in (export / "README.md").read_text()
    read: Any = AutoTokenizer.from_pretrained(export)
    stops: Any = StopStringCriteria(read, ["<|im_end|>"])
    for text, is_over in (("It is red.<|im_end|>", True), ("It is red.<|im_end", False)):
        ids = read(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert len(ids[0]) > 5
        assert bool(stops(ids, None)[0]) == is_over


def test_a_pair_that_cannot_be_exported_is_refused_before_training(
    runs: Runs, mixture: Mixture, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By preprocess; by train of a dataset that an earlier version made."""
    (runs.folder / "recipe.yaml").write_text(RECIPE)
    output = runs.folder / "refused"
    arguments = [
        f"--config={runs.folder / 'recipe.yaml'}",
        f"--root={mixture.root}",
        f"--output={output}",
        f"--tokenizer={tokenizer_folder(runs, True)}",
        "--template=phi_hf",
    ]
    words = "template phi_hf: it writes '<|im_start|>' as text, which is a special token"
    line = one_line(pipelines.preprocess.main, arguments, capsys)
    assert line.startswith(f"error: {words}")
    assert line.endswith("take a template with {<|im_start|>} in its frames, or another tokenizer")
    assert not (output / "manifest.json").exists()
    monkeypatch.setattr("lapilli.data.planning.plan.export_obstacle", lambda *pair: "")
    with pytest.warns(UserWarning, match="its end marker"):
        data = dataset(runs, mixture, "phi_hf", has_specials=True)

    def train(words: list[str]) -> int:
        runs.train("refused-run", flags=tuple(words))
        return 0

    line = one_line(lambda words: train([*words]), [f"--dataset={data}"], capsys)
    assert line.startswith(f"error: dataset: {words}")
    assert not (runs.folder / "refused-run/checkpoints").exists()
