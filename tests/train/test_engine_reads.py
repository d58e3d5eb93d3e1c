"""A step asks the device for nothing: who reads it, under DeepSpeed's engine, is listed here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.train.engine_reads import Case, cases, read_worker
from tests.train.ready_processes import spawn

# Reads inside a step, by owner and function.
ALLOWED = {
    # Whether the norm that it clips by is a number: stages 1 and 2 once a parameter group, 3 once.
    ("deepspeed", "is_invalid_grad_norm"),
    # Stage 3 compares the order of modules among ranks, once an order.
    ("deepspeed", "assert_lst_len_same_as_other_ranks"),
    ("deepspeed", "get_lst_from_rank0"),
}


def reads(folder: Path, chosen: Sequence[Case], *, planted: bool = False) -> list[dict[str, Any]]:
    spawn(read_worker, (str(folder), chosen, planted), nprocs=2)
    texts = [(folder / f"found-{rank}.json").read_text(encoding="utf-8") for rank in (0, 1)]
    return [one for text in texts for one in json.loads(text)]


def of_step(found: dict[str, Any]) -> Counter[tuple[str, str]]:
    return Counter((read["owner"], read["function"]) for read in found["step"])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_step_reads_nothing_of_the_device(whole: bool, tmp_path: Path) -> None:
    chosen = [*cases(whole=whole)]
    found = reads(tmp_path, chosen)
    assert len(found) == 2 * len(chosen)
    for one in found:
        assert of_step(one).keys() <= ALLOWED, (one["case"], of_step(one) - Counter(ALLOWED))
        told = [(read["owner"], read["function"]) for read in one["read"]]
        assert told == [("lapilli", "numbers")] * 2, one["case"]  # a vector a step
    assert set().union(*map(of_step, found)) == ALLOWED, "an entry that nothing needs any more"


def test_a_planted_read_is_seen(tmp_path: Path) -> None:
    found = reads(tmp_path, [next(cases(whole=False))], planted=True)
    for one in found:
        assert of_step(one)["tests", "_ask"] == 4  # two steps of two micro-batches
