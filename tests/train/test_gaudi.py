"""Runs on Gaudi's bridge, which is a CPU here: order of calls, environment, optimizer, refusals.

No Gaudi is asked. What is compared is that a run calls what the bridge offers where lazy mode needs
it, and computes the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lapilli.train.config import (
    CheckpointConfig,
    CommunicationConfig,
    HpuConfig,
    RunConfig,
    ValidationConfig,
)
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.driver.launching import launch
from lapilli.train.driver.preflight import preflight
from lapilli.train.driver.workers import fit_on_ray, join_alone
from lapilli.train.engine.communication import communication_settings
from lapilli.train.engine.deepspeed_engine import deepspeed_settings
from lapilli.train.errors import TrainError
from lapilli.train.gaudi import (
    check_stage,
    fused_adamw,
    hpu_environment,
    ignored_line,
    set_environment,
)
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.settings import read_run_info
from lapilli.train.steps import host_copy
from lapilli.train.worker import loop
from tests.device_reads import Read, device_reads
from tests.train.on_gaudi import on_gaudi
from tests.train.small_run import small_dataset, small_run

STEPS, MICRO_STEPS = 4, 2
GROUPS = 4  # that learn, with weight decay and without: ZeRO-2 updates one after the other
LAZY = HpuConfig(
    lazy=True, graphs=True, optimizer="FusedAdamW",
    environment={"PT_HPU_MAX_COMPOUND_OP_SIZE": "10"},
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What a run did.

    Attributes:
        losses: By step.
        calls: What was called, in order: the bridge's functions, backward and step of the engine.
        reads: Of the device, by step: `file:line function`.
        environment: As it was when the bridge was imported.
        shapes: Of the tensors that the model was given.
        recorded: The environment that the run's folder tells.
    """

    losses: Sequence[float]
    calls: Sequence[str]
    reads: Sequence[Sequence[str]]
    environment: dict[str, str]
    shapes: set[str]
    recorded: dict[str, str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("gaudi"), images=9, text_only=6)


@pytest.fixture(scope="module", autouse=True)
def _engine_of_this_process() -> Generator[None]:
    """DeepSpeed keeps the accelerator and the process group that it first sees: the CPU's."""
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        from deepspeed.accelerator import get_accelerator

        get_accelerator()
        join_alone("cpu")
        yield


def config_for(dataset: Path, output: Path, **values: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "num_workers": 1, "micro_batch_size": 2, "global_batch_size": 2 * MICRO_STEPS,
        "epochs": 1, "max_steps": STEPS, "max_shapes": 1, "max_length": 400, "launcher": "process",
        "memory": 8.0,
        "checkpoint": CheckpointConfig(every=99), "zero_stage": 2,
        "validation": ValidationConfig(every=STEPS, samples=4, dataset=str(dataset)), **values,
    }  # fmt: skip
    return small_run(dataset, output, **settings)


def spied(calls: list[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(*args, **kwargs)

    return call


def take(config: RunConfig) -> Ran:
    """Run, and look at what is called, read and given to the model."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from lapilli.model.vlm import VisionLanguageModel

    reads: list[list[Read]] = []
    shapes: set[str] = set()
    forward, take_step = VisionLanguageModel.forward, loop.take_step

    def seen(model: Any, **inputs: Any) -> Any:
        shapes.add(str({name: tuple(tensor.shape) for name, tensor in inputs.items()}))
        return forward(model, **inputs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with device_reads() as found:
            taken = take_step(*args, **kwargs)
        reads.append(found)
        return taken

    is_hpu = config.device == "hpu"
    with ExitStack() as stack:
        calls = stack.enter_context(on_gaudi() if is_hpu else nullcontext(list[str]()))
        for name in ("backward", "step"):
            method = spied(calls, name, getattr(DeepSpeedEngine, name))
            stack.enter_context(patch.object(DeepSpeedEngine, name, method))
        stack.enter_context(patch.dict(os.environ))
        ready = preflight(config)
        calls.clear()
        stack.enter_context(patch.object(VisionLanguageModel, "forward", seen))
        stack.enter_context(patch.object(loop, "take_step", watched))
        launch(ready)
        core: Any = importlib.import_module("habana_frameworks.torch.core") if is_hpu else None
        environment = dict(core.ENVIRONMENT) if core else {}
    run = Path(config.output)
    info = read_run_info(run)
    assert info is not None
    return Ran(
        losses=[row.loss for row in read_metrics(run)],
        calls=list(calls),
        reads=[[read.where for read in step] for step in reads],
        environment=environment,
        shapes=shapes,
        recorded=info.environment,
    )


@pytest.fixture(scope="module")
def ran(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """The same run on a CPU, on a Gaudi in eager mode, and in lazy mode with all there is.

    The last one twice: whole, and in two halves.
    """
    folder = tmp_path_factory.mktemp("runs")
    config = config_for(dataset, folder / "cpu")
    eager = replace(config, output=str(folder / "eager"), device="hpu")
    lazy = replace(eager, output=str(folder / "lazy"), hpu=LAZY)
    halves = replace(lazy, output=str(folder / "halves"))
    take(replace(halves, max_steps=STEPS // 2))
    return {
        "cpu": take(config), "eager": take(eager), "lazy": take(lazy), "resumed": take(halves),
    }  # fmt: skip


def test_eager_mode_is_the_default_and_computes_the_same(ran: dict[str, Ran]) -> None:
    assert ran["eager"].losses == ran["cpu"].losses
    assert not {"mark_step", "graph", "fused_adamw"} & {*ran["eager"].calls}
    assert ran["eager"].environment["PT_HPU_LAZY_MODE"] == "0"
    assert ran["eager"].recorded == {"PT_HPU_LAZY_MODE": "0"}
    assert ran["cpu"].recorded == {}


def test_lazy_mode_computes_the_same_with_the_fused_optimizer(ran: dict[str, Ran]) -> None:
    """Within what its epsilon makes: it is added before the moment is corrected, not behind."""
    assert ran["lazy"].losses == pytest.approx(ran["cpu"].losses, rel=2e-4)
    assert "fused_adamw" in ran["lazy"].calls


def test_a_run_goes_on_with_the_fused_optimizers_moments(ran: dict[str, Ran]) -> None:
    assert len(ran["resumed"].reads) == STEPS // 2
    assert ran["resumed"].losses == ran["lazy"].losses


def test_lazy_mode_flushes_after_each_backward_and_after_the_update(ran: dict[str, Ran]) -> None:
    """A step's last flush sends its numbers to the host, before the mark that is waited for."""
    micro = ["graph", "backward", "mark_step", "step"]
    step = [*micro * MICRO_STEPS, *["fused_adamw"] * GROUPS, "mark_step", "mark_step"]
    kinds = {"graph", "backward", "mark_step", "step", "fused_adamw"}
    calls = [call for call in ran["lazy"].calls if call in kinds]
    warm_up = ["graph", "mark_step"]
    assert calls[:2] == warm_up
    taken = calls[2 : 2 + STEPS * len(step)]
    assert taken == step * STEPS
    assert calls[2 + STEPS * len(step) :] == ["graph", "mark_step"] * 3  # validation's batches


def test_the_copy_of_a_steps_numbers_is_flushed_before_its_mark() -> None:
    calls: list[str] = []
    mark = spied(calls, "mark", host_copy.Mark)
    with patch.object(host_copy, "Mark", mark):
        host_copy.HostCopy(torch.zeros(2), lambda: calls.append("flush"))
    assert calls == ["flush", "mark"]


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_a_run_has_one_shape_with_warm_up_last_batch_and_validation(
    mode: str, ran: dict[str, Ran]
) -> None:
    assert len(ran[mode].shapes) == 1, ran[mode].shapes


def test_a_step_reads_nothing_of_the_device(ran: dict[str, Ran]) -> None:
    """But for DeepSpeed's question after the norm that it clips by (`test_engine_reads.py`).

    The optimizer's count of steps lies on the host.
    """
    assert len(ran["lazy"].reads) == STEPS
    assert [len(step) for step in ran["eager"].reads] == [len(step) for step in ran["cpu"].reads]
    for read in [read for step in ran["lazy"].reads for read in step]:
        assert read.endswith(" is_invalid_grad_norm") or "lapilli/train/gaudi.py" in read, read


def test_the_environment_is_there_before_the_bridge_and_recorded(ran: dict[str, Ran]) -> None:
    block = {"PT_HPU_MAX_COMPOUND_OP_SIZE": "10", "PT_HPU_LAZY_MODE": "1"}
    assert block.items() <= ran["lazy"].environment.items()
    assert ran["lazy"].recorded == block == hpu_environment(LAZY)


def test_a_bridge_that_is_imported_otherwise_is_one_line() -> None:
    with on_gaudi(), patch.dict(os.environ):
        set_environment(HpuConfig())
        torch_device("hpu")
        set_environment(HpuConfig())
        with pytest.raises(TrainError, match=r"hpu\.lazy: .*PT_HPU_LAZY_MODE=0, expected 1"):
            set_environment(HpuConfig(lazy=True))
        with pytest.raises(TrainError, match=r"hpu\.environment\.A: .*A=None, expected 1"):
            set_environment(HpuConfig(environment={"A": "1"}))


def test_workers_are_started_with_the_environment(dataset: Path, tmp_path: Path) -> None:
    """Ray imports the bridge in a worker before our code: its actors get the variables."""
    given: dict[str, Any] = {}

    class Told(Exception): ...

    def trainer(*args: Any, run_config: Any, **kwargs: Any) -> Any:
        given.update(run_config.worker_runtime_env)
        raise Told

    config = config_for(dataset, tmp_path, launcher="ray", device="hpu", hpu=LAZY)
    policy: Any = None
    with patch("lapilli.train.driver.ray_internals.Trainer", trainer), pytest.raises(Told):
        fit_on_ray(config, "hpu", policy)
    assert given == {"env_vars": hpu_environment(LAZY)}


@pytest.mark.faults  # for its length
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_torchs_and_habanas_optimizer_go_on_from_each_others_checkpoints(
    stage: int, dataset: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"zero_stage": stage, "validation": ValidationConfig()}
    whole = config_for(dataset, tmp_path / "whole", **values)
    fused = replace(whole, device="hpu", hpu=HpuConfig(optimizer="FusedAdamW"))
    expected = take(whole).losses
    for first, then in ((fused, fused), (whole, fused), (fused, whole)):
        output = str(tmp_path / f"{first.device} {then.device}")
        take(replace(first, output=output, max_steps=2))
        found = take(replace(then, output=output)).losses
        assert found == pytest.approx(expected, rel=2e-4)


def test_a_group_that_is_updated_in_pieces_counts_its_steps_once() -> None:
    """As ZeRO-3 does it: each piece is the group's only parameter while it is updated."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    twin = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    torchs = torch.optim.AdamW(twin, lr=0.1, weight_decay=0.1)
    with on_gaudi(), patch.dict(os.environ):
        group: dict[str, Any] = {"params": [first, second], "lr": 0.1, "weight_decay": 0.1}
        ours = fused_adamw([group], lr=0.1, betas=(0.9, 0.999))
        for step in range(3):
            for number, piece in enumerate((first, second)):
                piece.grad = torch.full((3,), 1.0 + step + number)
                twin[number].grad = piece.grad.clone()
                ours.param_groups[0]["params"] = [piece]
                ours.step()
            torchs.step()
    for mine, other in zip((first, second), twin, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"graphs": True}, r"hpu\.graphs: true with hpu\.lazy false"),
        ({"environment": {"PT_HPU_LAZY_MODE": "1"}}, r"PT_HPU_LAZY_MODE: set hpu\.lazy instead"),
        ({"environment": {"a b": "1"}}, r"'a b'; expected the name of an environment variable"),
    ],
)
def test_settings_that_cannot_be_are_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainError, match=words) as said:
        HpuConfig(**values)
    assert "\n" not in str(said.value)


def test_graphs_and_fetched_weights_are_refused(dataset: Path, tmp_path: Path) -> None:
    config = config_for(dataset, tmp_path, device="hpu", hpu=LAZY, zero_stage=3)
    with pytest.raises(TrainError, match=r"hpu\.graphs: true with zero_stage 3"):
        check_stage(config, "hpu")
    check_stage(config, "cpu")


def test_settings_of_gaudi_elsewhere_are_said(dataset: Path, tmp_path: Path) -> None:
    assert ignored_line(LAZY, "hpu") == ignored_line(HpuConfig(), "cpu") == ""
    told: list[str] = []
    config = config_for(dataset, tmp_path / "run", hpu=LAZY, validation=ValidationConfig())
    preflight(config, told.append)
    assert "hpu: its settings are for Gaudi and do nothing on cpu" in told


def test_auto_finds_the_hpu() -> None:
    with on_gaudi(), patch.dict(os.environ):
        assert choose_device("auto", visible_devices()) == ("cuda" if _has_gpu() else "hpu")


def _has_gpu() -> bool:
    return torch.cuda.is_available()


@pytest.mark.parametrize(
    ("stage", "own", "expected"),
    [
        (2, {}, {"overlap_comm": False}),
        (2, {"allgather_partitions": False}, {"allgather_partitions": False}),
        (3, {"reduce_scatter": False}, {"reduce_scatter": False, "overlap_comm": False}),
        (3, {"overlap_comm": True}, {"overlap_comm": True}),
    ],
)
def test_deepspeeds_settings_are_passed_through(
    stage: Any, own: dict[str, Any], expected: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    communication = CommunicationConfig(**own)
    values: dict[str, Any] = {"zero_stage": stage, "num_workers": 2, "launcher": "ray"}
    config = config_for(dataset, tmp_path, communication=communication, **values)
    settings = deepspeed_settings(config, communication_settings(config, 64, "hpu"))
    assert expected.items() <= settings["zero_optimization"].items()
    assert settings["zero_optimization"]["stage"] == stage
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    made = DeepSpeedZeroConfig(**settings["zero_optimization"])
    assert all(getattr(made, name) == value for name, value in own.items())


@pytest.mark.parametrize("stage", [0, 3])
def test_settings_of_other_stages_are_refused(stage: Any, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"allgather_partitions: False with zero_stage"):
        config_for(
            dataset, tmp_path, zero_stage=stage,
            communication=CommunicationConfig(allgather_partitions=False),
        )  # fmt: skip
