"""Tokens may be added to an earlier run's tokenizer; nothing else may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from lapilli.data.text.encode import load_tokenizer, tokenizer_facts
from lapilli.train.checkpoint.find import Checkpoint
from lapilli.train.checkpoint.token_ids import extends, keeps_ids
from lapilli.train.run_folder.checkpoint_state import CheckpointState, TrainingData
from tests.factories import make_tokenizer

NEW = ["<seg>", "<box>"]


def add(folder: Path, tokens: list[str], *, special: bool = False) -> None:
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens])
    tokenizer.save(path)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state)
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer and a copy."""
    old = make_tokenizer(tmp_path / "old" / "tokenizer", vocab_size=300)
    return old, shutil.copytree(old, tmp_path / "new" / "tokenizer")


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_leave_the_ids_of_all_other_text(
    special: bool, folders: tuple[Path, Path]
) -> None:
    old, new = folders
    add(new, NEW, special=special)
    here, there = load_tokenizer(new), load_tokenizer(old)
    assert extends(here, there)
    assert not extends(there, here)  # ids that one of them lacks
    text = "What colour is the dog? The dog is red."
    assert here.encode(text) == there.encode(text)
    assert here.convert_tokens_to_ids(NEW) == [len(there), len(there) + 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"]["merges"].pop(),
        lambda state: state.update(normalizer={"type": "Lowercase"}),
        lambda state: state["model"]["vocab"].update(a=68, b=67),
    ],
)
def test_any_other_change_is_another_tokenizer(
    change: Callable[[dict[str, Any]], None], folders: tuple[Path, Path]
) -> None:
    old, new = folders
    edit(new, change)
    add(new, NEW)
    assert not extends(load_tokenizer(new), load_tokenizer(old))


def test_the_earlier_runs_tokenizer_is_looked_for_where_it_is_still_the_same(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = folders
    add(new, NEW)
    fingerprint = tokenizer_facts(load_tokenizer(old)).fingerprint
    state = CheckpointState(
        config={"dataset": str(old.parent)}, data=TrainingData(tokenizer=fingerprint), files={}
    )
    start = Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", 1, state)
    assert keeps_ids(start, load_tokenizer(new))
    shutil.copytree(old, tmp_path / "run" / "data" / "tokenizer")
    add(old, ["<other>"])  # the dataset was made again
    assert keeps_ids(start, load_tokenizer(new))  # by the run's own copy
    shutil.rmtree(tmp_path / "run")
    assert not keeps_ids(start, load_tokenizer(new))
