"""Parts: what each worker writes at every ZeRO stage, and what another number of workers reads."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.train.checkpoint import protocol
from lapilli.train.checkpoint import save_load as checkpoint
from lapilli.train.checkpoint.find import Checkpoint, latest_checkpoint
from lapilli.train.checkpoint.parts import open_saved, part_name, write_part
from lapilli.train.checkpoint.staging import StagedFragment
from lapilli.train.config import OptimConfig
from lapilli.train.device import prepare_process
from lapilli.train.engine import deepspeed_engine
from lapilli.train.engine.deepspeed_internals import MOMENTS
from lapilli.train.engine.fragments import checkpoint_share, own_range
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import CheckpointFile, CheckpointState
from lapilli.train.steps.optim import build_optimizer
from tests.hostile import is_one_line
from tests.train.ready_processes import spawn
from tests.train.saved import parts, saved_tensors, write_small
from tests.train.tiny import model_config, run_config

STEP = 3
EMPTY = CheckpointState(files={})
Result = dict[str, torch.Tensor]


class Odd(nn.Module):
    """Parameters that neither two nor three workers can divide evenly."""

    config = ModelConfig(VisionConfig(), LanguageConfig(), trainable=("language",))

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.language = nn.Sequential(nn.Linear(17, 23), nn.Linear(23, 1), nn.Linear(1, 7))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.language(values).square().mean()


def make_engine(stage: int, workers: int, seed: int, found: Checkpoint | None = None) -> Any:
    prepare_process("cpu")
    model = Odd(seed)
    if found:
        checkpoint.load_weights(found, model)
    run = run_config(
        model_config(), zero_stage=stage, num_workers=workers, micro_batch_size=2,
        precision="bf16" if stage else "fp32",
    )  # fmt: skip
    settings = deepspeed_engine.deepspeed_settings(run)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = deepspeed_engine.initialize(model, build_optimizer(model, OptimConfig()), settings)
    if found:
        checkpoint.load_into(engine, found)
    return engine


def gathered(engine: Any) -> Result:
    """What DeepSpeed itself says that the weights and moments are."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: Result = {}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        found[f"{name}/weight"] = parameter.detach() if whole is None else whole
        for moment in MOMENTS:
            state = safe_get_full_optimizer_state(parameter, moment)
            own = engine.optimizer.state.get(parameter, {})
            found[f"{name}/{moment}"] = own[moment] if state is None else state
    return {key: value.detach().clone() for key, value in found.items()}


def take_step(engine: Any, rank: int) -> None:
    dtype = torch.bfloat16 if engine.zero_optimization_stage() else torch.float32
    torch.manual_seed(rank)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(torch.randn(4, 17, dtype=dtype)))
        engine.step()


def joined(rank: int, workers: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    dist.init_process_group("gloo", f"file://{folder}/{name}", rank=rank, world_size=workers)


def save_each(rank: int, workers: int, folder: str) -> None:
    """Take a step on every stage and save; keep what DeepSpeed says there is."""
    joined(rank, workers, folder, "saving")
    for stage in (0, 1, 2, 3):
        engine = make_engine(stage, workers, seed=stage)
        take_step(engine, rank)
        checkpoint.save(engine, Path(folder) / f"stage-{stage}", STEP, EMPTY, keep=1)
        expected = gathered(engine)
        if rank == 0:
            torch.save(expected, f"{folder}/stage-{stage}.pt")
    dist.barrier()
    dist.destroy_process_group()


def load_each(rank: int, workers: int, folder: str) -> None:
    """Load what each stage saved at the next one, on fewer workers."""
    joined(rank, workers, folder, f"loading-{workers}")
    for stage in (0, 1, 2, 3):
        found = latest_checkpoint(Path(folder) / f"stage-{stage}")
        engine = make_engine((stage + 1) % 4, workers, seed=99, found=found)
        loaded = gathered(engine)
        if rank == 0:
            torch.save(loaded, f"{folder}/stage-{stage}-on-{workers}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    spawn(save_each, (3, str(folder)), nprocs=3)
    spawn(load_each, (2, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parts_hold_what_deepspeed_holds_each_number_once(stage: int, saved: Path) -> None:
    expected = torch.load(saved / f"stage-{stage}.pt", weights_only=True)
    path = saved / f"stage-{stage}" / "checkpoints" / f"step-{STEP:08d}"
    found = saved_tensors(path)  # asserts that no number is missing or there twice
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    moved = [float(value.abs().max()) for key, value in found.items() if "exp_avg" in key]
    assert min(moved) > 0
    assert [part.name for part in parts(path)] == [part_name(rank, 3) for rank in range(3)]
    total = sum(value.numel() for key, value in found.items() if key.endswith("/weight"))
    padding = 1 if stage in (1, 2) else len(expected) / 3  # stage 3 divides each parameter
    for part in parts(path):
        header = 8 + int.from_bytes(part.read_bytes()[:8], "little")
        assert part.stat().st_size - header <= checkpoint_share(total, 3) + 12 * (padding + 8)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fewer_workers_load_it_at_another_stage(stage: int, saved: Path) -> None:
    expected = torch.load(saved / f"stage-{stage}.pt", weights_only=True)
    found = torch.load(saved / f"stage-{stage}-on-2.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_any_run_of_numbers_is_read_from_any_cut(tmp_path: Path) -> None:
    generator = random.Random(1)
    numbers = torch.randn(101)
    for workers in (1, 2, 3, 7, 101, 120):
        folder = tmp_path / str(workers)
        folder.mkdir()
        files: dict[str, CheckpointFile] = {}
        for rank in range(workers):
            start, length = own_range(101, rank, workers)
            if length:
                piece = StagedFragment("a/weight", start, numbers[start : start + length])
                files[part_name(rank, workers)] = write_part(
                    folder / part_name(rank, workers), [piece]
                )
        state = CheckpointState(files=files, layout=2, shapes={"a": [101]})
        with open_saved(Checkpoint(folder, 0, state)) as found:
            assert torch.equal(found.whole("a"), numbers)
            for _ in range(20):
                start = generator.randrange(101)
                length = generator.randrange(101 - start)
                read = found.read("a", "weight", start, length)
                assert torch.equal(read, numbers[start : start + length])


@pytest.mark.parametrize("lacks", [(0, 40), (40, 60), (60, 101)])
def test_numbers_that_no_part_has_are_named(tmp_path: Path, lacks: tuple[int, int]) -> None:
    cuts = [cut for cut in ((0, 40), (40, 60), (60, 101)) if cut != lacks]
    held = [StagedFragment("a/weight", start, torch.ones(end - start)) for start, end in cuts]
    files = {part_name(0, 1): write_part(tmp_path / part_name(0, 1), held)}
    state = CheckpointState(files=files, layout=2, shapes={"a": [101]})
    with (
        pytest.raises(TrainError, match=r"a/weight has \d+ of 101 numbers in order; remove"),
        open_saved(Checkpoint(tmp_path, 0, state)),
    ):
        pass


# ---- workers that fail -------------------------------------------------------------------------


def saves_twice(rank: int, folder: str, run: str, fails: Callable[[int], None]) -> None:
    """Save a step, and another in which a worker fails; the error of each is kept."""
    joined(rank, 2, folder, "failing")
    engine = make_engine(2, 2, seed=0)
    writer = checkpoint.Writer()
    checkpoint.save(engine, Path(run), 1, EMPTY, keep=2, writer=writer)
    writer.wait()
    fails(rank)
    error = "nothing failed"
    try:
        checkpoint.save(engine, Path(run), 2, EMPTY, keep=2, writer=writer)
        writer.wait()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    Path(f"{folder}/error-{rank}").write_text(error, encoding="utf-8")
    os._exit(0)


def fill_disk(rank: int) -> None:
    """Of the second worker only, whose writes find no room."""

    def full(path: Path, pieces: Any) -> CheckpointFile:
        del pieces
        with Path("/dev/full").open("wb", buffering=0) as file:
            try:
                file.write(b"0")
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
        raise AssertionError("/dev/full had room")

    if rank == 1:
        protocol.write_part = full


def die(rank: int) -> None:
    """The second worker is killed when its part is half written."""

    def killed(path: Path, pieces: Any) -> CheckpointFile:
        write_part(path, pieces[: len(pieces) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    if rank == 1:
        protocol.write_part = killed


def test_a_worker_without_room_is_told_by_all_and_the_checkpoint_before_stays(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    spawn(saves_twice, (str(tmp_path), str(run), fill_disk), nprocs=2)
    for rank in (0, 1):
        said = (tmp_path / f"error-{rank}").read_text()
        assert said.startswith(f"TrainError: {run / 'checkpoints' / 'step-00000002'}: cannot be ")
        assert part_name(1, 2) in said
        assert said.endswith("; free space and resume")
    assert only_step(run) == 1


def test_a_worker_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ProcessExitedException):
        spawn(saves_twice, (str(tmp_path), str(run), die), nprocs=2)
    assert only_step(run) == 1


def only_step(run: Path) -> int:
    """The step that a run resumes from; no other folder looks like a checkpoint."""
    found = latest_checkpoint(run)
    assert found is not None
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [found.path.name]
    return found.step


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose memory it uses: were it not to wait, step 1 would hold numbers of step 2."""
    import threading

    go_on, written = threading.Event(), protocol.write_part

    def slow(path: Path, pieces: Any) -> CheckpointFile:
        go_on.wait(10)
        return written(path, pieces)

    monkeypatch.setattr(protocol, "write_part", slow)
    model = Odd(0)
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        optimizer.state[parameter] = {name: torch.ones_like(parameter) for name in MOMENTS}
    engine: Any = type("Engine", (), {"module": model, "optimizer": optimizer})
    writer = checkpoint.Writer()
    checkpoint.save(engine, tmp_path, 1, EMPTY, keep=2, writer=writer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    timer = threading.Timer(0.3, go_on.set)
    timer.start()
    checkpoint.save(engine, tmp_path, 2, EMPTY, keep=2, writer=writer)
    writer.wait()
    for step, same in ((1, False), (2, True)):
        weight = saved_tensors(tmp_path / "checkpoints" / f"step-{step:08d}")
        assert bool((weight["language.0.weight/weight"] == 7.0).all()) is same


def test_a_checkpoint_of_another_model_is_one_line_with_what_differs(tmp_path: Path) -> None:
    model = Odd(0)
    write_small(tmp_path, dict(model.named_parameters()), EMPTY)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    wider, shorter = Odd(0), Odd(0)
    wider.language[1] = nn.Linear(23, 2)
    del shorter.language[2]
    for other, words in (
        (wider, r"language.1.weight has shape \(1, 23\), the model's has \(2, 23\)"),
        (shorter, r"parameters differ from the model's \(language.2.bias and 1 more\)"),
    ):
        before = {name: value.clone() for name, value in other.named_parameters()}
        with pytest.raises(TrainError, match=words) as caught:
            checkpoint.load_weights(found, other)
        assert is_one_line(caught.value)
        assert all(torch.equal(value, before[n]) for n, value in other.named_parameters())
