"""What is recomputed, what lies on the host and the micro-batch follow from a budget."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch._subclasses.fake_tensor import FakeTensor

from lapilli.data.dataset.dataset import open_dataset
from lapilli.model.config import ActivationPolicy, LoraConfig
from lapilli.model.parts.recomputation import apply_policy
from lapilli.model.parts.trainable import set_modes, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from lapilli.train.config import RunConfig
from lapilli.train.device import Device, prepare_process
from lapilli.train.driver.launching import launch
from lapilli.train.driver.memory_estimate import Estimate, RowSizes, estimate_run, sketch_run
from lapilli.train.driver.memory_policy import GIB, choose_memory, memory_budget
from lapilli.train.driver.preflight import preflight
from lapilli.train.engine import deepspeed_engine
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.settings import read_run_info
from lapilli.train.steps.optim import build_optimizer
from lapilli.train.steps.step import to_device, train_step
from pipelines.train import print_preflight
from tests.train.ready_processes import spawn
from tests.train.small_run import small_dataset, small_run
from tests.train.tiny import global_tokens, model_config, random_steps, run_config

EVERYTHING: Any = ("vision", "projector", "language")
LENGTH = 32


def estimated(config: RunConfig) -> Estimate:
    return estimate_run(config, sketch_run(config), RowSizes(LENGTH))


def deep_run(**values: Any) -> RunConfig:
    """Four layers in the decoder and two in the tower, all of which learns; a share of 6 rows."""
    model = model_config(*EVERYTHING)
    model.language.settings["num_hidden_layers"] = 4
    model.vision.settings["num_hidden_layers"] = 3  # the last is not run
    given: dict[str, Any] = {"global_batch_size": 12, "micro_batch_size": 6, **values}
    return run_config(model, **given)


@pytest.mark.parametrize(
    ("memory", "device", "expected"),
    [("auto", "cpu", None), ("auto", "cuda", 900), (2.0, "cpu", 2 * GIB), (2.0, "cuda", 2 * GIB)],
)
def test_a_budget_is_what_is_asked_for_or_most_of_the_device(
    memory: Any, device: Device, expected: int | None
) -> None:
    config = deep_run(memory=memory)
    assert memory_budget(config, device, {"cpu": None, "cuda": 1000}.get) == expected


@pytest.mark.parametrize("memory", [0, -3.5, float("inf"), float("nan")])
def test_a_budget_that_is_none_is_refused(memory: float) -> None:
    with pytest.raises(TrainError, match=r"memory: .*; expected auto, or more than 0 GiB"):
        deep_run(memory=memory)


LEAN = ActivationPolicy({"vision": 2, "language": 4}, offload=True)  # of `deep_run`


def test_less_memory_recomputes_more_then_offloads_then_is_refused() -> None:
    config = deep_run()
    found = estimated(config)
    most, least = (found.worker_bytes(2, 6, policy) for policy in (ActivationPolicy(), LEAN))
    seen: list[tuple[bool, int]] = []
    for budget in [*range(most, least, (least - most) // 40), least]:
        chosen, policy = choose_memory(config, "cuda", budget, lambda _: found)
        assert chosen == config
        assert policy.estimated is not None
        assert policy.estimated <= budget
        flops = found.activations(6).extra_flops(policy.activations)
        seen.append((policy.activations.offload, flops))
    assert seen == sorted(seen)
    assert seen[0] == (False, 0)
    assert seen[-1] == (True, found.activations(6).extra_flops(LEAN))
    assert len({*seen}) > 6
    with pytest.raises(TrainError, match=r"needs at least .*: with micro_batch_size \d "):
        choose_memory(config, "cuda", least - 1, lambda _: found)


def test_a_micro_batch_that_follows_is_the_largest_that_fits_without_the_host() -> None:
    config = deep_run(micro_batch_size=0)
    found = estimated(config)
    chosen, policy = choose_memory(config, "cpu", None, lambda _: found)
    assert (chosen.micro_batch_size, policy.activations) == (6, ActivationPolicy())
    assert policy.note == "memory: auto sets no bound on a CPU; no layer is recomputed"
    sizes = list[int]()
    most, least = found.worker_bytes(2, 6), found.worker_bytes(2, 1, LEAN)
    for budget in [*range(most, least, (least - most) // 60), least]:
        chosen, policy = choose_memory(config, "cuda", budget, lambda _: found)
        sizes.append(chosen.micro_batch_size)
        assert chosen.accumulation * chosen.micro_batch_size * 2 == chosen.global_batch_size
        without = found.worker_bytes(2, 1, replace(LEAN, offload=False))
        assert policy.activations.offload == (budget < without)
    assert {*sizes} == {1, 2, 3, 6}


def test_a_worker_of_the_fewest_that_a_run_goes_on_with_fits() -> None:
    config = deep_run(zero_stage=1, micro_batch_size=3)
    fewest = replace(config, recovery=replace(config.recovery, min_workers=1))
    alone = replace(config, num_workers=1)
    assert estimated(fewest).worker_bytes(1, 3) == estimated(alone).worker_bytes(1, 3)
    assert estimated(fewest).worker_bytes(1, 3) > estimated(config).worker_bytes(1, 3)


def test_a_refusal_names_what_would_fit_and_how_much_it_takes() -> None:
    config = deep_run(global_batch_size=64, micro_batch_size=1, precision="bf16", memory=1.0)
    over = replace(config, zero_stage=3, num_workers=8)
    budget = estimated(over).worker_bytes(3, 1, LEAN)
    with pytest.raises(TrainError) as refused:
        choose_memory(config, "cuda", budget, estimated)
    said = str(refused.value)
    assert "\n" not in said
    assert f"with ZeRO-3 over 8 devices {budget / GIB:.3g} GiB" in said
    assert "over 4 devices" not in said
    assert "over 16 devices" not in said
    least = estimated(config).worker_bytes(2, 1, LEAN)
    assert f"under zero_stage 2 needs at least {least / GIB:.3g} GiB" in said
    adapted = estimated(replace(config, model=replace(config.model, lora=LoraConfig(rank=1))))
    fits = adapted.worker_bytes(2, 1, LEAN)
    with pytest.raises(TrainError, match=rf"with lora {fits / GIB:.3g} GiB, .*or less with a smal"):
        choose_memory(
            config, "cuda", fits, lambda c: adapted if c.model.lora else estimated(config)
        )


def test_a_compiled_layer_is_not_offloaded() -> None:
    config = deep_run()
    config = replace(config, model=replace(config.model, compile="blocks"))
    found = estimated(config)
    lean = replace(LEAN, offload=False)
    least = found.worker_bytes(2, 6, lean)
    _, policy = choose_memory(config, "cuda", least, lambda _: found)
    assert policy.activations == lean
    with pytest.raises(TrainError, match="needs at least"):
        choose_memory(config, "cuda", least - 1, lambda _: found)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"), images=8, text_only=4)


def one_worker(dataset: Path, run: Path, **values: Any) -> RunConfig:
    given: dict[str, Any] = {"num_workers": 1, "launcher": "process", "max_steps": 3, **values}
    return small_run(dataset, run, **given)


@pytest.mark.parametrize(
    "policy", [ActivationPolicy({"language": 1}), ActivationPolicy({"language": 2}, offload=True)]
)
def test_a_run_within_a_budget_has_the_losses_of_one_without(
    policy: ActivationPolicy, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = one_worker(dataset, tmp_path / "free")
    launch(preflight(free))
    config = replace(free, output=str(tmp_path / "bound"), memory=needed(free, policy) / GIB)
    ready = preflight(config)
    assert ready.memory_policy.activations == policy
    print_preflight(config, ready)
    assert ready.memory_policy.note in " ".join(capsys.readouterr().out.split())
    launch(ready)
    info = read_run_info(tmp_path / "bound")
    assert info is not None
    assert (info.activations, info.memory_note) == (policy, ready.memory_policy.note)
    rows = [read_metrics(Path(run.output)) for run in (free, config)]
    assert [r.loss for r in rows[0]] == [r.loss for r in rows[1]]
    assert [r.grad_norm for r in rows[0]] == [r.grad_norm for r in rows[1]]


def needed(config: RunConfig, policy: ActivationPolicy) -> int:
    """Bytes of a run's longest micro-batch under a policy, and one for rounding."""
    opened = open_dataset(config.dataset, view=config.view, image_tokens=4)
    longest, most = int(opened.lengths.max()), int(opened.num_trained.max())
    found = estimate_run(config, sketch_run(config), RowSizes(longest, most))
    return found.worker_bytes(config.zero_stage, config.micro_batch_size, policy) + 1


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("memory", ["auto", 3.0])
def test_no_memory_left_in_a_step_is_one_line_with_what_to_set(
    kind: str, memory: Any, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's error is made up; the host's is that of torch's own allocator."""
    config = one_worker(dataset, tmp_path / "run", micro_batch_size=4, memory=memory)
    forward, calls = VisionLanguageModel.forward, list[tuple[int, ...]]()

    def planted(model: VisionLanguageModel, *given: Any, **named: torch.Tensor) -> torch.Tensor:
        loss = forward(model, *given, **named)
        if named["input_ids"].device.type == "cpu" and not isinstance(loss, FakeTensor):
            calls.append((*named["input_ids"].shape, len(named["pixels"])))
            if len(calls) == 3:
                if kind == "cpu":
                    torch.empty(2**60)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0")
        return loss

    ready = preflight(config)
    monkeypatch.setattr(VisionLanguageModel, "forward", planted)
    with pytest.raises(TrainError) as refused:
        launch(ready)
    said = str(refused.value)
    rows, tokens, images = calls[2]
    assert "\n" not in said
    assert f"memory: none left for a micro-batch of {rows} x {tokens} tokens with {images}" in said
    found = estimate_run(config, sketch_run(config), RowSizes(tokens))
    taken = found.worker_bytes(2, rows)
    assert f"estimated at {taken / GIB:.3g} GiB a worker" in said
    assert ("Tried to allocate 2 GiB" if kind == "cuda" else "you tried to allocate") in said
    assert "set micro_batch_size: 2, the largest that is estimated to fit, or memory: " in said
    proposed = float(said.rpartition("memory: ")[2].split()[0])
    assert proposed == pytest.approx(0.9 * taken / GIB, rel=0.01)
    again = preflight(replace(config, output=str(tmp_path / "again"), memory=proposed))
    assert again.memory_policy.activations.recompute["language"] > 0


POLICIES = {
    "kept": ActivationPolicy(),
    "some": ActivationPolicy({"vision": 1, "language": 1}),
    "host": ActivationPolicy({"vision": 1, "language": 2}, offload=True),
}
ADAPTED = run_config(model_config(*EVERYTHING, lora=LoraConfig(rank=2, alpha=8, dropout=0.0)))


def whole_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 weight on every rank, by DeepSpeed's own function."""
    found = safe_get_full_fp32_param(parameter)
    return (parameter.detach() if found is None else found).float().clone()


def worker(rank: int, folder: str) -> None:
    """Adapters under each stage and policy; rank 0 writes losses and weights, and what it holds."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    steps = random_steps(4, seed=0)
    for stage in (0, 3):
        for name, policy in POLICIES.items():
            config = replace(ADAPTED, zero_stage=stage)
            prepare_process("cpu")
            model = build_model(config.model)
            apply_policy(model, policy)
            set_modes(model)
            settings = deepspeed_engine.deepspeed_settings(config)
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            optimizer = build_optimizer(model, config.optim)
            engine = deepspeed_engine.initialize(model, optimizer, settings)
            losses: list[float] = []
            for ranks in steps:
                batches = [to_device(batch, torch.device("cpu")) for batch in ranks[rank]]
                tokens = global_tokens(ranks)
                loss = train_step(engine, batches, global_tokens=tokens, world_size=2)
                dist.all_reduce(loss)
                losses.append(float(loss))
            learnt = trainable_parameters(engine.module)
            weights = {n: whole_weight(p) for n, p in learnt.items()}
            if rank == 0:
                torch.save((losses, weights), f"{folder}/{stage}-{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    spawn(worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("policy", ["some", "host"])
def test_two_workers_take_the_same_steps_whatever_is_kept(
    stage: int, policy: str, stages: Path
) -> None:
    wanted, found = (torch.load(stages / f"{stage}-{name}.pt") for name in ("kept", policy))
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    for name, weight in wanted[1].items():
        assert torch.equal(found[1][name], weight), name
