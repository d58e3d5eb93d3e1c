"""Every file that a command writes has the mode of the user's umask, whichever library wrote it."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import pipelines.evaluate
import pipelines.export
import pipelines.generate
import pipelines.report
import pipelines.train
from lapilli.data.dataset.dataset import open_dataset
from lapilli.model.parts.weight_files import save_tensors
from pipelines.cli.settings import EvaluateConfig
from tests.factories import build_dataset, make_mixture, make_tokenizer
from tests.pipelines.test_train import RECIPE
from tests.train.small_run import VIEW

LORA = "  lora: {rank: 4, alpha: 16}\n"


@contextmanager
def umask(value: int) -> Generator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """The mode of every file and folder below, links aside."""
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(p.relative_to(folder)): oct(stat.S_IMODE(p.stat().st_mode)) for p in found}


def expected(folder: Path, mask: int) -> dict[str, str]:
    """What `open` and `mkdir` would have given them."""
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {
        str(path.relative_to(folder)): oct((0o777 if path.is_dir() else 0o666) & ~mask)
        for path in found
    }


def write_everything(folder: Path) -> None:
    """A dataset, a run with adapters and milestones, exports of every form, answers."""
    mixture = make_mixture(folder / "raw", images=8, text_only=4)
    tokenizer = make_tokenizer(folder / "tokenizer")
    dataset = folder / "dataset"
    build_dataset(mixture, dataset, tokenizer)
    assert pipelines.report.main([str(dataset)]) == 0
    (folder / "run.yaml").write_text(RECIPE + LORA, encoding="utf-8")
    run = folder / "run"
    train = [f"--config={folder / 'run.yaml'}", f"--dataset={dataset}", "--launcher=process"]
    train += [
        f"--output={run}",
        "--max_steps=2",
        "--checkpoint.every=1",
        "--checkpoint.archive_every=1",
    ]
    train += [
        "--validation.every=1",
        "--validation.answers_every=1",
        f"--validation.dataset={dataset}",
    ]
    assert pipelines.train.main(train) == 0
    for to in (["hf"], ["llava"], ["llava", "--files=bin"], ["peft"], ["hf", "--shard_size=40KB"]):
        output = folder / "exports" / "-".join(to).replace("--", "")
        arguments = [str(run), f"--to={to[0]}", *to[1:], f"--output={output}"]
        assert pipelines.export.main(arguments) == 0
    arguments = ["--to=webdataset", f"--dataset={dataset}", f"--output={folder / 'exports' / 'w'}"]
    assert pipelines.export.main(arguments) == 0
    (folder / "q.jsonl").write_text('{"question_id": 1, "text": "What?"}\n', encoding="utf-8")
    arguments = [str(run), f"--questions={folder / 'q.jsonl'}", f"--output={folder / 'a.jsonl'}"]
    assert pipelines.generate.main([*arguments, "--decoding.max_new_tokens=3"]) == 0
    config = EvaluateConfig(
        str(run), str(dataset), VIEW, output=str(folder / "e.jsonl"), device="cpu"
    )
    pipelines.evaluate.evaluate_once(config)
    cached = open_dataset(f"local://{dataset}", view=VIEW, image_tokens=1, cache=folder / "cache")
    cached.sample(0)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_every_file_of_every_command_has_the_umasks_mode(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        write_everything(tmp_path / "all")
    found = modes(tmp_path / "all")
    kinds = {Path(name).suffix for name in found}
    assert {".safetensors", ".bin", ".arrow", ".tar", ".jsonl", ".html", ".parquet"} <= kinds
    assert found == expected(tmp_path / "all", mask)


def test_a_folders_own_rule_for_new_files_counts(tmp_path: Path) -> None:
    """What a new file gets is asked of the folder: a default ACL overrides the umask."""
    set_rule = getattr(os, "setxattr", None)
    # version 2; user, group and others may read and write, nobody runs: 6, 6, 6
    entries = [(0x01, 6), (0x04, 6), (0x20, 6)]
    rule = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + b"\xff\xff\xff\xff"
        for tag, bits in entries
    )
    try:
        assert set_rule is not None
        set_rule(tmp_path, "system.posix_acl_default", rule)
    except (AssertionError, OSError) as error:
        pytest.skip(f"this disk has no default ACL: {error}")
    with umask(0o077):
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o666
