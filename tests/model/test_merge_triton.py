"""The Triton merge without a GPU: under its interpreter, compiled for cards, and refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lapilli.model.errors import ModelError
from lapilli.model.merging import merge

pytest.importorskip("triton", reason="triton (extra `dev`, on Linux) is absent")
CASES = Path(__file__).with_name("triton_merge.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: `make gpu-test` runs them")
def test_the_cases_pass_under_the_interpreter() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"\d\d passed", found.stdout)
    assert "skipped" not in found.stdout


def test_triton_on_a_cpu_is_refused_with_what_to_do() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ModelError, match=r"needs a CUDA device.*on cpu; set model.merge to torch"):
        merge(ids, ids.int() - 1, torch.zeros(3, 4), torch.zeros(0, 4), implementation="triton")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_a_card_without_one(capability: int) -> None:
    from pipelines.benchmarks.sides.merge_kernels import compile_kernels

    for kernel in compile_kernels(capability, hidden=4096):
        assert kernel.cubin
        assert f"sm_{capability}" in kernel.ptx
        assert kernel.spill_bytes == 0, kernel
        assert 0 < kernel.registers <= 128, kernel
        assert kernel.widest_load == 16, kernel
