"""Pretrained weights under ZeRO-3: shared among workers while they are read, and the same model."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lapilli.model.config import LanguageConfig, LoraConfig, ModelConfig
from lapilli.model.deepspeed_internals import shape_of
from lapilli.model.parts.trainable import is_adapter, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import latest_checkpoint
from lapilli.train.checkpoint.frozen import FORM
from lapilli.train.checkpoint.init_from import Built, build_on, find_chain
from lapilli.train.config import RunConfig
from lapilli.train.device import prepare_process
from lapilli.train.driver import preflight as preflight_module
from lapilli.train.driver.preflight import preflight
from lapilli.train.engine import deepspeed_engine
from lapilli.train.run_folder.checkpoint_state import CheckpointState
from lapilli.train.run_folder.settings import plain_settings
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from tests.model.test_qwen1 import write_qwen1
from tests.train.ready_processes import spawn
from tests.train.small_run import small_dataset, small_run
from tests.train.test_zero import Probe
from tests.train.tiny import VOCABULARY, global_tokens, model_config, random_steps, run_config

STEPS = 4
Taken = tuple[float, dict[str, torch.Tensor]]  # a step's loss and its whole unclipped gradient
CPU = torch.device("cpu")
LORA = LoraConfig(rank=2, alpha=8, dropout=0.0)
CASES: dict[str, dict[str, Any]] = {
    "whole language model": {"tied": False, "lora": None},
    "tied embeddings": {"tied": True, "lora": None},
    "ids added": {"tied": False, "lora": None, "vocab_size": VOCABULARY + 8},
    "adapters and ids added": {"tied": False, "lora": LORA, "vocab_size": VOCABULARY + 8},
    "adapters and ids added, tied": {"tied": True, "lora": LORA, "vocab_size": VOCABULARY + 8},
    "Qwen-1, adapters with one A": {"tied": False, "lora": replace(LORA, target="c_attn|w1|w2")},
}


def case_config(folder: Path, case: str, stage: int) -> RunConfig:
    """Random towers before a language model that is read from a folder."""
    made = CASES[case]
    model = model_config("projector", "language", tied=made["tied"], lora=made["lora"])
    language = LanguageConfig(pretrained=str(folder / case), vocab_size=made.get("vocab_size", 0))
    return run_config(replace(model, language=language), zero_stage=stage)


def write_language(folder: Path, config: ModelConfig) -> None:
    """A language model as transformers writes it, in several files."""
    model = build_model(replace(config, seed=11))
    model.language.save_pretrained(folder, max_shard_size="10KB")


def start(config: RunConfig, earlier: Path | None = None) -> Built:
    prepare_process("cpu")
    chain = find_chain(str(earlier) if earlier else "")
    return build_on(config.model, chain, deepspeed_engine.loading_of(config))


def run(
    model: VisionLanguageModel, config: RunConfig, rank: int, steps: range
) -> tuple[list[Taken], Any]:
    settings = deepspeed_engine.deepspeed_settings(config)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = deepspeed_engine.initialize(model, build_optimizer(model, config.optim), settings)
    return go_on(engine, rank, steps), engine


def go_on(engine: Any, rank: int, steps: range) -> list[Taken]:
    probe, taken = Probe(engine), list[Taken]()
    for ranks in random_steps(STEPS, seed=0)[steps.start : steps.stop]:
        batches = [to_device(batch, CPU) for batch in ranks[rank]]
        tokens = global_tokens(ranks)
        loss = train_step(probe, batches, global_tokens=tokens, world_size=2)
        dist.all_reduce(loss)
        taken.append((float(loss) / tokens, probe.gradients))
    return taken


def worker(rank: int, place: str) -> None:
    """Every case: what is held, its fingerprint, its losses, resumed under stages 2 and 3."""
    folder = Path(place)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for case in CASES:
        config = case_config(folder, case, 3)
        built = start(config)
        model = built.model
        shared = [p for p in model.language.parameters() if hasattr(p, "ds_id")]
        found: dict[str, Any] = {
            "shared": sum(np.prod(shape_of(p)) for p in shared),
            "held": sum(p.numel() for p in shared),
            "frozen": built.frozen,
        }
        found["first"], engine = run(model, config, rank, range(2))
        state = CheckpointState(
            frozen={"form": FORM, "weights": built.frozen}, config=plain_settings(config), files={}
        )
        saved = folder / f"{case}-run"
        checkpoint.save(engine, saved, 2, state, keep=1)
        dist.barrier()
        newest = latest_checkpoint(saved)
        assert newest is not None
        for stage in (2, 3):
            again = case_config(folder, case, stage)
            model = start(again).model
            checkpoint.load_weights(newest, model)
            engine = run(model, again, rank, range(0))[1]
            checkpoint.load_into(engine, newest)
            found[f"resumed {stage}"] = go_on(engine, rank, range(2, STEPS))
        began = start(config, saved)
        assert began.start is not None
        found["started"] = run(began.model, config, rank, range(1))[0]
        if rank == 0:
            torch.save(found, folder / f"{case}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    for case, made in CASES.items():
        if case.startswith("Qwen-1"):
            write_qwen1(folder / case)
        else:
            write_language(folder / case, model_config("language", tied=made["tied"]))
    spawn(worker, (str(folder),), nprocs=2)
    return folder


def plain_pytorch(model: VisionLanguageModel, config: RunConfig, steps: range) -> list[Taken]:
    """The same global batches in one process, on a model that was read as a whole."""
    optimizer, taken = build_optimizer(model, config.optim), list[Taken]()
    learns = trainable_parameters(model)
    for ranks in random_steps(STEPS, seed=0)[steps.start : steps.stop]:
        batches = [to_device(batch, CPU) for micros in ranks for batch in micros]
        loss = sum(model(**batch.inputs) for batch in batches) / global_tokens(ranks)
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in learns.items()
        }
        torch.nn.utils.clip_grad_norm_(learns.values(), config.optim.grad_clip)
        optimizer.step()
        taken.append((loss.item(), gradients))
    return taken


def assert_same(found: list[Taken], expected: list[Taken]) -> None:
    """Losses and every gradient within 1e-5."""
    for step, ((loss, here), (loss_there, there)) in enumerate(zip(found, expected, strict=True)):
        assert abs(loss - loss_there) <= 1e-5, step
        assert here.keys() == there.keys()
        for name, gradient in there.items():
            worst = (gradient - here[name]).abs().max().item()
            assert worst <= 1e-5, f"step {step}, {name}: {worst}"


@pytest.mark.parametrize("case", list(CASES))
def test_a_model_that_is_shared_while_it_is_read_is_the_same(case: str, shared_runs: Path) -> None:
    config = case_config(shared_runs, case, 2)
    assert deepspeed_engine.loading_of(config) is nullcontext
    built = build_on(config.model, find_chain(""))
    model = built.model
    found = torch.load(shared_runs / f"{case}.pt", weights_only=False)
    assert found["frozen"] == built.frozen
    expected = plain_pytorch(model, config, range(STEPS))
    resumed = found["first"] + found["resumed 3"]
    assert_same(resumed, expected)
    assert_same(found["resumed 2"], expected[2:])
    after_two = build_on(config.model, find_chain(str(shared_runs / f"{case}-run"))).model
    assert_same(found["started"], plain_pytorch(after_two, config, range(1)))


@pytest.mark.parametrize("case", list(CASES))
def test_no_worker_holds_what_is_read(case: str, shared_runs: Path) -> None:
    found = torch.load(shared_runs / f"{case}.pt", weights_only=False)
    model = build_model(case_config(shared_runs, case, 2).model)
    all_of_it = sum(p.numel() for n, p in model.language.named_parameters() if not is_adapter(n))
    made = CASES[case]  # new tables are whole at first
    grown = (1 if made["tied"] else 2) * 24 * (VOCABULARY + 8) if "vocab_size" in made else 0
    assert found["shared"] == all_of_it - grown
    assert found["held"] == 0


def test_the_driver_does_not_build_what_no_worker_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = small_dataset(tmp_path)
    config = small_run(
        dataset,
        tmp_path / "run",
        zero_stage=3,
        num_workers=1,
        launcher="process",
        micro_batch_size=4,
    )
    built = preflight(config)
    monkeypatch.setattr(preflight_module, "MEASURED", 1)  # what is large
    monkeypatch.setattr(preflight_module, "build_start", lambda config: pytest.fail("it was built"))
    seen = preflight(config)
    assert built.step_seconds is not None
    assert replace(built, step_seconds=None) == seen
