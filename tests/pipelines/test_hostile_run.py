"""A run that somebody else made is shown and opened, or one line says why, whatever its files hold.

What asks for code is in `test_trust`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipelines.train
from lapilli.data.config import MixtureConfig
from lapilli.data.io.remote_path import RemotePath
from lapilli.model.errors import ModelError
from lapilli.model.parts.pretrained import check_memory, check_readable
from lapilli.model.parts.weight_files import read_safetensors, read_tensors
from lapilli.train.checkpoint.find import find_checkpoints, latest_checkpoint, newest_weights
from lapilli.train.checkpoint.init_from import find_chain
from lapilli.train.checkpoint.layout import steps_in
from lapilli.train.checkpoint.store import fetch_newest
from lapilli.train.errors import TrainError
from lapilli.train.health.step_dump import read_kept
from lapilli.train.inference.assistant import open_assistant
from lapilli.train.run_folder.checkpoint_state import read_state
from lapilli.train.run_folder.dataset_files import read_data
from pipelines.reports.compare import add_curves, compare_rows, differing, read_compared
from pipelines.reports.describe import describe_run, kind_of
from pipelines.reports.page import Page
from pipelines.reports.run_report import write_run_report
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.hostile import is_one_line, refuses, replaced
from tests.pipelines.test_train import RECIPE

STEP = "step-00000002"
PART = "part-00000-of-00001.safetensors"
STATE = f"checkpoints/{STEP}/state.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with all that a run may write."""
    folder = tmp_path_factory.mktemp("whole")
    mixture = make_mixture(folder / "raw", images=8, text_only=2)
    build_dataset(
        mixture,
        folder / "data",
        make_tokenizer(folder / "tokenizer"),
        mixture=MixtureConfig(held_out=2),
    )
    (folder / "run.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [f"--config={folder / 'run.yaml'}", f"--dataset={folder / 'data'}"]
    flags = ["--launcher=process", f"--output={folder / 'run'}", "--max_steps=2"]
    every = ["--validation.every=1", "--validation.answers_every=1", "--checkpoint.archive_every=2"]
    assert pipelines.train.main([*arguments, *flags, *every]) == 0
    kept = folder / "run" / "replay" / "step-00000001"
    kept.mkdir(parents=True)
    step = {"step": 1, "loss": 1.0, "grad_norm": None, "global_tokens": 1}
    ids = {"sample_indices": [0], "sample_ids": [[["a"]]]}
    (kept / "step.json").write_text(json.dumps({**step, **ids}))
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def compared(run: Path, other: Path) -> None:
    """As `show` compares runs."""
    runs = read_compared([run, other])
    compare_rows(runs)
    differing(runs)
    add_curves(Page("runs", ""), runs)


LOOKS: dict[str, Callable[[Path], object]] = {
    "describe": describe_run,
    "report": write_run_report,
    "compare": lambda run: compared(run, run),
    "checkpoints": lambda run: (
        latest_checkpoint(run),
        find_checkpoints(run),
        find_chain(str(run)),
    ),
    "milestone": lambda run: newest_weights(run / "milestones" / STEP),
    "replay": lambda run: read_kept(run / "replay" / "step-00000001").batches(),
    "open": open_assistant,
}


@pytest.mark.parametrize(
    ("name", "looks", "rarely"),
    [
        ("config.json", ["describe"], "open"),
        ("config.json", ["compare"], "report"),
        ("facts.json", ["describe"], "report"),
        ("metrics.jsonl", ["describe", "compare"], "report"),
        ("starts.jsonl", ["describe"], "report"),
        ("worst.jsonl", [], "report"),
        ("generations.jsonl", [], "report"),
        (STATE, ["checkpoints", "describe"], "open"),
        (f"milestones/{STEP}/state.json", ["milestone"], ""),
        ("replay/step-00000001/step.json", ["replay"], ""),
        ("data/facts.json", [], "open"),
        ("data/template.json", [], "open"),
        ("data/view.json", [], "open"),
    ],
)
def test_any_value_of_any_file_may_be_wrong(
    run: Path, name: str, looks: list[str], rarely: str
) -> None:
    """Each look meets every wrong value; the slow one every 25th."""
    text = (run / name).read_text()
    lines = text.split("\n") if name.endswith(".jsonl") else []
    for number, (what, changed) in enumerate(replaced(lines[0] if lines else text)):
        if number % 3 and name in ("config.json", STATE):  # of a thousand values every third
            continue
        whole = "\n".join([changed.replace("\n", " "), *lines[1:]]) if lines else changed
        (run / name).write_text(whole)
        slow = [rarely] if rarely and number % 25 == 0 else []
        for look in (*looks, *slow):
            refuses(lambda look=look: LOOKS[look](run), (name, what, look))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("instead", ["pipe", "hole"])
def test_no_file_of_a_run_is_waited_for_or_read_without_end(run: Path, instead: str) -> None:
    """A pipe and a terabyte without blocks in the place of each file in turn."""
    found = sorted(path for path in run.rglob("*") if path.is_file())
    found = [path for path in found if path.suffix in (".json", ".jsonl", ".txt")]
    for number, path in enumerate(found):
        kept = path.read_bytes()
        path.unlink()
        if instead == "pipe":
            os.mkfifo(path)
        else:
            path.touch()
            os.truncate(path, 1 << 40)
        slow = ["open", "report"][number % 2 :][:1] if instead == "pipe" else []
        for look in ("describe", "compare", "checkpoints", *slow):
            refuses(lambda look=look: LOOKS[look](run), (path, look))
        path.unlink()
        path.write_bytes(kept)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"global_batch_size": ', "\x00"])
def test_a_folder_with_a_damaged_config_is_no_run(run: Path, text: str) -> None:
    (run / "config.json").write_text(text)
    assert refuses(lambda: kind_of(run), text[:10])
    assert refuses(lambda: open_assistant(run), text[:10])


def test_folders_that_are_no_steps_are_no_checkpoints(run: Path) -> None:
    for name in ("step-abc", "step-", "step-1", "step-00000001x", f"step-{'9' * 5000}"[:200]):
        (run / "milestones" / name).mkdir()
    assert [path.name for path in steps_in(run / "milestones")] == [STEP]
    describe_run(run)


def test_a_run_that_starts_from_itself_ends_in_a_line(run: Path) -> None:
    state = json.loads((run / STATE).read_text())
    state["config"]["init_from"] = str(run)
    (run / STATE).write_text(json.dumps(state))
    with pytest.raises(TrainError, match="starts from more than 100 runs"):
        find_chain(str(run))


# ---- weights -----------------------------------------------------------------------------------


HEADERS: list[bytes] = [
    b"", b"\xff" * 8, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 3) + b"{}", b"\x00" * 16,
    *(
        struct.pack("<Q", len(text)) + text + b"\x00" * 16
        for text in (
            b"[]", b"null", b"[" * 5000, b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}',
            b'{"a":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}',
            b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
            b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("data", HEADERS)
def test_a_wild_header_of_weights_is_one_line(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(data)
    for read in (read_safetensors, read_tensors):
        with pytest.raises(ModelError, match=r"weights.safetensors: cannot be read") as caught:
            read(file)
        assert is_one_line(caught.value)


@pytest.mark.parametrize("data", [HEADERS[3], HEADERS[7], HEADERS[9]])
def test_a_checkpoint_with_a_wild_header_is_one_line(run: Path, data: bytes) -> None:
    (run / "checkpoints" / STEP / PART).write_bytes(data)
    state = json.loads((run / STATE).read_text())
    now = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    state["files"][PART] = now
    (run / STATE).write_text(json.dumps(state))
    assert refuses(lambda: open_assistant(run), data)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[]", "{", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../../other.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": ".."}}',
    ],
)  # fmt: skip
def test_an_index_of_weights_names_files_beside_it(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    for read in (read_tensors, check_readable):
        with pytest.raises(ModelError, match=INDEX) as caught:
            read(tmp_path)
        assert is_one_line(caught.value)


def test_random_weights_without_room_are_refused_before_they_are_drawn() -> None:
    from transformers import AutoConfig

    huge: Any = AutoConfig.for_model("llama", hidden_size=2**20, num_hidden_layers=200)
    with pytest.raises(ModelError, match=r"language.settings: 200 layers of 1,048,576 .* are free"):
        check_memory("language.settings", huge)
    check_memory("language.settings", AutoConfig.for_model("llama", hidden_size=64))


# ---- stores ------------------------------------------------------------------------------------


def test_a_store_with_keys_that_lead_out_of_a_run_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of a store is any text; `..` in it would be a folder above the run's."""
    address = f"file://{tmp_path / 'store'}"
    shutil.copytree(whole / "checkpoints", tmp_path / "store" / "checkpoints")
    shutil.copytree(whole / "data", tmp_path / "store" / "data")
    files = RemotePath.files
    (tmp_path / "store" / "planted").write_text("x")

    def planted(self: RemotePath) -> Any:
        yield from files(self)
        if self.address.endswith("/data"):
            yield RemotePath(f"{self.address}/../planted")

    monkeypatch.setattr(RemotePath, "files", planted)
    run = tmp_path / "run"
    with pytest.raises(TrainError, match="leads out of the run"):
        fetch_newest(run, address, 0)
    assert not (tmp_path / "run" / "planted").exists()
    assert not (tmp_path / "planted").exists()


def test_what_a_run_keeps_is_compared_with_its_checkpoint(run: Path) -> None:
    data = read_state((run / STATE).parent).data
    assert read_data(run, data).spec.size == 32
    (run / "data" / "view.json").write_text('{"size": 64, "fill": [0, 0, 0]}')
    with pytest.raises(TrainError, match="not the view that the run was trained with"):
        read_data(run, data)
