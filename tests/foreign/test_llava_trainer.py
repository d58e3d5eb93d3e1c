"""LLaVA's own train(), unmodified, beside our run of its recipes with compat.yaml.

Both start from the same files and read the same records. Compared are the samples of each step in
their order, each step's loss, learning rate and gradient norm, and all that has learnt at the end.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lapilli.train.checkpoint.find import newest_weights
from lapilli.train.config import RunConfig
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.steps.feed import Feed
from lapilli.train.worker.compatibility import build_start, open_for
from pipelines.cli.command import parse
from tests.foreign.environments import HERE, ROOT, run_in
from tests.foreign.llava_material import LIMIT, RECIPES, Material, make_models, make_records
from tests.train.saved import saved_weights

pytestmark = [pytest.mark.llava, pytest.mark.timeout(1200)]

TABLE = ROOT / "outputs" / "llava_trainer.md"
LOSS, NORM, RATE = 5e-6, 1e-4, 1e-9  # absolute, relative, of the peak
# Of the distance that a tensor has moved. Where a gradient is near its own rounding, as that of a
# layer's first norm, Adam's quotient of moments is too: two ranks summing in another order do that.
MOVED = 1e-3


@dataclass(frozen=True)
class Case:
    """One training of LLaVA's scripts, made small."""

    name: str
    stage: str = "finetune"  # pretrain, finetune or lora
    count: int = 61
    batch: int = 4
    accumulation: int = 1
    ranks: int = 1
    epochs: int = 1
    long: int = 0
    text_share: float = 0.35
    seed: int = 42

    @property
    def data(self) -> str:
        """The recipe of its data."""
        return "pretrain" if self.stage == "pretrain" else "finetune"


CASES = [
    Case("stage 1, a short last batch", "pretrain", count=61, batch=4),
    Case("stage 1, two epochs, two processes", "pretrain", count=45, batch=2, epochs=2, ranks=2),
    Case("stage 2, a short last batch", count=71, batch=4, seed=7),
    Case("stage 2, batch 1, two epochs", count=23, batch=1, epochs=2, seed=123),
    Case("stage 2, batch 8, images alone", count=67, batch=8, text_share=0.0, seed=5),
    Case("stage 2, beyond the limit", count=50, batch=4, long=9, seed=11),
    Case("stage 2, accumulation 2, a group left over", count=53, batch=3, accumulation=2),
    Case("stage 2, accumulation 3, two epochs", count=47, batch=2, accumulation=3, epochs=2),
    Case("stage 2, two processes", count=59, batch=3, ranks=2, seed=3),
    Case(
        "stage 2, two processes, accumulation 2, two epochs",
        count=43, batch=2, accumulation=2, ranks=2, epochs=2, seed=9, long=4,
    ),
    Case("LoRA", "lora", count=49, batch=4, seed=21),
    Case("LoRA, accumulation 2, two epochs", "lora", count=37, batch=2, accumulation=2, epochs=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_models(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows of what was compared, written when the last case has ended."""
    rows: list[str] = []
    yield rows
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    head = (
        "| case | records | batch x accumulation x processes | epochs | steps | equal samples "
        "| loss | rate | norm | weights |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    TABLE.write_text(head + "".join(rows), encoding="utf-8")


def our_config(case: Case, material: Material, dataset: Path, output: Path) -> RunConfig:
    """The recipe with compat.yaml; what differs is the models' size and the machine."""
    recipe = {"lora": "finetune_lora"}.get(case.stage, case.stage)
    arguments = [
        f"--config={RECIPES / f'{recipe}.yaml'}", f"--config={RECIPES / 'compat.yaml'}",
        f"--dataset={dataset}", f"--output={output}", f"--seed={case.seed}",
        f"--global_batch_size={case.batch * case.accumulation * case.ranks}",
        f"--micro_batch_size={case.batch}", "--num_workers=1", f"--llava_processes={case.ranks}",
        f"--epochs={case.epochs}", f"--max_length={LIMIT}",
        f"--init_from={material.folder / 'mm_projector.bin'}",
        "--precision=fp32", "--model.dtype=fp32", "--zero_stage=0", "--launcher=process",
        "--device=cpu", "--checkpoint.every=100000", "--optim.warmup_ratio=0.1",
        f"--model.vision.pretrained={material.folder / 'tower'}",
        f"--model.language.pretrained={material.folder / 'language'}",
    ]  # fmt: skip
    if case.stage == "lora":
        arguments += ["--model.lora.rank=8", "--model.lora.alpha=16", "--model.lora.dropout=0"]
    return parse(RunConfig, arguments, "")


def llava_arguments(case: Case, material: Material, json_file: Path, output: Path) -> list[str]:
    """Its scripts' flags; sizes and the processor are the case's."""
    folder = material.folder
    flags: dict[str, Any] = {
        "model_name_or_path": folder / "language", "version": "v1", "data_path": json_file,
        "image_folder": folder, "vision_tower": folder / "tower", "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "pretrain_mm_mlp_adapter": folder / "mm_projector.bin", "bf16": False, "tf32": False,
        "use_cpu": True, "output_dir": output, "num_train_epochs": case.epochs,
        "per_device_train_batch_size": case.batch, "seed": case.seed,
        "gradient_accumulation_steps": case.accumulation, "evaluation_strategy": "no",
        "save_strategy": "no", "weight_decay": 0.0, "warmup_ratio": 0.1,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "model_max_length": LIMIT,
        "gradient_checkpointing": False, "dataloader_num_workers": 0, "lazy_preprocess": True,
        "report_to": "none", "disable_tqdm": True, "ddp_backend": "gloo",
        "ddp_find_unused_parameters": True,
    }  # fmt: skip
    if case.stage == "pretrain":
        flags |= {"version": "plain", "tune_mm_mlp_adapter": True, "learning_rate": 1e-3}
    else:
        flags |= {
            "image_aspect_ratio": "pad",
            "group_by_modality_length": True,
            "learning_rate": 2e-5,
        }
    if case.stage == "lora":
        flags |= {
            "lora_enable": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0,
            "learning_rate": 2e-4,
            "mm_projector_lr": 2e-5,
        }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_llava(
    case: Case, material: Material, json_file: Path, adapters: str, folder: Path
) -> list[dict[str, Any]]:
    """Its notes, one dict a process."""
    script: list[str | Path] = [HERE / "scripts" / "llava_train.py"]
    if case.ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = [
            "-m", "torch.distributed.run", "--nproc_per_node", str(case.ranks),
            "--master_addr", "127.0.0.1", "--master_port", str(port), *script,
        ]  # fmt: skip
    stubs = str(HERE / "scripts" / "stubs")
    arguments = llava_arguments(case, material, json_file, folder / "llava")
    run_in(
        "llava",
        *script,
        folder / "notes.json",
        adapters,
        *arguments,
        PYTHONPATH=stubs,
        PYTHONWARNINGS="ignore",
    )
    return [json.loads((folder / f"notes.{rank}.json").read_text()) for rank in range(case.ranks)]


def adapters_of(config: RunConfig, path: Path) -> str:
    """The first values of our adapters, for LLaVA's."""
    model, _ = build_start(config)
    found = {
        name.partition("model.")[2].replace(".default.", "."): value.detach().clone()
        for name, value in model.named_parameters()
        if ".lora_" in name
    }
    torch.save(found, path)
    return str(path)


def llava_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What LLaVA has saved, by our names."""
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        if file.name != "training_args.bin":
            loaded |= torch.load(file, map_location="cpu")
    found: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        short = name.removeprefix("base_model.model.").replace(".default.", ".")
        if "vision_tower" not in short:
            _, is_projector, rest = short.partition("mm_projector.")
            found[f"projector.{rest}" if is_projector else f"language.{short}"] = value.float()
    return found


def moved_apart(case: Case, config: RunConfig, llava: Path) -> float:
    """The largest difference of a tensor, over the distance that it has moved since the start."""
    model, _ = build_start(config)
    start = {n.replace(".default.", "."): p.detach() for n, p in model.named_parameters()}
    kept = newest_weights(Path(config.output))
    assert kept is not None
    ours = {n.replace(".default.", "."): v for n, v in saved_weights(kept.path).items()}
    theirs = llava_weights(llava)
    assert ours.keys() <= theirs.keys()
    worst = 0.0
    for name, value in ours.items():
        distance = float((value - start[name]).norm())
        apart = float((value - theirs[name]).norm())
        assert distance > 0 or apart == 0, name
        worst = max(worst, apart / distance if distance else 0.0)
    return worst


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run_equals_llavas(
    case: Case, material: Material, table: list[str], tmp_path: Path
) -> None:
    name = case.name.replace(" ", "_").replace(",", "")
    records = make_records(
        case.count, case.seed, stage=case.data, long=case.long, text_share=case.text_share
    )
    dataset = material.dataset(name, records, stage=case.data)
    config = our_config(case, material, dataset, tmp_path / "run")
    adapters = adapters_of(config, tmp_path / "adapters.pt") if case.stage == "lora" else "-"
    notes = run_llava(case, material, material.folder / f"{name}.json", adapters, tmp_path)

    rows = launch(preflight(config))
    model, _ = build_start(config)
    opened = open_for(model, config)
    feed = Feed(opened, config, rank=0, world_size=1)
    # texts alone are cut when they are preprocessed, those with an image when they are opened
    long = [r for r in records if len(r["conversations"][-1]["value"].split()) >= 150]
    assert len(long) == case.long
    assert opened.num_cut == sum("image" in record for record in long)
    names = [opened.sample_id(index).partition("/")[2] for index in range(len(opened))]
    ours = [
        [[sample.partition("/")[2] for sample in batch.sample_ids] for batch in step.batches]
        for step in feed.steps(0)
    ]
    # LLaVA's micro-batches come from the sampler in turn for its processes
    ids = [record["id"] for record in records]
    assert sorted(names) == sorted(ids)
    theirs = [[ids[i] for i in batch] for batch in notes[0]["sampled"]]
    flat = [sample for step in ours for batch in step for sample in batch]
    drawn = expected_stream(theirs, case)[: len(flat)]
    equal = sum(a == b for a, b in zip(flat, drawn, strict=True))

    steps = len(notes[0]["norms"])
    micro = np.array([[m["loss"] for m in rank["micro"]] for rank in notes])
    micro = micro[:, : steps * case.accumulation]
    losses = micro.reshape(case.ranks, steps, case.accumulation).mean((0, 2))
    assert len(rows) == steps == feed.total_steps
    loss = float(np.abs(losses - [row.loss for row in rows]).max())
    peak = max(row.lr or 0.0 for row in rows)
    rate = float(np.abs(np.subtract(notes[0]["rates"], [r.lr or 0.0 for r in rows])).max()) / peak
    norms = np.array(notes[0]["norms"])
    norm = float(np.abs(norms / [row.grad_norm or 0.0 for row in rows] - 1).max())
    weights = moved_apart(case, config, tmp_path / "llava")
    table.append(
        f"| {case.name} | {case.count} | {case.batch} x {case.accumulation} x {case.ranks} "
        f"| {case.epochs} | {steps} | {equal} of {len(flat)} | {loss:.1e} | {rate:.0e} "
        f"| {norm:.1e} | {weights:.1e} |\n"
    )
    assert equal == len(flat)
    assert loss < LOSS
    assert rate < RATE
    assert norm < NORM
    assert weights < MOVED


def expected_stream(drawn: list[list[str]], case: Case) -> list[str]:
    """The samples that LLaVA's steps take, in turn; Accelerate fills a last micro-step."""
    width = case.batch * case.ranks
    flat: list[str] = []
    size = -(-case.count // case.batch)  # batches of an epoch; the last one may end early
    for epoch in range(case.epochs):
        order = [i for batch in drawn[epoch * size : (epoch + 1) * size] for i in batch]
        missing = -len(order) % width if case.ranks > 1 else 0
        flat += order + (order * width)[:missing]
    return flat


def test_without_compat_the_order_is_ours(material: Material, tmp_path: Path) -> None:
    """The comparison sees a difference where there is one."""
    records = make_records(40, 1, stage="finetune")
    dataset = material.dataset("own_order", records, stage="finetune")
    case = Case("own order", count=40)
    config = our_config(case, material, dataset, tmp_path / "run")
    own = replace(config, sampler="grouped", llava_processes=0, truncate=True)
    model, _ = build_start(config)
    feeds = [Feed(open_for(model, c), c, rank=0, world_size=1) for c in (config, own)]
    orders = [
        [name for step in feed.steps(0) for batch in step.batches for name in batch.sample_ids]
        for feed in feeds
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
