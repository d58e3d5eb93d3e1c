"""What embedding losses change, on the quickstart's task with DINOv2-small as the teacher.

Stage 1 trains tower and projector on captions, with the embedding losses and without, from the same
weights and samples; stage 2 trains all parts on questions. Measured are the embedding losses on
held-out images before and after stage 1, probes on the hidden states of held-out images after stage
1, and the share of right answers after stage 2. Each finished run adds its rows at once, and a
command that is repeated goes on with those that are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, MixtureConfig, TargetConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.io.atomic import write_json
from lapilli.data.planning.plan import plan_build
from lapilli.data.shards.schemas import HELD_OUT, TRAIN
from lapilli.data.text.encode import train_tokenizer
from lapilli.model.config import AuxConfig
from lapilli.model.vlm import build_model
from lapilli.train.config import RunConfig, ValidationConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.inference.evaluate import answer_dataset, load_trained, open_test, score
from lapilli.train.inference.probing import ProbePlan, train_probes
from lapilli.train.steps.feed import Feed
from lapilli.train.validation.validation_loss import HeldOut, open_held_out
from lapilli.train.worker.compatibility import open_for
from pipelines.benchmarks.harness import add_row, provenance, table
from pipelines.benchmarks.material.dinov2 import write_dinov2
from pipelines.cli.command import UsageError, parse, say
from pipelines.quickstart_data.easy_vqa import write_easy_vqa

__all__ = ["AuxiliaryConfig", "main"]

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
VIEW, VOCABULARY = "square64", 512
CPU = torch.device("cpu")
ROWS, WIDTH = 16, 384  # of 8 x 8 patches of 112 pixels, averaged by fours
TARGET = "depth"  # the task whose predictors have an MLP; its target here is not depth
AUX = AuxConfig(mode=TARGET, layers={TARGET: (2, 3)}, shapes={TARGET: (ROWS, WIDTH)})
WAYS = {"with": AUX, "without": AuxConfig()}
PACKAGES = ("torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class AuxiliaryConfig:
    """What is trained.

    Attributes:
        folder: Where data, runs and figures are made; finished ones are kept.
        seeds: Seeds of a run's weights and order, from 0.
        images: Images trained and held out, of easy-vqa's 4,000.
        held_out: Of them, share held out.
        questions: Every so manieth of easy-vqa's test questions is asked.
        pretrain_epochs: Of stage 1.
        finetune_epochs: Of stage 2.
        probe_steps: Optimizer steps of the probes.
        probe_lr: Their highest learning rate.
        save: Add rows to `results/auxiliary.csv`.
    """

    folder: str
    seeds: int = 3
    images: int = 1200
    held_out: float = 0.2
    questions: int = 5
    pretrain_epochs: int = 3
    finetune_epochs: int = 2
    probe_steps: int = 120
    probe_lr: float = 0.003
    save: bool = True


def main(argv: Sequence[str]) -> int:
    """Build, train every run that is missing, tell, and add rows."""
    config = parse(AuxiliaryConfig, argv, "Stage 1 with and without embedding losses.")
    if min(config.seeds, config.images, config.questions, config.probe_steps) < 1:
        raise UsageError("seeds, images, questions, probe_steps: expected at least 1 each")
    head = provenance(PACKAGES, "auxiliary", argv)
    root = Path(config.folder)
    _make_data(config, root)
    found: dict[tuple[int, str], dict[str, float]] = {}
    for seed in range(config.seeds):
        for way, aux in WAYS.items():
            kept = root / f"figures-{seed}-{way}.json"
            is_new = not kept.exists()
            if is_new:
                started = time.process_time()
                figures = _run(config, root, seed, way, aux)
                figures["cpu_seconds"] = round(time.process_time() - started)
                write_json(kept, figures)
            found[seed, way] = json.loads(kept.read_text(encoding="utf-8"))
            if is_new and config.save:
                _add(head, config, seed, way, found[seed, way])
    _tell(found)
    return 0


def _add(
    head: Mapping[str, Any], config: AuxiliaryConfig, seed: int, way: str,
    figures: Mapping[str, float],
) -> None:  # fmt: skip
    """A row a figure."""
    for name, value in figures.items():
        row = {"images": config.images, "seed": seed, "embedding_losses": way}
        add_row("auxiliary", {**head, **row, "figure": name, "value": f"{value:.6g}"})


def _make_data(config: AuxiliaryConfig, root: Path) -> None:
    """Three datasets of easy-vqa, the first two with the teacher's features."""
    source = root / "easy_vqa"
    if not (root / "tokenizer").is_dir():
        texts = write_easy_vqa(source, seed=0)
        train_tokenizer(texts, root / "tokenizer", vocab_size=VOCABULARY)
        for name in ("pretrain", "finetune"):
            path = source / f"{name}.json"
            records = json.loads(path.read_text(encoding="utf-8"))
            names = dict.fromkeys(record["image"] for record in records)
            kept = {image for image, _ in zip(names, range(config.images), strict=False)}
            write_json(path, [record for record in records if record["image"] in kept])
        for path in sorted(source.glob("test_*.json")):
            records = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, records[:: config.questions])
    write_dinov2(root / "dinov2")
    teacher = TargetConfig(
        teacher="dinov2", rows=4 * ROWS, width=WIDTH, pretrained=str(root / "dinov2"),
        settings={"layers": [3, 6, 9, 12]}, size=112, pool=2,
    )  # fmt: skip
    for name in ("pretrain", "finetune", "test"):
        flags = [
            f"--config={RECIPES / f'{name}_data.yaml'}", f"--root={source}",
            f"--output={root / 'datasets' / name}", f"--tokenizer={root / 'tokenizer'}",
            f"--template={RECIPES / 'template.yaml'}",
        ]  # fmt: skip
        built = parse(BuildConfig, flags, "")
        if name == "pretrain":
            mixture = MixtureConfig(held_out=config.held_out)
            built = replace(built, mixture=mixture, targets={TARGET: teacher})
        build(plan_build(built), runner=run_here)


def _run(
    config: AuxiliaryConfig, root: Path, seed: int, way: str, aux: AuxConfig
) -> dict[str, float]:
    """Both stages of a seed, and what is measured of them."""
    figures: dict[str, float] = {}
    first = _settings(config, root, "pretrain", seed, way)
    first = _with_aux(first, aux, ("vision", "projector"))
    if aux.mode:
        before = _held_out(first)
        figures |= {f"held_out.{name}.before": value for name, value in before.items()}
    rows = launch(preflight(first))
    figures["held_out_loss.pretrain"] = rows[-1].held_out_loss or 0.0
    for name, value in (rows[-1].held_out_aux_losses or {}).items():
        figures[f"held_out.{name}.after"] = value
    figures |= _probed(config, root, first.output, seed)
    second = _settings(config, root, "finetune", seed, way, init_from=first.output)
    second = _with_aux(second, replace(aux, layers={}), ("vision", "projector", "language"))
    launch(preflight(second))
    trained = load_trained(Path(second.output))
    test = open_test(root / "datasets" / "test", VIEW, trained)
    scores = score(answer_dataset(trained.model, test))
    figures["accuracy"] = scores.accuracy
    figures |= {f"accuracy.{kind}": share for kind, share in scores.by_source.items()}
    say(f"seed {seed} {way}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return figures


def _settings(
    config: AuxiliaryConfig, root: Path, stage: str, seed: int, way: str, init_from: str = ""
) -> RunConfig:
    """The quickstart's recipe of a stage, in this process."""
    flags = [f"--config={RECIPES / 'pretrain.yaml'}"]
    if stage == "finetune":
        flags += [f"--config={RECIPES / 'finetune.yaml'}", f"--init_from={init_from}"]
    epochs = config.pretrain_epochs if stage == "pretrain" else config.finetune_epochs
    flags += [
        f"--epochs={epochs}", f"--dataset={root / 'datasets' / stage}",
        f"--output={root / 'runs' / f'{stage}-{seed}-{way}'}", "--device=cpu", "--num_workers=1",
        "--micro_batch_size=32", "--zero_stage=0", "--launcher=process", "--checkpoint.every=10000",
        f"--seed={seed}", f"--model.seed={seed}",
    ]  # fmt: skip
    return parse(RunConfig, flags, "")


def _with_aux(config: RunConfig, aux: AuxConfig, learns: tuple[Any, ...]) -> RunConfig:
    """With task tokens and predictors, that learn where something is predicted."""
    parts = (*learns, "task_tokens", "predictors") if aux.layers else learns
    validation = ValidationConfig(every=10_000, samples=1000) if not config.init_from else None
    return replace(
        config, model=replace(config.model, aux=aux, trainable=parts),
        validation=validation or config.validation,
    )  # fmt: skip


def _held_out(config: RunConfig) -> dict[str, float]:
    """Embedding losses on held-out images before the first step."""
    model = build_model(config.model)
    dataset = open_for(model, config)
    held_out = open_held_out(config, dataset.image_tokens)
    assert held_out is not None
    feed = Feed(dataset, config, rank=0, world_size=1, held_out=held_out)
    losses = HeldOut(held_out, config, feed.shape, (0, 1))
    return losses.loss(SimpleNamespace(module=model), CPU).aux or {}


def _probed(config: AuxiliaryConfig, root: Path, run: str, seed: int) -> dict[str, float]:
    """Probes on a run's hidden states."""
    model = load_trained(Path(run)).model
    splits = [
        open_dataset(root / "datasets" / "pretrain", view=VIEW, image_tokens=model.image_tokens,
                     split=split)
        for split in (TRAIN, HELD_OUT)
    ]  # fmt: skip
    plan = ProbePlan(
        target=TARGET, layers=(1, 2, 3), steps=config.probe_steps, lr=config.probe_lr, seed=seed
    )
    scores = train_probes(model, splits[0], splits[1], plan, CPU)
    figures = {"probe.mean.smooth_l1": scores.mean_smooth_l1}
    for layer in scores.layers:
        figures[f"probe.{layer.layer}.smooth_l1"] = layer.smooth_l1
        figures[f"probe.{layer.layer}.cosine"] = layer.cosine
    return figures


def _tell(found: Mapping[tuple[int, str], Mapping[str, float]]) -> None:
    """A column a run."""
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    rows = [
        [name, *(f"{figures[name]:.4f}" if name in figures else "" for figures in found.values())]
        for name in names
    ]
    table("embedding losses", ["figure", *(f"{s} {way}" for s, way in found)], rows)
