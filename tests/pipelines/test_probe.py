"""`lapilli probe`: what each layer of a frozen model knows of a teacher's features."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pipelines.probe
import pipelines.train
from lapilli.data.batches.collate import BatchShape, collate
from lapilli.data.config import MixtureConfig, TargetConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.dataset.targets import TargetReader, open_targets
from lapilli.data.shards.schemas import HELD_OUT
from lapilli.data.shards.target_rows import decode_rows
from lapilli.model.auxiliary.probes import image_states
from lapilli.train.checkpoint.find import newest_weights
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.inference.probing import ProbePlan, train_probes
from lapilli.train.steps.step import to_device
from pipelines.cli.command import run
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.pipelines.test_train import RECIPE
from tests.train.small_run import VIEW

CPU = torch.device("cpu")
IMAGES, OUT = 50, 10
TARGETS = {
    "colour": TargetConfig("tests.teaching:blocks", rows=4, width=6, size=32),
    "odd": TargetConfig("tests.teaching:odd", rows=4, width=6, size=32, settings={"least": 128}),
    "dark": TargetConfig("tests.teaching:odd", rows=4, width=6, size=32, settings={"least": 300}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, on a dataset with targets that holds images out."""
    folder = tmp_path_factory.mktemp("probed")
    mixture = make_mixture(folder / "raw", images=IMAGES, text_only=2, asked=2)
    build_dataset(
        mixture, folder / "data", make_tokenizer(folder / "tokenizer"),
        mixture=MixtureConfig(held_out=2 * OUT), targets=TARGETS,
    )  # fmt: skip
    (folder / "run.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [f"--config={folder / 'run.yaml'}", f"--dataset={folder / 'data'}"]
    flags = ["--launcher=process", f"--output={folder / 'run'}", "--max_steps=1"]
    assert pipelines.train.main([*arguments, *flags]) == 0
    return folder


def flags(trained: Path, output: Path, *more: str, target: str = "colour") -> list[str]:
    own = [f"--dataset={trained / 'data'}", f"--target={target}", f"--output={output}"]
    return [str(trained / "run"), *own, f"--view={VIEW}", "--device=cpu", "--batch=8", *more]


def planted(trained: Path) -> Any:
    """In the place of `image_states`: layer 2's tell each image's target, layer 1's are noise."""
    known: dict[bytes, NDArray[np.float32]] = {}
    for split in ("train", HELD_OUT):
        dataset = open_dataset(trained / "data", view=VIEW, image_tokens=4, split=split)
        for index in np.flatnonzero(dataset.has_images).tolist():
            stored = open_targets(dataset, "colour").read(int(dataset.image_slots(index)[0]))
            assert stored is not None
            known[dataset.sample(index).pixels.tobytes()] = decode_rows(*stored)
    assert len(known) == IMAGES
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 24, generator=draw)

    def states(model: Any, inputs: Any, layers: Any, images: int) -> dict[int, torch.Tensor]:
        told = np.stack([known[one.numpy().tobytes()] for one in inputs["pixels"][:images]])
        noise = torch.randn(images, 4, model.language.config.hidden_size, generator=draw)
        width = noise.shape[-1]
        return {1: noise, 2: torch.from_numpy(told) @ mixed[:, :width] + 3 * torch.eye(4, width)}

    return states


def test_probes_find_what_a_layer_knows_of_images_that_they_have_not_seen(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = newest_weights(trained / "run")
    monkeypatch.setattr("lapilli.train.inference.probing.image_states", planted(trained))
    more = ["--steps=300", "--lr=0.01"]
    assert pipelines.probe.main(flags(trained, tmp_path / "a", *more)) == 0
    found = json.loads((tmp_path / "a" / "probe.json").read_text(encoding="utf-8"))
    assert [layer["layer"] for layer in found["layers"]] == [1, 2]
    assert found["held_out"] == OUT
    assert found["trained_on"] == IMAGES - OUT
    blind, seeing = found["layers"]
    assert seeing["smooth_l1"] < 0.6 * found["mean_smooth_l1"]
    assert blind["smooth_l1"] > 0.9 * found["mean_smooth_l1"]
    assert blind["cosine"] < seeing["cosine"] <= 1
    with (tmp_path / "a" / "probe.csv").open(encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["smooth_l1"]) for row in rows] == [
        layer["smooth_l1"] for layer in found["layers"]
    ]
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "Smooth L1 by layer" in page
    assert "<svg" in page
    after = newest_weights(trained / "run")
    assert before is not None
    assert after is not None
    assert after.state.weights_id == before.state.weights_id


def test_a_seed_decides_every_figure_and_layers_do_not_depend_on_each_other(
    trained: Path, tmp_path: Path
) -> None:
    def layer_2(name: str, *more: str) -> dict[str, float]:
        assert pipelines.probe.main(flags(trained, tmp_path / name, "--steps=5", *more)) == 0
        text = (tmp_path / name / "probe.json").read_text(encoding="utf-8")
        return json.loads(text)["layers"][-1]

    first = layer_2("a")
    assert first["layer"] == 2
    assert layer_2("b") == first
    assert layer_2("c", "--layers=2") == first
    assert layer_2("d", "--seed=1") != first


def test_states_are_those_of_transformers_at_an_images_rows(trained: Path) -> None:
    model = load_trained(trained / "run").model
    dataset = open_dataset(
        trained / "data", view=VIEW, image_tokens=model.image_tokens, split=HELD_OUT
    )
    samples = [dataset.sample(i) for i in np.flatnonzero(dataset.has_images)[:3].tolist()]
    length = -(-max(int(dataset.lengths.max()), 1) // 8) * 8
    shape = BatchShape(rows=4, buckets=(length,), image_tokens=model.image_tokens)
    batch = collate(samples, shape, dataset.image_size)
    inputs = to_device(batch, CPU).inputs
    found = image_states(model, inputs, (1, 2), batch.num_images)
    with torch.no_grad():
        expected: Any = model.language.get_decoder()(
            inputs_embeds=model.embed(inputs["input_ids"], inputs["merge_index"], inputs["pixels"]),
            position_ids=inputs["position_ids"], output_hidden_states=True,
        ).hidden_states  # fmt: skip
    for row in range(3):
        (places,) = np.nonzero(batch.merge_index[row] >= 0)
        for layer in (1, 2):
            torch.testing.assert_close(found[layer][row], expected[layer][row][places])


@pytest.fixture
def with_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stored features with a scale that is no number."""
    read = TargetReader.read

    def broken(self: TargetReader, slot: int) -> Any:
        found = read(self, slot)
        return found and (found[0], np.full_like(found[1], np.nan))

    with monkeypatch.context() as patch:
        patch.setattr(TargetReader, "read", broken)
        yield


@pytest.mark.parametrize(
    ("target", "more", "said"),
    [
        ("depth", [], "targets: 'depth' is not in {data}, which has colour, odd, dark; preprocess"),
        ("dark", [], "target: no image of {data} is left that has one of dark; expected"),
        ("colour", ["--layers=0,1"], "layers: '0,1'; expected numbers from 1 to 2, each once"),
        ("colour", ["--layers=3"], "layers: '3'; expected numbers from 1 to 2, each once"),
        ("colour", ["--layers=1,one"], "layers: '1,one'; expected numbers from 1 to 2, each once"),
        ("colour", ["--steps=0"], "steps: 0; expected at least 1"),
        ("colour", ["--lr=0"], "lr: 0.0; expected more than 0"),
    ],
)
def test_what_cannot_be_probed_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str,
    more: list[str], said: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run(lambda: pipelines.probe.main(flags(trained, tmp_path / "a", *more, target=target)))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said.format(data=trained / "data") in lines[0]
    assert not (tmp_path / "a" / "probe.json").exists()


@pytest.mark.usefixtures("with_nan")
def test_a_feature_that_is_no_number_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: pipelines.probe.main(flags(trained, tmp_path / "a")))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "target: colour of" in line
    assert "has a number that is not finite; run verify" in line


def test_a_model_with_nan_names_the_layer(trained: Path) -> None:
    model = load_trained(trained / "run").model
    layers: Any = model.language.get_decoder().layers
    with torch.no_grad():
        layers[1].mlp.down_proj.weight.fill_(torch.nan)
    parts = [
        open_dataset(trained / "data", view=VIEW, image_tokens=model.image_tokens, split=split)
        for split in ("train", HELD_OUT)
    ]
    plan = ProbePlan(target="colour", layers=(1, 2), steps=2, batch_size=4)
    with pytest.raises(Exception, match="the loss of layer 2 is not finite at step 1"):
        train_probes(model, parts[0], parts[1], plan, CPU)


def test_images_without_a_feature_are_left_out(trained: Path) -> None:
    model = load_trained(trained / "run").model
    parts = [
        open_dataset(trained / "data", view=VIEW, image_tokens=model.image_tokens, split=split)
        for split in ("train", HELD_OUT)
    ]
    plan = ProbePlan(target="odd", layers=(2,), steps=2, batch_size=4)
    scores = train_probes(model, parts[0], parts[1], plan, CPU)
    ok = parts[0].manifest.targets["odd"].statuses["ok"]
    assert scores.trained_on + scores.held_out == ok < IMAGES
    assert np.isfinite(scores.layers[0].smooth_l1)
