"""Every private name of Ray, DeepSpeed, torch, transformers and bitsandbytes is there, and works.

What is used, and why no public way exists, stands in the modules called `*_internals`. Upper bounds
in pyproject.toml keep a newer minor release out until these tests have passed with it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lapilli.data import ray_internals
from lapilli.data.text.chat_template.transformers_internals import (
    template_environment,
    with_reasoning_aliases,
)
from lapilli.model import torch_internals, transformers_internals
from lapilli.train.engine import deepspeed_internals as zero


def ask(script: str) -> Any:
    """What a fresh process prints as JSON: there nothing has been imported or set yet."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# Ray


def source_of(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("RAY_ENABLE_AUTO_CONNECT", "ray._private.auto_init_hook"),
        ("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "ray.data._internal.execution.metadata_fetcher"),
        (ray_internals.NO_CLUSTERS, "ray._private.ray_constants"),
    ],
)
def test_ray_reads_the_variable(name: str, module: str) -> None:
    assert f'"{name}"' in source_of(module)
    assert {*ray_internals.VARIABLES, ray_internals.NO_CLUSTERS} >= {name}


def test_ray_has_a_switch_for_clusters_that_decides_on_the_nodes_address() -> None:
    from ray._private import ray_constants, services

    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(ray_internals.NO_CLUSTERS)
    with ray_internals.on_loopback():
        assert services.get_node_ip_address() in {"127.0.0.1", "::1"} or _has_node()
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    after = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(ray_internals.NO_CLUSTERS)
    assert after == before
    assert "ray_constants.ENABLE_RAY_CLUSTER" in source_of("ray._private.services")


def _has_node() -> bool:
    """Whether this process is joined to a Ray already, whose address is told then."""
    import ray

    return ray.is_initialized()


def test_ray_takes_a_folder_for_its_sessions() -> None:
    import ray

    assert 'kwargs.pop("_temp_dir"' in inspect.getsource(ray.init)


def test_ray_data_looks_at_the_cluster_at_an_interval_that_a_class_holds() -> None:
    manager = importlib.import_module(ray_internals.RESOURCE_MANAGER).ResourceManager
    assert getattr(manager, ray_internals.INTERVAL) > ray_internals.SOON
    assert f"self.{ray_internals.INTERVAL}" in inspect.getsource(manager)


def test_ray_data_asks_for_nodes_by_a_method_that_takes_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requester = getattr(importlib.import_module(ray_internals.COORDINATOR), ray_internals.REQUESTER)
    scaling = "ray.data._internal.cluster_autoscaler.rate_based_cluster_autoscaler"
    assert "self._autoscaling_coordinator.request_resources(\n            resources=" in source_of(
        scaling
    )
    asked: list[dict[str, Any]] = []
    names = [*inspect.signature(requester.request_resources).parameters]
    assert {"resources", "expire_after_s", "label_selectors"} <= {*names}

    def request(self: Any, **named: Any) -> None:
        asked.append(named)

    monkeypatch.setattr(requester, "request_resources", request)
    with ray_internals.within_pool({"pool": "cpu"}, {"disk": 1}):
        requester.request_resources(None, resources=[{"CPU": 1}] * 2, expire_after_s=5)
    with ray_internals.within_pool({}, {}):
        requester.request_resources(None, resources=[{"CPU": 1}])
    one, labels = {"CPU": 1, "disk": 1}, {"pool": "cpu"}
    assert asked == [
        {"resources": [one, one], "label_selectors": [labels, labels], "expire_after_s": 5},
        {"resources": [{"CPU": 1}]},
    ]
    assert requester.request_resources is request


def test_ray_tells_of_nodes_that_are_drained_where_ray_train_looks() -> None:
    internal: Any = importlib.import_module("ray._private.state")
    assert callable(internal.state.get_draining_nodes)
    watcher = source_of("ray.train.v2._internal.execution.preemption")
    assert "ray._private.state.state.get_draining_nodes()" in watcher


def test_rays_autoscaler_names_the_placement_groups_that_it_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    messages = importlib.import_module("ray.core.generated.autoscaler_pb2")
    clients = importlib.import_module("ray._raylet")
    reply = messages.GetClusterStatusReply()
    state = reply.autoscaling_state
    state.autoscaler_state_version = 7
    state.infeasible_gang_resource_requests.add().details = "47fc8128:PACK|PENDING"
    state.pending_instance_requests.add().count = 2
    state.pending_instances.add().details = "allocated unmanaged cloud instance :1 (HEAD) from"
    assert hasattr(clients.InnerGcsClient, "get_cluster_status")
    answer = SimpleNamespace(get_cluster_status=lambda timeout_s: reply.SerializeToString())
    monkeypatch.setattr(clients, "GcsClient", lambda address: answer)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=""))
    found = ray_internals.autoscaler()
    assert found.is_there
    assert (found.version, found.adding, found.refused) == (7, 2, {"47fc8128"})
    assert found.refuses("47fc8128")


@pytest.mark.parametrize("dashboard", ["", "127.0.0.1:8265"])
def test_rays_helpers_are_left_out_by_their_names(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train.torch import TorchTrainer

    from lapilli.train.driver import ray_internals as internals

    def helpers(trainer: Any) -> set[str]:
        return {type(callback).__name__ for callback in trainer._create_default_callbacks()}

    monkeypatch.setattr(internals, "get_dashboard_url", lambda: dashboard)
    gone = {"DatasetsCallback"} | (set() if dashboard else {"PlacementGroupCleanerCallback"})
    assert helpers(TorchTrainer(print)) - helpers(internals.Trainer(print)) == gone


def test_ray_calls_an_error_of_a_worker_by_its_name() -> None:
    from ray.train import TrainingFailedError  # the public half
    from ray.train.v2._internal import exceptions

    from lapilli.train.driver.ray_internals import raised_by_worker

    raised = exceptions.UserExceptionWithTraceback(ValueError("x"), "x")
    assert raised_by_worker(raised)
    assert not raised_by_worker(exceptions.WorkerHealthCheckFailedError("x", RuntimeError("x")))
    assert issubclass(TrainingFailedError, Exception)


# torch


def test_fake_tensors_are_made_left_and_kept_quiet() -> None:
    with torch_internals.FakeTensorMode() as mode, torch_internals.set_tensor_data():
        layer = nn.Linear(2, 3).to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
        with torch_internals.unset_fake_temporarily() as active:
            assert active is mode
            assert type(torch.ones(2)) is torch.Tensor
        assert type(torch.ones(2)) is not torch.Tensor


def test_a_dispatch_mode_sees_operations_of_forward_and_backward() -> None:
    seen: list[str] = []

    class Watch(torch_internals.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2, 2, requires_grad=True).mm(torch.ones(2, 2)).sum().backward()
    assert [name for name in seen if name.startswith("mm.")] == ["mm.default"] * 2


def test_only_fake_tensors_need_what_is_put_in_the_place_of_swapping() -> None:
    module: Any = nn.Module
    assert "torch.utils.swap_tensors(param, param_applied)" in inspect.getsource(module._apply)


def test_the_logger_of_fake_tensors_is_the_one_that_is_silenced() -> None:
    module = importlib.import_module(torch_internals.FAKE_TENSOR_LOGGER)
    assert module.log.name == torch_internals.FAKE_TENSOR_LOGGER
    with torch_internals.without_stacks():
        assert module.log.disabled
    assert not module.log.disabled


def test_a_module_holds_its_tensors_where_it_is_said_to() -> None:
    module = nn.BatchNorm1d(2)
    module.own = torch.ones(1)
    parameters, buffers, others = torch_internals.tensor_holders(module)
    assert {*parameters} == {"weight", "bias"}
    assert {*buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    assert "own" in others
    buffers["running_mean"] = torch.ones(2)
    assert torch.equal(module.get_buffer("running_mean"), torch.ones(2))


@pytest.mark.parametrize(("dropout", "kernel"), [(0.0, "flash_attention"), (0.1, "math")])
def test_torch_tells_which_attention_kernel_it_takes(dropout: float, kernel: str) -> None:
    rows = torch.zeros(1, 2, 8, 8)
    choose = torch_internals.fused_attention_choice
    assert choose(rows, rows, None, dropout, shares=False) == kernel


def test_torch_tells_whether_a_processor_computes_fp16_and_keeps_a_gpu_busy() -> None:
    assert torch_internals.computes_fp16() in {True, False}
    assert callable(torch.cuda._sleep)  # pyright: ignore[reportPrivateUsage]


# transformers


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    kind: Any = LlamaConfig
    settings = kind(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(settings)


def test_an_architecture_tells_its_class_and_its_attention() -> None:
    from transformers import LlamaForCausalLM, PreTrainedModel

    model = tiny_llama()
    assert transformers_internals.attention_of(model) == "eager"
    found = transformers_internals.model_class_of(model.config)
    assert found is LlamaForCausalLM
    assert {*transformers_internals.ATTENTION_FLAGS.values()} <= {*vars(PreTrainedModel)}
    assert "sdpa" in transformers_internals.supported_attention(found)
    assert transformers_internals.check_attention(found, model.config, "sdpa") == "sdpa"
    with pytest.raises(ValueError, match="nothing"):
        transformers_internals.check_attention(found, model.config, "nothing")


def test_an_architecture_tells_what_it_keeps_in_fp32() -> None:
    assert not transformers_internals.kept_in_fp32(tiny_llama())


def test_a_layer_of_transformers_runs_by_the_function_that_it_is_given() -> None:
    model, ran = tiny_llama().train(), list[int]()
    for run in (lambda forward, *given: ran.append(1) or forward(*given), None):
        transformers_internals.set_recomputation(model.model.layers[0], run)
        model(torch.ones(1, 3, dtype=torch.long))
        assert len(ran) == 1


def test_experts_are_computed_without_the_grouped_product() -> None:
    module, _, name = transformers_internals.GROUPED_MM.rpartition(".")
    moe = importlib.import_module(module)
    assert [*inspect.signature(getattr(moe, name)).parameters] == ["input", "weight", "offs"]
    assert len(re.findall(rf"\b{name}\(", inspect.getsource(moe))) > 1  # asked, not only defined
    with transformers_internals.without_grouped_mm():
        assert getattr(moe, name)(None, None, None) is False


def test_chat_templates_have_an_environment_and_names_for_reasoning() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = template_environment()
    assert isinstance(environment, ImmutableSandboxedEnvironment)
    assert {"raise_exception", "strftime_now"} <= {*environment.globals}
    said = {"role": "assistant", "content": "a", "reasoning_content": "b"}
    (found,) = with_reasoning_aliases([said])
    assert found["reasoning_content"] == "b"
    assert (found["role"], found["content"]) == ("assistant", "a")


def test_torchs_allocator_has_a_history_and_a_snapshot() -> None:
    memory: Any = torch.cuda.memory
    assert "enabled" in inspect.signature(memory._record_memory_history).parameters
    assert callable(memory._dump_snapshot)


# bitsandbytes, whose names here are not private but stand in no manual


def test_a_layer_in_4_bits_has_the_switch_and_the_state_that_is_read() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    assert layer.support_avx512bf16_for_cpu in {True, False}
    layer.support_avx512bf16_for_cpu = False
    state = layer.to("cpu").weight.quant_state
    assert tuple(state.shape) == (64, 64)
    wanted = {"absmax", "shape", "blocksize", "quant_type"}
    assert wanted <= {*inspect.signature(bitsandbytes.functional.QuantState).parameters}


# DeepSpeed

ENGINES = """
import json, torch
import torch.distributed as dist
from torch import nn
from lapilli.model import deepspeed_internals as leaves
from lapilli.train.device import prepare_process
from lapilli.train.driver.workers import join_alone
from lapilli.train.engine import deepspeed_internals as internals

prepare_process("cpu")
join_alone("cpu")
internals.forgo_shared_memory()
import deepspeed

deepspeed.logger.setLevel("ERROR")
def held(weight, stage):
    if stage == 0:
        return None
    if stage < 3:
        start, moment = internals.own_part(weight, "exp_avg")
        return [start, moment.numel(), internals.own_part(weight, None)[1].numel()]
    assert hasattr(weight, "ds_secondary_tensor")
    return [*internals.own_range_of_shared(weight)[:2], internals.own_weights(weight).numel()]
found = {}
for stage in (0, 1, 2, 3):
    model = nn.Sequential(nn.Linear(4, 4))
    settings = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=settings,
        dist_init_required=False,
    )
    internals.create_moments(engine)
    inner = internals.inner_optimizer(engine)
    flat = [*internals.optimized_tensors(engine)]
    weight = model[0].weight
    found[stage] = {
        "inner": type(inner).__name__,
        "moments": all({*internals.MOMENTS} <= {*inner.state[one]} for one in flat),
        "numbers": sum(one.numel() for one in flat),
        "partitioned": internals.is_partitioned(weight),
        "shared": leaves.is_shared_out(weight),
        "shape": list(leaves.shape_of(weight)),
        "names": dir(engine.optimizer),
        "own": held(weight, stage),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def engines() -> dict[str, dict[str, Any]]:
    return ask(ENGINES)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_holds_state_where_it_is_looked_for(
    stage: int, engines: dict[str, dict[str, Any]]
) -> None:
    found = engines[str(stage)]
    assert found["inner"] == "AdamW"
    assert found["moments"]
    assert found["numbers"] == 20  # 4 x 4 and a bias: one rank has all of them
    assert found["partitioned"] == (stage > 0)
    assert found["shared"] == (stage == 3)
    assert found["shape"] == [4, 4]
    assert found["own"] == (None if stage == 0 else [0, 16, 16])


def test_zero_has_the_names_that_tell_its_stages_apart(engines: dict[str, dict[str, Any]]) -> None:
    def names(stage: int) -> set[str]:
        return {*engines[str(stage)]["names"]}

    early = {
        "params_in_partition",
        "cpu_offload",
        "averaged_gradients",
        "get_param_id",
        "_lazy_init_hp_params_optimizer_state",
    }
    late = {
        "sub_group_to_group_id", "fp16_groups", "offload_optimizer", "averaged_gradients",
        "get_param_id", "_swappable_optimizer_subgroup", "swap_optimizer",
        "_optimizer_states_and_gradient_swap_in", "_optimizer_states_and_gradient_swap_out",
    }  # fmt: skip
    assert names(1) >= early
    assert names(2) >= early
    assert names(3) >= late
    assert "sub_group_to_group_id" not in names(1) | names(2) | names(0)
    assert "params_in_partition" not in names(0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_keeps_fp16s_scale_where_it_is_read(
    stage: int, engines: dict[str, dict[str, Any]]
) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    assert {"loss_scale", "loss_scaler"} <= {*engines[str(stage)]["names"]}
    scaler = DynamicLossScaler(2.0**16, 1000, 1, 1, consecutive_hysteresis=False)
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    state = {"cur_scale": 2.0, "cur_iter": 5, "last_overflow_iter": 3}
    zero.restore_scale(engine, state)
    assert zero.scale_state(engine) == state
    assert scaler.loss_scale == 2
    assert scaler.raise_error_at_min_scale is True
    zero.allow_least_scale(engine)
    assert scaler.raise_error_at_min_scale is False
    assert "self.raise_error_at_min_scale" in inspect.getsource(scaler.update_scale)


def test_deepspeed_names_what_only_an_offloaded_run_has() -> None:
    """Such a run is in tests/train/test_offload.py; here its names are found in the source."""
    stages = [source_of(f"deepspeed.runtime.zero.{name}") for name in ("stage_1_and_2", "stage3")]
    assert all("self.norm_for_param_grads[" in text for text in stages)
    assert "'zero_stage_3'" in stages[1]
    swapper = source_of("deepspeed.runtime.swap_tensor.optimizer_utils")
    assert re.search(r"'optimizer',\s+f'rank\{dist\.get_rank\(\)\}'", swapper)


def test_deepspeed_asks_the_table_before_it_compiles_for_a_cpu() -> None:
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME in deepspeed.ops.__compatible_ops__


def test_a_plain_tensors_shape_is_its_own() -> None:
    from lapilli.model.deepspeed_internals import shape_of

    assert shape_of(torch.ones(2, 3)) == (2, 3)
